"""Prompts of the built-in world by name: `scenes:N`, training captions to calibrate on, more than a model folder has
room for; `held-out:N`, the suite's own to measure on."""

from __future__ import annotations

import re
from functools import lru_cache

from tritflow.calibration.prompts import PromptsError, PromptSet, from_texts
from tritflow.scenes import evaluation_prompts
from tritflow.scenes.training_set import training_captions


@lru_cache(maxsize=2)
def scene_prompts(name: str) -> PromptSet | None:
    """The first N captions of the training stream for `scenes:N`, the same every time; None for any other name.

    Raises:
        PromptsError: `scenes:` with something else than a number from 1 on.
    """
    count = _count(name, "scenes", 7)
    return None if count is None else from_texts(training_captions(count), name)


def held_out_prompts(name: str) -> PromptSet | None:
    """N held-out prompts a tag for `held-out:N`, those of the suite `scenes`; None for any other name. To measure on:
    `quantize` does not take them.

    Raises:
        PromptsError: `held-out:` with something else than a number from 1 on.
    """
    count = _count(name, "held-out", 4)
    return None if count is None else from_texts((p.text for p in evaluation_prompts(count)), name)


def _count(name: str, kind: str, digits: int) -> int | None:
    found = re.fullmatch(rf"{kind}:([1-9]\d{{0,{digits - 1}}})", name)
    if found is None and name.startswith(f"{kind}:"):
        raise PromptsError(
            f"--prompts {name}: write {kind}:N with N from 1 to {'9' * digits}, for instance {kind}:4096"
        )
    return None if found is None else int(found[1])
