"""Verdicts as numbers: scores by tag and overall, two models paired, two seed sets of one model; plain JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tritflow.evaluation import significance
from tritflow.evaluation import statistics as st
from tritflow.evaluation.api import EvaluationError, Judgement, Task
from tritflow.scenes import GHOSTS


def summarise(task: Task, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Per-tag and overall scores with 95 % intervals, and the noise of the seeds, as plain JSON.

    `overall` is null when a tag that it averages was not drawn: a mean over fewer tags is another number. `ghosts` is
    the share of pictures with marks on the ground, of a suite that looks for them.
    """
    by_tag = {t: [j for j in judgements if j.tag == t] for t in task.tags}
    interval = st.clustered_mean if task.graded else st.clustered_proportion
    tags = {
        tag: interval([j.score for j in found], [j.prompt_id for j in found]).to_dict()
        for tag, found in by_tag.items()
        if found
    }
    for tag, found in by_tag.items():
        if found:
            scores, prompts, _ = _columns(found)
            tags[tag]["seed_noise"] = _number(significance.seed_noise(scores, prompts))
    counted = _counted(task, judgements)
    overall, noise = None, float("nan")
    if counted:
        scores, prompts, strata = _columns(counted)
        mean = st.clustered_mean if task.graded else st.stratified_proportion
        overall = mean(scores, prompts, strata).to_dict()
        noise = significance.seed_noise(scores, prompts, strata)
    summary: dict[str, Any] = {"overall": overall, "tags": tags, "seed_noise": _number(noise)}
    ghosts = [(float(j.marked > GHOSTS), j.prompt_id) for j in judgements if j.marked is not None]
    if ghosts:
        summary["ghosts"] = st.clustered_proportion([g for g, _ in ghosts], [p for _, p in ghosts]).to_dict()
    return summary


def compare(task: Task, student: Sequence[Judgement], teacher: Sequence[Judgement]) -> dict[str, Any]:
    """Paired differences student - teacher, the share of the score kept, exact McNemar counts, the smallest
    difference the run could have seen and the noise of the student's seeds, per tag and overall, as plain JSON.

    Raises `EvaluationError` when the two were not judged on the same pictures' seeds.
    """
    theirs = {(j.prompt_id, j.sample): j for j in teacher}
    if len(theirs) != len(student) or any(
        (j.prompt_id, j.sample) not in theirs or theirs[j.prompt_id, j.sample].seed != j.seed for j in student
    ):
        raise EvaluationError("the two models were not judged on the same prompts and seeds; draw both alike")
    matched = [theirs[j.prompt_id, j.sample] for j in student]

    def block(indices: Sequence[int], stratified: bool) -> dict[str, Any]:
        a, prompts, strata = _columns([student[i] for i in indices])
        b = [matched[i].score for i in indices]
        tags = strata if stratified else None
        found: dict[str, Any] = {
            "difference": st.paired_difference(a, b, prompts, tags).to_dict(),
            "kept": st.score_kept(a, b, prompts, tags).to_dict(),
            "minimum_detectable": _number(
                significance.minimum_detectable_difference([x - y for x, y in zip(a, b, strict=True)], prompts, tags)
            ),
            "seed_noise": _number(significance.seed_noise(a, prompts, tags)),
        }
        if not task.graded:
            found["mcnemar"] = asdict(significance.mcnemar([x >= 0.5 for x in a], [y >= 0.5 for y in b]))
        return found

    counted = {id(j) for j in _counted(task, student)}
    inside = [i for i, j in enumerate(student) if id(j) in counted]
    return {
        "overall": block(inside, True) if inside else None,
        "tags": {
            tag: block([i for i, j in enumerate(student) if j.tag == tag], False)
            for tag in task.tags
            if any(j.tag == tag for j in student)
        },
    }


def between_seed_sets(task: Task, first: Sequence[Judgement], second: Sequence[Judgement]) -> dict[str, Any]:
    """Differences first - second of one model's scores under two base seeds, per tag and overall, as plain JSON.

    Pictures are different, prompts are the same: intervals are over prompts.
    Raises `EvaluationError` when the two are not of the same prompts.
    """
    theirs = {(j.prompt_id, j.sample): j for j in second}
    if len(theirs) != len(first) or any((j.prompt_id, j.sample) not in theirs for j in first):
        raise EvaluationError("the two seed sets are not of the same prompts; draw both alike")

    def difference(chosen: Sequence[Judgement], stratified: bool) -> dict[str, Any]:
        scores, prompts, tags = _columns(chosen)
        others = [theirs[j.prompt_id, j.sample].score for j in chosen]
        return st.paired_difference(scores, others, prompts, tags if stratified else None).to_dict()

    counted = _counted(task, first)
    by_tag = {tag: [j for j in first if j.tag == tag] for tag in task.tags}
    return {
        "overall": difference(counted, True) if counted else None,
        "tags": {tag: difference(found, False) for tag, found in by_tag.items() if found},
    }


def _counted(task: Task, judgements: Sequence[Judgement]) -> list[Judgement]:
    """Those of the overall score; none when one of its tags is missing."""
    if not set(task.overall_tags) <= {j.tag for j in judgements}:
        return []
    return [j for j in judgements if j.tag in task.overall_tags]


def _columns(judgements: Sequence[Judgement]) -> tuple[list[float], list[str], list[str]]:
    return [j.score for j in judgements], [j.prompt_id for j in judgements], [j.tag for j in judgements]


def _number(x: float) -> float | None:
    return round(x, 6) if x == x else None
