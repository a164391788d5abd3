"""Verdicts kept as they come, so that a killed scoring pass goes on where it stopped.

    {"made_from": {...}}                                   pictures, suite, scorers, batch size, device, versions
    {"scorers": {...}, "substitutes": {...}}               whenever a scorer was first used
    {"path": "...", "prompt_id": "...", "score": 1.0, ...} a line a picture

A ledger of anything else than what is to be scored now is begun anew. Whole batches are skipped or scored, never
parts of one: a picture's neighbours may change its last digits on a GPU, and a resumed pass gives what an unbroken
one gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritflow.evaluation.api import EvaluationError, Judgement, Task
from tritflow.evaluation.images import ImageSet, cut_half_line, demand, read_lines, verdict_of
from tritflow.results import canonical, provenance, write_atomically

Entry = dict[str, Any]


class Ledger:
    """Verdicts by picture path.

    Args:
        path: the file they are kept in; None keeps them in memory.
        made_from: plain JSON that decides the verdicts; a file made from anything else is begun anew.

    Attributes:
        scorers, substitutes: what has scored so far, by role (see `Task`).

    Raises `ImageSetError` when the file is damaged elsewhere than in its last line, or a verdict lacks its seed, say.
    """

    def __init__(self, path: Path | None = None, made_from: dict[str, Any] | None = None) -> None:
        self._path, self._begun = path, False
        self._header = {"made_from": json.loads(canonical(made_from))}
        self._found: dict[str, Judgement] = {}
        self.scorers: dict[str, str] = {}
        self.substitutes: dict[str, str] = {}
        lines = read_lines(path) if path is not None else []
        if path is None or not lines or lines[0] != self._header:
            return  # the file is begun anew with the first verdict
        self._begun = True
        cut_half_line(path)
        for number, line in enumerate(lines[1:], 2):
            where = f"{path}: line {number}"
            if "path" in line:
                self._found[str(line["path"])] = verdict_of(line, where)
            else:
                demand(line, {"scorers": dict, "substitutes": dict}, where)
                self.scorers, self.substitutes = line["scorers"], line["substitutes"]

    def __len__(self) -> int:
        return len(self._found)

    def knows(self, entries: Iterable[Entry]) -> bool:
        """Whether all these pictures have their verdicts."""
        return all(e["path"] in self._found for e in entries)

    def judgements(self, entries: Sequence[Entry]) -> list[Judgement]:
        """The verdicts on these pictures, in their order. Raises KeyError when one is missing."""
        return [self._found[e["path"]] for e in entries]

    def add(self, task: Task, entries: Sequence[Entry], judgements: Sequence[Judgement]) -> None:
        """Keep a batch of verdicts, and which scorers gave them; on disk when this returns.

        Raises `EvaluationError` when the verdicts before came from another scorer of a role.
        """
        self._note(task)
        known = self.scorers, self.substitutes
        self.scorers, self.substitutes = dict(task.scorers), dict(task.substitutes)
        self._found.update((e["path"], j) for e, j in zip(entries, judgements, strict=True))
        if self._path is None:
            return
        lines = self._lines(entries)[0 if known != (self.scorers, self.substitutes) else 1 :]
        if not self._begun:
            write_atomically(self._path, _text([self._header]))
            self._begun = True
        with open(self._path, "ab") as file:
            file.write(_text(lines))

    def finish(self, entries: Sequence[Entry]) -> None:
        """Put the file in the order of `entries`, so that it tells nothing of kills; a ledger without verdicts has no
        file."""
        if self._path is not None and self._found:
            write_atomically(self._path, _text([self._header, *self._lines(entries)]))

    def _lines(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        verdicts = [{"path": e["path"], **asdict(self._found[e["path"]])} for e in entries]
        return [{"scorers": self.scorers, "substitutes": self.substitutes}, *verdicts]

    def tell(self, task: Task) -> None:
        """Give the task the scorers of the verdicts that were there before it."""
        task.scorers = {**self.scorers, **task.scorers}
        task.substitutes = {**self.substitutes, **task.substitutes}

    def _note(self, task: Task) -> None:
        for role in self.scorers.keys() & task.scorers.keys():
            if self.scorers[role] != task.scorers[role]:
                raise EvaluationError(
                    f"{self._path}: was begun with {self.scorers[role]} as {role}, and now it is "
                    f"{task.scorers[role]}; delete the file to score all pictures again"
                )
        self.tell(task)


def _text(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(canonical(line) + "\n" for line in lines).encode()


def join_ledgers(task: Task, images: ImageSet, place: Path, world: int, judgements: Sequence[Judgement]) -> None:
    """Make of all ranks' ledgers the one that a single process would have left."""
    shares = [_path(place, (rank, world)) for rank in range(world)]
    if any(path.exists() for path in shares):
        whole = open_ledger(task, images, place, (0, 1))
        whole.add(task, images.entries, judgements)
        whole.finish(images.entries)
    for path in shares:
        path.unlink(missing_ok=True)


def open_ledger(task: Task, images: ImageSet, place: Path, shard: tuple[int, int]) -> Ledger:
    """The ledger of a rank's share `images` beside `place` (`NAME.scores.jsonl`): `NAME.verdicts.jsonl`, or
    `NAME.verdicts.1-of-8.jsonl`."""
    rank, world = shard
    versions = provenance()["versions"]
    made_from = {
        "pictures": images.hash,
        "suite": [task.name, task.version],
        "scorers": task.chosen_scorers(),
        "batch_size": task.options.batch_size,
        "device": task.options.device,
        "shard": [rank, world],
        "versions": {k: v for k, v in versions.items() if k in ("tritflow", "torch", "transformers")},
    }
    return Ledger(_path(place, shard), made_from)


def _path(place: Path, shard: tuple[int, int]) -> Path:
    rank, world = shard
    which = "" if world == 1 else f".{rank}-of-{world}"
    return place.with_name(f"{place.name.removesuffix('.scores.jsonl')}.verdicts{which}.jsonl")
