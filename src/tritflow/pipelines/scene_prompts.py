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
    found = re.fullmatch(r"scenes:([1-9]\d{0,6})", name)
    if found is None and name.startswith("scenes:"):
        raise PromptsError(f"--prompts {name}: write scenes:N with N from 1 to 9999999, for instance scenes:4096")
    return None if found is None else from_texts(training_captions(int(found[1])), name)


def held_out_prompts(name: str) -> PromptSet | None:
    """N held-out prompts a tag for `held-out:N`, those of the suite `scenes`; None for any other name. To measure on:
    `quantize` does not take them.

    Raises:
        PromptsError: `held-out:` with something else than a number from 1 on.
    """
    found = re.fullmatch(r"held-out:([1-9]\d{0,3})", name)
    if found is None and name.startswith("held-out:"):
        raise PromptsError(f"--prompts {name}: write held-out:N with N prompts a tag from 1 to 9999")
    return None if found is None else from_texts((p.text for p in evaluation_prompts(int(found[1]))), name)
