"""T2I-CompBench's formulas: against the oracle on 100,000 random detection sets, and property by property."""

from __future__ import annotations

import random
from typing import Any

import compbench_oracle as oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.tasks import compbench_rules as rules
from tritflow.evaluation.tasks.compbench_language import RELATIONS_2D

LABELS = ("cat", "dog", "person", "picture", "picture frame", "boat", "tv", "wildcat", "fish")
NAMES = ("cat", "dog", "man", "girl", "painting", "ship", "goldfish", "telivision", "fish")
SCORES = (0.5, 0.6, 0.75, 0.9, 1.0)


def random_detections(r: random.Random, grid: int, limit: int, labels: Any = LABELS) -> list[dict[str, Any]]:
    """Boxes on a grid, so that distances and overlaps tie; some exactly one over the other."""
    found: list[dict[str, Any]] = []
    for _ in range(r.choice((0, 1, 2, 2, 3, 4, 6))):
        if found and r.random() < 0.3:
            box = [v + r.choice((0, 0, 1)) for v in r.choice(found)["box"]]
        else:
            x, y = r.randrange(0, limit - grid, grid), r.randrange(0, limit - grid, grid)
            box = [x, y, min(limit, x + grid * r.randint(1, 5)), min(limit, y + grid * r.randint(1, 5))]
        found.append({"label": r.choice(labels), "score": r.choice(SCORES), "box": box})
    return found


def typed(found: list[dict[str, Any]]) -> list[Detection]:
    return [Detection(d["label"], d["score"], tuple(map(float, d["box"]))) for d in found]


def test_two_dimensional_relations_agree_on_forty_thousand_sets() -> None:
    r = random.Random(1)
    seen = set()
    for _ in range(40_000):
        found = random_detections(r, 25, 475, LABELS[:3])
        relation, a, b = r.choice(RELATIONS_2D), r.choice(NAMES[:4]), r.choice(NAMES[:4])
        mine = rules.spatial_2d(relation, a, b, typed(found))
        assert mine == oracle.spatial_2d(relation, a, b, found), (relation, a, b, found)
        seen.add(round(mine, 2))
    assert {0.0, 1.0} <= seen
    assert len(seen) > 20


def test_three_dimensional_relations_agree_on_thirty_thousand_sets() -> None:
    r = random.Random(2)
    maps = [np.random.default_rng(i).integers(0, 9, (24, 20)) for i in range(20)]
    # Plateaus, so that mean depths tie.
    maps += [np.full((24, 20), 3), np.repeat(np.arange(24), 20).reshape(24, 20) // 8]
    undefined, seen = 0, set()
    lists = [m.tolist() for m in maps]
    for _ in range(30_000):
        k = r.randrange(len(maps))
        found = random_detections(r, 4, 24, (*LABELS[:5], "wildcat"))
        relation = r.choice(("in front of", "behind", "hidden"))
        a, b = r.choice(("cat", "dog", "man", "picture")), r.choice(("cat", "dog", "girl", "frame"))
        wanted = oracle.spatial_3d(relation, a, b, found, lists[k])
        mine = rules.spatial_3d(relation, a, b, typed(found), maps[k].astype(np.float32))
        if wanted is None:
            undefined += 1
            continue
        assert mine == wanted, (relation, a, b, found, k)
        seen.add(round(mine, 2))
    assert undefined == 0
    assert len(seen) > 20


def test_numeracy_agrees_on_thirty_thousand_sets() -> None:
    r = random.Random(3)
    seen = set()
    for _ in range(30_000):
        found = random_detections(r, 25, 475)
        wanted = [(r.choice(NAMES), r.randint(1, 3)) for _ in range(r.randint(1, 4))]
        mine = rules.numeracy(wanted, typed(found))
        assert mine == pytest.approx(oracle.numeracy(wanted, found), abs=1e-12), (wanted, found)
        seen.add(round(mine, 3))
    assert {0.0, 1.0} <= seen
    assert len(seen) > 10


@given(st.lists(st.floats(0, 1), max_size=8))
def test_attributes_are_the_rounded_product(answers: list[float]) -> None:
    mine = rules.attributes(answers)
    assert mine == oracle.attributes(answers, rounded=True)
    assert 0 <= mine <= 1
    assert rules.attributes([*answers[:7], 0.0]) == 0


def test_attributes_without_phrases_and_beyond_eight() -> None:
    assert rules.attributes([]) == 1
    assert rules.attributes([1.0] * 8 + [0.0]) == 1


boxes = st.tuples(*[st.floats(0, 479, width=32) for _ in range(4)]).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 1, max(b[1], b[3]) + 1)
)


