"""All rivals on the same prompts and noise, one after the other; one that fails is named and stops no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritflow.results import read

if TYPE_CHECKING:
    from tritflow.pipelines.rivals import Rival


def evaluate_rivals(
    rivals: Sequence[Rival],
    one: Callable[[Rival], Any],
    say: Callable[[str], None],
) -> list[str]:
    """Evaluate each; returns the names of those that failed.

    Args:
        rivals: in this order.
        one: evaluates a rival; what is drawn or scored already is not done again.
        say: takes a line about each.
    """
    failed = []
    for rival in rivals:
        say(f"{rival.name}: {rival.title}")
        try:
            one(rival)
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            say(f"{rival.name} failed: {lines[0] if lines else type(error).__name__}")
            failed.append(rival.name)
    return failed


def done_before(path: Path, suite: str, model: str, prompts: str, sampling: tuple[int, int]) -> bool:
    """Whether a results file holds a run of these pictures already.

    Args:
        path: the results file of an evaluation's folder; it need not exist.
        suite: its topic.
        model, prompts: hashes of the contender and of the prompt set.
        sampling: pictures a prompt and base seed.
    """
    if not path.is_file():
        return False
    wanted = (model, prompts, *sampling)
    return any(
        (run["model"]["hash"], *(run["prompts"][k] for k in ("hash", "samples", "base_seed"))) == wanted
        for run in read(path, suite)
    )
