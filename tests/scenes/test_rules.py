"""The rules on detections made by hand: geometry, exact counts, what is too poor to count."""

from __future__ import annotations

import itertools

import pytest

from tritflow.scenes import Clause, Detection, Prompt, judge
from tritflow.scenes.rules import MIN_SCORE, relation_holds


def at(x: float, y: float, shape: str = "star", half: float = 10, won: float = 1.0, score: float = 0.95) -> Detection:
    return Detection(shape, "red", "solid", (x - half, y - half, x + half, y + half), score, won)


def test_sides_are_exclusive_and_mirror_each_other() -> None:
    sides = {"left of": (-40, 0), "right of": (40, 0), "above": (0, -40), "below": (0, 40)}
    for (relation, (dx, dy)), asked in itertools.product(sides.items(), sides):
        a, b = at(64 + dx, 64 + dy), at(64, 64)
        assert relation_holds(a, asked, b) == (relation == asked)
        mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}[relation]
        assert relation_holds(b, mirrored, a)


def test_the_margin_is_a_tenth_of_both_sizes() -> None:
    # Two boxes 20 wide: centres must be more than 4 apart.
    assert not relation_holds(at(60, 64), "left of", at(64, 64))
    assert relation_holds(at(59.9, 64), "left of", at(64, 64))
    # Larger boxes need more.
    assert not relation_holds(at(59.9, 64, half=20), "left of", at(64, 64))


def test_a_diagonal_counts_for_both_sides_and_a_steep_one_for_one() -> None:
    diagonal = at(34, 34)
    assert relation_holds(diagonal, "left of", at(64, 64))
    assert relation_holds(diagonal, "above", at(64, 64))
    steep = at(56, 14)
    assert relation_holds(steep, "above", at(64, 64))
    assert not relation_holds(steep, "left of", at(64, 64))


def test_in_front_needs_overlap_and_the_contested_ground() -> None:
    behind = at(64, 64, won=0.05)
    assert relation_holds(at(74, 64, won=0.95), "in front of", behind)
    assert not relation_holds(behind, "in front of", at(74, 64, won=0.95))
    assert not relation_holds(at(90, 64, won=0.95), "in front of", behind)
    # Equal shares: nobody covers anybody.
    assert not relation_holds(at(74, 64), "in front of", at(64, 64))


@pytest.mark.parametrize("found", range(5))
def test_counts_are_exact(found: int) -> None:
    seen = [at(20 + 25 * i, 64) for i in range(found)]
    for asked in (2, 3, 4):
        counted = judge(Prompt("counting", "", (Clause("star", asked),), ""), seen)
        assert counted.passed == (found == asked)
        assert (
            counted.passed or counted.reason == f"expected star {'=' if found > asked else '>='} {asked}, found {found}"
        )
    # Other tags ask for at least as many.
    assert judge(Prompt("single_object", "", (Clause("star"),), ""), seen).passed == (found >= 1)


def test_what_fits_no_shape_counts_for_nothing() -> None:
    prompt = Prompt("single_object", "", (Clause("star"),), "")
    assert judge(prompt, [at(64, 64, score=MIN_SCORE)]).passed
    assert not judge(prompt, [at(64, 64, score=MIN_SCORE - 0.01)]).passed
    # A speck that is no object does not spoil a count either.
    pair = [at(30, 64), at(90, 64), at(64, 100, score=0.4)]
    assert judge(Prompt("counting", "", (Clause("star", 2),), ""), pair).passed


def test_any_pair_may_stand_in_the_relation() -> None:
    prompt = Prompt("position", "", (Clause("star", relation="left of", target=1), Clause("ring")), "")
    ring = at(64, 64, "ring")
    assert judge(prompt, [at(100, 64), at(20, 64), ring]).passed
    verdict = judge(prompt, [at(100, 64), ring])
    assert not verdict.passed
    assert verdict.reason == "no star left of ring"


def test_an_object_is_not_in_relation_to_itself() -> None:
    prompt = Prompt("position", "", (Clause("star", relation="above", target=1), Clause("star")), "")
    assert not judge(prompt, [at(64, 64)]).passed
    assert judge(prompt, [at(64, 20), at(64, 64)]).passed
