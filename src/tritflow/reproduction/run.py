"""The whole way: a plan first, then the stages, then one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritflow.evaluation.projection import duration
from tritflow.formats.environment import free_bytes
from tritflow.report.formats import interval, signed_interval, size
from tritflow.reproduction.engine import Cost, Engine, Report, ReproductionError, State
from tritflow.reproduction.request import Request
from tritflow.reproduction.stages import stages
from tritflow.results import read

CONSENT = 3600.0
"""Seconds from which on a run is started only with consent."""


@dataclass(frozen=True)
class Row:
    """One stage in the plan; `loses`: something that took long to make is removed before it is made again."""

    name: str
    what: str
    state: State
    cost: Cost
    loses: bool = False

    @property
    def cells(self) -> tuple[str, str, str, str, str]:
        """What, state, pictures, disk and time, in words."""
        if self.state.kind == "done":
            return self.what, "done", "", "", ""
        c = self.cost
        disk = "unknown" if c.bytes is None else size(c.bytes) if c.bytes else ""
        time = "unknown" if c.seconds is None else f"about {duration(c.seconds)}" if c.seconds else ""
        what = f"{self.what} ({c.note})" if c.note else self.what
        return what, self.state.why or "to do", f"{c.pictures:,}" if c.pictures else "", disk, time


@dataclass(frozen=True)
class Outlook:
    """The plan of a run: every stage, and what is left in all.

    Attributes:
        rows: the stages in order.
        free: bytes free where the run's folder lies.
    """

    rows: tuple[Row, ...]
    free: int

    @property
    def left(self) -> list[Row]:
        return [row for row in self.rows if row.state.kind != "done"]

    @property
    def pictures(self) -> int:
        return sum(row.cost.pictures for row in self.left)

    @property
    def bytes(self) -> int:
        return sum(row.cost.bytes or 0 for row in self.left)

    @property
    def seconds(self) -> float:
        """Of the stages whose time is known."""
        return sum(row.cost.seconds or 0.0 for row in self.left)

    @property
    def unknown(self) -> list[str]:
        """Stages of which nothing was measured yet."""
        return [row.name for row in self.left if row.cost.seconds is None]

    @property
    def needs_consent(self) -> bool:
        """Over an hour, or not known to be less (timing a few pictures does not count), or something is lost."""
        return self.seconds > CONSENT or bool(self.lost) or any(name != "latency" for name in self.unknown)

    @property
    def lost(self) -> list[str]:
        """Stages whose earlier pictures or model are removed, since they were made from other inputs."""
        return [row.name for row in self.rows if row.loses]

    def total(self) -> str:
        if not self.left:
            return "everything is done"
        time = f"{duration(self.seconds)}" if self.seconds else ""
        if self.unknown:
            time = f"{time} and " if time else ""
            count = f"{len(self.unknown)} stage{'s' * (len(self.unknown) != 1)}"
            time += f"a time that is unknown for {count}: nothing was measured here yet"
        return (
            f"{len(self.left)} of {len(self.rows)} stages, {self.pictures:,} pictures, about {size(self.bytes)} of "
            f"{size(self.free)} free disk, {time or 'little time'}"
            + (f"; what was made before is removed: {', '.join(self.lost)}" if self.lost else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON."""
        stages_ = [
            {"name": r.name, "state": r.state.kind, "why": r.state.why, **vars(r.cost)}
            for r in self.rows
        ]  # fmt: skip
        return {
            "stages": stages_,
            "pictures": self.pictures,
            "bytes": self.bytes,
            "unknown": self.unknown,
            "lost": self.lost,
        }


def outlook(request: Request) -> Outlook:
    """What a run will do, without doing any of it.

    Raises `ReproductionError` when the disk has no room, and one line each for what is not there.
    """
    steps = stages(request)
    engine = Engine(request.out, steps)
    states, known = engine.states(), engine.recorded()
    stale: set[str] = set()
    rows = []
    for s in steps:
        state = states[s.name]
        if state.kind == "changed" or (state.kind == "waiting" and stale & set(s.needs)):
            stale.add(s.name)
        cost = Cost() if state.kind == "done" else s.cost(s.name in stale)
        rows.append(Row(s.name, s.what, state, cost, s.precious and s.name in stale and s.name in known))
    found = Outlook(tuple(rows), free_bytes(request.out))
    if found.bytes > found.free:
        raise ReproductionError(
            f"about {size(found.bytes)} are needed in {request.out}, and {size(found.free)} are free; "
            "make room or choose another --out"
        )
    return found


def reproduce(
    request: Request, *, report: Report = lambda what, done, total: None, say: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Do every stage that is not done; returns the names of those done now. Killed, the same call goes on.

    Leaves in `request.out` the ternary model, `pictures/`, `results/` and `report/`.
    """
    return Engine(request.out, stages(request)).run(report, say)


def summary(request: Request) -> list[dict[str, str]]:
    """One row a contender and suite, then sizes and times, as the last thing on the screen."""
    rows = []
    for suite in request.chosen_suites:
        for who, label in request.contenders.items():
            for run in read(_results(request, f"{suite}-{who}"), suite)[-1:]:
                paired = (run.get("paired") or {}).get("overall") or {}
                rows.append(
                    {
                        "suite": suite,
                        "model": label,
                        "overall": interval(run["scores"]["overall"]),
                        "difference": signed_interval(paired.get("difference")),
                        "kept": interval(paired.get("kept"), percent=True),
                        "PSNR (dB)": interval((run.get("fidelity") or {}).get("psnr"), digits=2),
                        "scored by": run["task"]["scored_by"],
                    }
                )
    return rows


def costs_line(request: Request) -> str:
    """Storage, memory and latency in one line."""
    run = read(_results(request, "cost"), "cost")[-1]
    stored, memory, latency = run["storage"], run["memory"], run["latency"]
    failed = "".join(f"; {name} could not be timed ({why})" for name, why in run["failed"].items())
    return (
        f"storage {size(stored['dense'])} -> {size(stored['ternary'])} ({stored['ratio']:.2f}x); weights on the device "
        f"{size(memory['dense'])} -> {size(memory['ternary'])} ({memory['ratio']:.2f}x); transformer "
        f"{latency['dense']:.2f} s -> {latency['ternary']:.2f} s a picture of {run['steps']} steps on {run['device']}"
        f"{failed}"
    )


def _results(request: Request, name: str) -> Path:
    return request.results / f"{name}.json"
