"""Stages that are done, go on or are done again, by what lies in the folder.

Every stage has a record, `stages/NAME.json`: its inputs, what the stages before it left, and what it left itself. A
stage is done when its inputs are still those of the record *and* what lies in the folder still is what the record
says. So a kill, a changed recipe and a deleted picture are all found by looking, and nothing relies on a flag.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tritflow.results import canonical, digest, write_atomically

Json = dict[str, Any]
Report = Callable[[str, int, int], None]
"""`report(what, done, total)`."""


class ReproductionError(ValueError):
    """What was asked for cannot be reproduced, or not without consent. Says what to do."""


@dataclass(frozen=True)
class Cost:
    """What is still to be done in a stage; None where nothing was measured to tell by.

    Attributes:
        pictures: to draw.
        bytes: of disk that it will take.
        seconds: that it will take.
        note: what the numbers leave out.
    """

    pictures: int = 0
    bytes: int | None = 0
    seconds: float | None = 0.0
    note: str = ""


@dataclass(frozen=True)
class Stage:
    """One step on the way. All functions but `cost` are called only when the stages it needs are done.

    Attributes:
        name: of its record.
        what: in words.
        needs: names of the stages whose results it uses.
        inputs: plain JSON of everything else that decides its result.
        outputs: plain JSON that tells what it left apart from anything else; None: nothing, or only a part.
        run: does what is missing; goes on where a kill stopped it.
        owns: files and folders inside the run's folder that go before it is done again from other inputs.
        cost: of what is missing now; called with True when what lies there is of other inputs and does not count.
        precious: whether what it owns took long to make, so that nobody should lose it unasked.
        mends: whether `run` by itself redoes what was damaged or removed.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    inputs: Callable[[], Json]
    outputs: Callable[[], Json | None]
    run: Callable[[Report], None]
    owns: Callable[[], Sequence[Path]]
    cost: Callable[[bool], Cost] = field(default=lambda fresh: Cost())
    mends: bool = False
    precious: bool = False


Kind = Literal["done", "new", "begun", "changed", "damaged", "waiting"]


@dataclass(frozen=True)
class State:
    """How far a stage is, and why it is not done."""

    kind: Kind
    why: str = ""


class Engine:
    """The stages of one folder, in an order in which each comes after those it needs.

    Raises `ReproductionError` when another process is at work in the folder.
    """

    def __init__(self, folder: Path, stages: Sequence[Stage]) -> None:
        self.folder, self.stages = folder, list(stages)
        self._left: dict[str, str] = {}

    def states(self) -> dict[str, State]:
        """How far each stage is, without changing anything."""
        self._left = {}
        return {stage.name: self._look(stage) for stage in self.stages}

    def recorded(self) -> set[str]:
        """Names of the stages that were begun at some time, so that something of theirs may lie here."""
        return {stage.name for stage in self.stages if self._read(stage) is not None}

    def run(self, report: Report, say: Callable[[str], None] = lambda text: None) -> list[str]:
        """Do what is to be done, in order; returns the names of the stages that were done now."""
        done = []
        self._left = {}
        with self._alone():
            for stage in self.stages:
                state = self._look(stage)
                if state.kind == "done":
                    continue
                say(f"{stage.what}{f' ({state.why})' if state.why else ''}")
                record = self._read(stage)
                if record and (state.kind == "changed" or (state.kind == "damaged" and not stage.mends)):
                    self._discard(record)
                self._do(stage, report)
                done.append(stage.name)
        return done

    def _do(self, stage: Stage, report: Report) -> None:
        key = self._key(stage)
        owns = [path.relative_to(self.folder).as_posix() for path in stage.owns()]
        # Written first: what a kill leaves is then known to come from these inputs.
        record: Json = {"stage": stage.name, "key": key, "owns": owns, "outputs": None}
        self._write(stage, record)
        started = time.perf_counter()
        stage.run(report)
        outputs = stage.outputs()
        if outputs is None:
            raise ReproductionError(f"stage {stage.name} ended without its result; run the same command again")
        self._write(stage, {**record, "outputs": outputs, "seconds": round(time.perf_counter() - started, 3)})
        self._left[stage.name] = digest(outputs)

    def _look(self, stage: Stage) -> State:
        record = self._read(stage)
        missing = [name for name in stage.needs if name not in self._left]
        if missing:
            return State("waiting", f"after {missing[-1]}")
        if record is None:
            return State("new")
        difference = _difference(record["key"], self._key(stage))
        if difference:
            return State("changed", f"again: {difference}")
        outputs = stage.outputs()
        if record["outputs"] is None:
            return State("begun", "goes on")
        if outputs != record["outputs"]:
            return State("damaged", "again: what it had left was changed or removed")
        self._left[stage.name] = digest(outputs)
        return State("done")

    def _key(self, stage: Stage) -> Json:
        needs = {name: self._left[name] for name in stage.needs}
        key: Json = json.loads(canonical({"inputs": stage.inputs(), "needs": needs}))
        return key

    def _path(self, stage: Stage) -> Path:
        return self.folder / "stages" / f"{stage.name}.json"

    def _read(self, stage: Stage) -> Json | None:
        try:
            found = json.loads(self._path(stage).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            raise ReproductionError(f"{self._path(stage)}: is not a stage's record; delete it") from None
        if not isinstance(found, dict) or not {"key", "owns", "outputs"} <= found.keys():
            raise ReproductionError(f"{self._path(stage)}: is not a stage's record; delete it")
        return found

    def _write(self, stage: Stage, record: Json) -> None:
        write_atomically(self._path(stage), (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())

    def _discard(self, record: Json) -> None:
        root = self.folder.resolve()
        for name in record["owns"]:
            path = self.folder / name
            # A record may have been edited; nothing outside of this run is ever removed.
            if not path.resolve().is_relative_to(root) or path.resolve() == root:
                raise ReproductionError(f"{path}: lies outside of {self.folder}; delete {self.folder / 'stages'}")
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One run at a time in a folder (POSIX; elsewhere without a lock)."""
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # pragma: no cover
            yield
            return
        with open(self.folder / "stages" / ".lock", "ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ReproductionError(f"another process is at work in {self.folder}; wait for it") from None
            yield


def _difference(old: Any, new: Any, path: str = "") -> str:
    """Where two JSON values first differ, in words; empty when they do not."""
    if old == new:
        return ""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*new, *old]:
            inner = name if path in ("", "inputs", "needs") else f"{path}.{name}"
            found = _difference(old.get(name), new.get(name), inner)
            if found:
                return f"{name} left something else" if path == "needs" else found
    shown = [text if len(text := str(value)) <= 40 else f"{text[:37]}..." for value in (old, new)]
    return f"{path} was {shown[0]}, now {shown[1]}"