@given(boxes, boxes)
def test_sides_exclude_each_other_and_mirror(a: Any, b: Any) -> None:
    sides = ("on the right of", "on the left of", "on the top of", "on the bottom of")
    values = {side: rules.relation_2d(side, a, b) for side in sides}
    assert sum(v > 0 for v in values.values()) <= 1
    for one, other in (("on the right of", "on the left of"), ("on the top of", "on the bottom of")):
        assert rules.relation_2d(one, a, b) == rules.relation_2d(other, b, a)
    for v in values.values():
        assert 0 <= v <= 1
    near = rules.relation_2d("near", a, b)
    assert near == rules.relation_2d("next to", b, a)
    assert 0 < near <= 1


@given(boxes, boxes, st.integers(0, 5))
def test_front_and_behind_exclude_each_other(a: Any, b: Any, seed: int) -> None:
    depth = np.random.default_rng(seed).random((490, 490)).astype(np.float32)
    front, behind = rules.relation_3d("in front of", a, b, depth), rules.relation_3d("behind", a, b, depth)
    assert front == 0 or behind == 0
    assert rules.relation_3d("in front of", b, a, depth) == behind
    assert rules.relation_3d("hidden", a, b, depth) == behind
    overlap = rules.box_iou(a, b)
    credit = min(1.0, overlap / 0.5) if 0 < overlap != 0.5 else 0.0
    # Equal depths are neither.
    assert front + behind == 0 or front + behind == pytest.approx(credit, abs=1e-12)


def test_what_the_scripts_decide() -> None:
    cat, dog = Detection("cat", 1.0, (0, 0, 100, 100)), Detection("dog", 1.0, (300, 0, 400, 100))
    assert rules.spatial_2d("on the left of", "cat", "dog", [cat, dog]) == 1
    assert rules.spatial_2d("on top of", "cat", "dog", [cat, dog]) == 0.5  # no rule for this wording: half remains
    assert rules.spatial_2d("on the left of", "cat", "dog", [cat]) == 0  # a quarter is below one half
    assert rules.relation_2d("near", (0, 0, 10, 10), (300, 300, 310, 310)) == 0.5
    assert rules.relation_3d("in front of", (0, 0, 4, 4), (0, 0, 2, 4), np.zeros((9, 9))) == 0  # IoU of one half
    # Equal distances along and across are on no side.
    assert rules.relation_2d("on the left of", (0, 0, 10, 10), (50, 50, 60, 60)) == 0


def test_numeracy_by_halves() -> None:
    def cats(*xs: int) -> list[Detection]:
        return [Detection("cat", 0.9, (x, 0, x + 50, 50)) for x in xs]

    assert rules.numeracy([("cat", 2)], cats(0, 100)) == 1
    assert rules.numeracy([("cat", 2)], cats(0, 100, 200)) == 0.5
    assert rules.numeracy([("cat", 2)], cats(0, 1)) == 0.5  # one cat, seen twice
    assert rules.numeracy([("cat", 2), ("dog", 1)], cats(0, 100)) == 0.5
    assert rules.numeracy([("man", 1)], [Detection("person", 0.9, (0, 0, 9, 9))]) == 1
    with pytest.raises(EvaluationError, match="no object to count"):
        rules.numeracy([], [])


@pytest.mark.parametrize("level", range(1, 6))
def test_grades(level: int) -> None:
    assert rules.grade(level) == oracle.likert(level)


@pytest.mark.parametrize("level", [0, 6, -1])
def test_other_grades_are_refused(level: int) -> None:
    with pytest.raises(EvaluationError, match="1 to 5"):
        rules.grade(level)
