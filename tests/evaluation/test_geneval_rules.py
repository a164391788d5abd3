"""GenEval's rules: against the oracle on 100,000 random detection sets, and property by property."""

from __future__ import annotations

import random
from typing import Any

import geneval_oracle as oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.tasks import geneval_rules as rules

CLASSES = ("cat", "dog", "cup", "hot dog")
COLORS = ("red", "blue", "green")
SIDES = ("left of", "right of", "above", "below")
# Scores on and beside both thresholds, with ties.
SCORES = (0.1, 0.29999, 0.3, 0.30001, 0.5, 0.5, 0.7, 0.89999, 0.9, 0.90001, 0.95, 0.95, 0.99)


def random_set(r: random.Random) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Detections on a coarse grid (so that centres, sizes and overlaps tie), and a clause of every kind."""
    tag = r.choice(("single_object", "two_object", "counting", "colors", "position", "color_attr"))
    number = r.choice((0, 1, 2, 3, 4, 5, 8)) if r.random() < 0.97 else 24
    found = []
    scores = SCORES if tag != "counting" else SCORES[6:]
    for _ in range(number):
        x, y, w, h = r.randrange(0, 60, 5), r.randrange(0, 60, 5), r.randrange(0, 40, 5), r.randrange(0, 40, 5)
        found.append(
            {
                "class": r.choice(CLASSES[:2] if number != 24 else CLASSES[:1]),
                "score": r.choice(scores),
                "box": [x, y, x + w, y + h],
                "color": r.choice(COLORS[:2]),
            }
        )
    first: dict[str, Any] = {"class": r.choice(CLASSES[:2]), "count": r.choice((1, 1, 1, 2, 3))}
    metadata: dict[str, Any] = {"tag": tag, "include": [first]}
    if tag == "counting":
        metadata["exclude"] = [{"class": first["class"], "count": first["count"] + 1}]
        if r.random() < 0.2:
            metadata["exclude"].append({"class": r.choice(CLASSES[:2]), "count": r.choice((1, 17))})
    if tag in ("colors", "color_attr"):
        first["color"] = r.choice(COLORS[:2])
    if tag in ("two_object", "color_attr", "position"):
        second: dict[str, Any] = {"class": r.choice(CLASSES[:2]), "count": r.choice((1, 1, 1, 2))}
        if tag == "color_attr":
            second["color"] = r.choice(COLORS[:2])
        if tag == "position":
            second["position"] = [r.choice(SIDES), 0]
        metadata["include"].append(second)
    return found, metadata


def product(found: list[dict[str, Any]], metadata: dict[str, Any], max_overlap: float = 1.0) -> tuple[bool, str]:
    detections = [Detection(d["class"], d["score"], tuple(d["box"])) for d in found]
    colors = {id(d): f["color"] for d, f in zip(detections, found, strict=True)}
    objects = rules.keep(detections, rules.threshold_for(metadata), max_overlap=max_overlap)
    # Only what was announced may be asked for.
    known = {id(d): colors[id(d)] for d in rules.asked_for_color(metadata, objects)}
    return rules.judge(metadata, objects, lambda d: known[id(d)])


def test_one_hundred_thousand_random_sets_agree_with_the_oracle() -> None:
    r = random.Random(20231017)
    passed = {}
    for i in range(100_000):
        found, metadata = random_set(r)
        max_overlap = 1.0 if i % 4 else r.choice((0.3, 0.5, 0.9))
        mine, why = product(found, metadata, max_overlap)
        assert mine == oracle.verdict(found, metadata, max_overlap), (found, metadata, max_overlap)
        assert mine == (not why)
        hits = passed.setdefault(metadata["tag"], [0, 0])
        hits[mine] += 1
    # The sets are no walk-over: each kind of prompt passes and fails often.
    assert len(passed) == 6
    assert all(min(hits) > 500 for hits in passed.values()), passed


boxes = st.tuples(*[st.floats(-50, 1100, allow_nan=False, width=32) for _ in range(4)]).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)


@given(boxes, boxes)
def test_relations_equal_the_oracles_and_mirror(a: Any, b: Any) -> None:
    mine = rules.relations(a, b)
    assert mine == oracle.relations(list(a), list(b))
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert rules.relations(b, a) == {opposite[s] for s in mine}
    assert not rules.relations(a, a)


@given(boxes, boxes)
def test_overlap_is_symmetric_and_a_share(a: Any, b: Any) -> None:
    assert rules.iou(a, b) == pytest.approx(rules.iou(b, a))
    assert 0 <= rules.iou(a, b) <= 1 + 1e-9
    assert rules.iou(a, a) == 1


scored = st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from(SCORES), boxes), max_size=30)


@given(scored, st.sampled_from((0.3, 0.9)), st.sampled_from((1.0, 0.5)))
def test_what_is_kept(found: Any, threshold: float, max_overlap: float) -> None:
    detections = [Detection(*f) for f in found]
    objects = rules.keep(detections, threshold, max_overlap=max_overlap)
    for name, mine in objects.items():
        assert 1 <= len(mine) <= rules.MAX_OBJECTS
        assert all(d.label == name and d.score > threshold for d in mine)
        assert [d.score for d in mine] == sorted((d.score for d in mine), reverse=True)
        for i, d in enumerate(mine):
            assert max_overlap == 1 or all(rules.iou(d.box, c.box) < max_overlap for c in mine[:i])
    assert set(objects) == {d.label for d in detections if d.score > threshold}


def cats(*scores: float, box: Any = (0, 0, 10, 10)) -> list[dict[str, Any]]:
    return [{"class": "cat", "score": s, "box": box, "color": "red"} for s in scores]


COUNTING = {
    "tag": "counting",
    "include": [{"class": "cat", "count": 2}],
    "exclude": [{"class": "cat", "count": 3}],
}


@pytest.mark.parametrize(
    ("scores", "passes"),
    [((0.95, 0.95), True), ((0.95,), False), ((0.95,) * 3, False), ((0.95, 0.9), False), ((0.95, 0.91, 0.5), True)],
)
def test_counts_are_exact_and_strict(scores: tuple[float, ...], passes: bool) -> None:
    assert product(cats(*scores), COUNTING)[0] is passes


def test_the_threshold_itself_does_not_count() -> None:
    single = {"tag": "single_object", "include": [{"class": "cat", "count": 1}]}
    assert not product(cats(0.3), single)[0]
    assert product(cats(0.3001), single)[0]
    assert "found 0 cat of 1" in product([], single)[1]


def test_no_class_counts_more_than_sixteen() -> None:
    exclude = {"tag": "counting", "include": [], "exclude": [{"class": "cat", "count": 17}]}
    assert product(cats(*[0.95] * 30), exclude)[0]


def test_a_suppressed_detection_uses_up_a_place() -> None:
    # Sixteen boxes in one place, then one elsewhere: it comes seventeenth and is never looked at.
    found = [Detection("cat", 0.99, (0, 0, 10, 10))] * 16 + [Detection("cat", 0.95, (50, 50, 60, 60))]
    assert len(rules.keep(found, 0.9, max_overlap=0.5)["cat"]) == 1


def test_of_equal_scores_the_later_one_is_better() -> None:
    found = cats(0.9, 0.9)
    found[1] = {**found[1], "color": "blue"}
    blue = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "blue"}]}
    assert product(found, blue)[0]
    assert not product(found[::-1], blue)[0]


def test_only_the_best_are_asked_for_their_colour() -> None:
    found = [*cats(0.9), {"class": "cat", "score": 0.5, "box": (0, 0, 5, 5), "color": "blue"}]
    blue = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "blue"}]}
    passed, why = product(found, blue)
    assert not passed
    assert why == "cat is red instead of blue"


def test_a_target_that_failed_fails_what_stands_by_it() -> None:
    metadata = {
        "tag": "position",
        "include": [
            {"class": "dog", "count": 1},
            {"class": "cat", "count": 1, "position": ["left of", 0]},
        ],
    }
    passed, why = product(cats(0.9), metadata)
    assert not passed
    assert "nothing for cat to be left of" in why
    metadata["include"][1]["position"] = ["left of", 1]  # type: ignore[index]
    with pytest.raises(EvaluationError, match="refers to clause 1"):
        product(cats(0.9), metadata)


def test_clauses_do_not_share_objects_but_may_repeat() -> None:
    # Two clauses of one class are each satisfied by the same cat: clauses are independent.
    twice = {"tag": "two_object", "include": [{"class": "cat", "count": 1}] * 2}
    assert product(cats(0.9), twice)[0]
