"""The suite of the built-in small FLUX: held-out scenes, read back by a deterministic detector.

Overall is the mean of the six GenEval tags; texture and occlusion are reported beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tritflow.evaluation.api import EvaluationError, Judgement, Progress, PromptRecord, Task
from tritflow.evaluation.images import ImageSet
from tritflow.evaluation.ledger import Ledger
from tritflow.evaluation.tasks.detail import Detail
from tritflow.evaluation.workers import by_chunks, workers_of_environment
from tritflow.results import digest
from tritflow.scenes import (
    GENEVAL_TAGS,
    TAGS,
    Clause,
    Prompt,
    detect,
    evaluation_prompts,
    judge,
    marked,
    object_mask,
    texture_contrast,
)

# Below this many pictures starting worker processes costs more than it saves.
POOL_FROM = 600
_CHUNK = 64


def to_record(prompt: Prompt) -> PromptRecord:
    """The prompt under a name made of its content, so that it keeps its seeds in every selection."""
    content = asdict(prompt)
    return PromptRecord(
        id=f"{prompt.tag}-{digest(content, 12)}",
        tag=prompt.tag,
        text=prompt.text,
        metadata={"include": content["include"], "held_out": prompt.held_out},
    )


def to_prompt(record: PromptRecord) -> Prompt:
    """The inverse of `to_record`, from a folder's prompts.jsonl as well."""
    try:
        clauses = tuple(Clause(**c) for c in record.metadata["include"])
        return Prompt(record.tag, record.text, clauses, record.metadata["held_out"])
    except (KeyError, TypeError) as e:
        raise EvaluationError(f"prompt '{record.id}' is not a scene's prompt: {e}") from None


# Whether a picture passed, why not, and which share of its ground is marked.
_Verdict = tuple[bool, str, float]


def _verdict(prompt: Prompt, pixels: NDArray[np.uint8]) -> _Verdict:
    verdict = judge(prompt, detect(pixels))
    return bool(verdict.passed), str(verdict.reason), round(marked(pixels), 6)


def _chunk_verdicts(folder: str, chunk: Sequence[tuple[dict[str, Any], Prompt]]) -> list[_Verdict]:
    return [_verdict(prompt, ImageSet.pixels_of(folder, entry)) for entry, prompt in chunk]


class ScenesTask(Task):
    """Held-out scenes of the built-in world."""

    name = "scenes"
    # 1 held textures and pairs of shapes out as well, so its prompts are others; 2 read overlapping objects worse.
    version = 3
    tags = tuple(TAGS)
    overall_tags = tuple(GENEVAL_TAGS)
    scorers = {"detector": "tritflow.scenes.detector", "rules": "tritflow.scenes.rules"}  # noqa: RUF012
    default_per_tag = 60

    def prompts(
        self, split: str = "test", per_tag: int | None = None, seed: int = 0, tags: Sequence[str] | None = None
    ) -> list[PromptRecord]:
        """Held-out prompts; `split` is "test" alone, since training captions carry no clauses to judge by."""
        if split != "test":
            raise EvaluationError(f"scenes has no split '{split}'; its held-out prompts are 'test'")
        number = self.default_per_tag if per_tag is None else per_tag
        if number < 1:
            raise EvaluationError(f"{number} prompts a tag leave nothing to draw; take at least 1")
        drawn = evaluation_prompts(number, seed=seed, tags=self.check_tags(tags))
        records = list({r.id: r for r in map(to_record, drawn)}.values())
        return sorted(records, key=lambda r: self.tags.index(r.tag))

    def score(
        self, images: ImageSet, progress: Progress | None = None, ledger: Ledger | None = None
    ) -> list[Judgement]:
        """See `Task.score`. Nothing is kept in `ledger`: a picture takes less than a millisecond."""
        prompts = {r.id: to_prompt(r) for r in images.records}
        work = [(e, prompts[e["prompt_id"]]) for e in images.entries]
        judgements = []
        for entry, (passed, reason, stained) in zip(images.entries, self._verdicts(images, work), strict=True):
            judgements.append(
                Judgement(
                    prompt_id=entry["prompt_id"],
                    tag=entry["tag"],
                    sample=entry["sample"],
                    seed=entry["seed"],
                    score=float(passed),
                    reason="" if passed else reason,
                    marked=stained,
                )
            )
            if progress is not None:
                progress(len(judgements), len(work))
        return judgements

    def object_mask(self) -> Callable[[Any], Any]:
        return object_mask

    def details(self) -> tuple[Detail, ...]:
        return (*super().details(), Detail("texture_contrast", texture_contrast, ("texture",)))

    @staticmethod
    def _verdicts(images: ImageSet, work: list[tuple[dict[str, Any], Prompt]]) -> Iterator[_Verdict]:
        workers = 1 if len(work) < POOL_FROM else workers_of_environment()
        for verdicts in by_chunks(partial(_chunk_verdicts, str(images.folder)), work, _CHUNK, workers):
            yield from verdicts
