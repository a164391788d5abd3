"""Many measuring commands on borrowed GPUs within a stated time, going on where they stopped.

A campaign is a TOML file: jobs in order of worth, each one command with the seconds it is expected to take. Every free
GPU takes the next job that still fits into the time; a job that must not be disturbed (a timing) waits until all GPUs
are idle and has the machine to itself. What a job prints is kept in `WORKDIR/NAME.log`, how it ended in
`WORKDIR/campaign.json`, written after every change, so a killed campaign goes on with what is not done. What a job made
that must not be lost with the machine is packed at once, and nothing else with it: `WORKDIR/kept/NAME.tar`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from importlib import resources
from pathlib import Path
from typing import Any

from tritflow.config import nearest
from tritflow.formats.atomic import write_atomic

# Seconds between looks at the running jobs, and what a job gets to end by itself before it is killed.
TICK, GRACE = 0.05, 5.0
# A job is killed after this many times its expected seconds unless it says so itself.
PATIENCE = 2.0
STATE, KEPT = "campaign.json", "kept"
# How a job can have ended; the first is never run again.
DONE, FAILED, LATE, CUT = "done", "failed", "late", "cut"


class CampaignError(ValueError):
    """A campaign's file, or what was asked of it, is wrong. Says which line and what to do."""


@dataclass(frozen=True)
class Job:
    """One command of a campaign.

    Attributes:
        name: unique; names the log.
        command: as typed in a shell, without a shell's features; `{results}`, `{workdir}` and `{gpus}` are filled in.
        seconds: expected, on one of the campaign's machines.
        limit: seconds after which it is killed (0: twice the expected ones).
        gpus: how many it takes, 0 for a command of the processor alone.
        alone: nothing else runs meanwhile.
        after: names of jobs that must be done before.
        keep: files and folders to pack when it is done; `{workdir}` is filled in.
        environment: variables it sees beside the campaign's own.
    """

    name: str
    command: str
    seconds: float
    limit: float = 0.0
    gpus: int = 1
    alone: bool = False
    after: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def patience(self) -> float:
        """Seconds after which it is killed."""
        return self.limit or PATIENCE * self.seconds


def campaign_names() -> list[str]:
    """Campaigns of the package, sorted."""
    folder = resources.files(__package__) / "campaigns"
    return sorted(e.name.removesuffix(".toml") for e in folder.iterdir() if e.name.endswith(".toml"))


def load_campaign(name: str | Path) -> tuple[str, list[Job]]:
    """The summary and the jobs of a campaign of the package, or of any .toml file by its path.

    Raises:
        CampaignError: no such campaign (the nearest is named), not TOML, or a job that is not one.
    """
    name = str(name)
    if name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise CampaignError(f"{name}: {error.strerror or error}") from None
    elif name in campaign_names():
        text = (resources.files(__package__) / "campaigns" / f"{name}.toml").read_text(encoding="utf-8")
    else:
        names = campaign_names()
        raise CampaignError(f"there is no campaign '{name}'{nearest(name, names)} (there are: {', '.join(names)})")
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise CampaignError(f"campaign {name} is not TOML: {error}") from None
    jobs = [_job(entry, i) for i, entry in enumerate(data.get("job", []))]
    if not jobs:
        raise CampaignError(f"campaign {name} has no [[job]]")
    seen: set[str] = set()
    for job in jobs:
        if job.name in seen:
            raise CampaignError(f"campaign {name}: two jobs are called '{job.name}'")
        for other in job.after:
            if other not in seen:
                raise CampaignError(f"campaign {name}: job '{job.name}' is after '{other}', which no job above it is")
        seen.add(job.name)
    return str(data.get("summary", "")), jobs


def _job(entry: dict[str, Any], number: int) -> Job:
    known = [f.name for f in fields(Job)]
    for key in entry:
        if key not in known:
            raise CampaignError(f"job {number + 1}: unknown setting '{key}'{nearest(key, known)}")
    for key in ("name", "command", "seconds"):
        if key not in entry:
            raise CampaignError(f"job {number + 1} ('{entry.get('name', '?')}') has no '{key}'")
    job = Job(**entry | {key: tuple(entry.get(key, ())) for key in ("after", "keep")})
    if not job.seconds > 0 or job.gpus < 0 or job.limit < 0:
        raise CampaignError(f"job '{job.name}': seconds must be positive, limit and gpus not negative")
    try:
        empty = not shlex.split(job.command)
    except ValueError as error:
        raise CampaignError(f"job '{job.name}': {error} in its command") from None
    if empty:
        raise CampaignError(f"job '{job.name}' has an empty command")
    if "/" in job.name or job.name.startswith("."):
        raise CampaignError(f"job '{job.name}': a name is also a file's, so without '/' and not beginning with '.'")
    return job


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    gpus: list[int]
    begin: float
    killed: str | None = None


class Campaign:
    """Runs jobs over GPUs; see the module.

    Args:
        jobs: in order of worth.
        workdir: logs and state; a campaign that was there before goes on.
        results: folder that `{results}` names.
        gpus: numbers of the GPUs to use.
        again: run jobs again that failed or were too late the last time.
        tell: called with a line for every job that begins or ends.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        workdir: Path,
        results: Path,
        gpus: Sequence[int],
        *,
        again: bool = False,
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.jobs, self.workdir, self.results, self.gpus = list(jobs), workdir, results, list(gpus)
        self.tell, self.running = tell, list[_Running]()
        for job in self.jobs:
            if job.gpus > len(self.gpus):
                tell(f"{job.name}: needs {job.gpus} GPUs, {len(self.gpus)} given; left out")
        workdir.mkdir(parents=True, exist_ok=True)
        self.state: dict[str, dict[str, Any]] = self._kept()
        if again:
            self.state = {k: v for k, v in self.state.items() if v["how"] == DONE}

    def _kept(self) -> dict[str, dict[str, Any]]:
        path = self.workdir / STATE
        if not path.exists():
            return {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))["jobs"]
            # A changed command is another job; what other calls ran stays.
            commands = {job.name: job.command for job in self.jobs}
            return {n: s for n, s in kept.items() if commands.get(n, s["command"]) == s["command"] and s["how"] != CUT}
        except (ValueError, KeyError, TypeError):
            raise CampaignError(f"{path} is not a campaign's state; delete it to begin anew") from None

    def _note(self, job: Job, how: str, seconds: float, code: int | None) -> None:
        self.state[job.name] = {"command": job.command, "how": how, "seconds": round(seconds, 1), "code": code}
        data = {"jobs": self.state}
        write_atomic(self.workdir / STATE, (json.dumps(data, indent=1) + "\n").encode())
        self.tell(f"{job.name}: {how} after {seconds:.0f} s" + (f", exit code {code}" if code else ""))

    def waiting(self) -> list[Job]:
        """Jobs that can still run here, in order."""
        busy = {r.job.name for r in self.running}
        left = [j for j in self.jobs if j.name not in self.state and j.name not in busy]
        broken = {n for n, s in self.state.items() if s["how"] in (FAILED, LATE)}
        can = []
        for job in left:
            if job.gpus > len(self.gpus) or broken & set(job.after):
                broken.add(job.name)
            else:
                can.append(job)
        return can

    def run(self, seconds: float) -> dict[str, dict[str, Any]]:
        """Run what fits into `seconds`; returns how each job ended, {name: {how, seconds, code, command}}."""
        end = time.monotonic() + seconds
        try:
            while True:
                self._reap(end)
                started = self._start(end)
                if not self.running and not started:
                    return self.state
                time.sleep(TICK)
        finally:
            for r in self.running:
                self._stop(r)
                self._note(r.job, CUT, time.monotonic() - r.begin, None)
            self.running.clear()

    def _start(self, end: float) -> bool:
        now, any_started = time.monotonic(), False
        for job in self.waiting():
            if any(r.job.alone for r in self.running):
                break
            if now + job.seconds > end or any(self.state.get(a, {}).get("how") != DONE for a in job.after):
                continue
            free = [g for g in self.gpus if all(g not in r.gpus for r in self.running)]
            if (job.alone and self.running) or len(free) < job.gpus:
                break  # its turn comes before that of the jobs below it
            self._launch(job, free[: job.gpus])
            any_started = True
        return any_started

    def _launch(self, job: Job, gpus: list[int]) -> None:
        command = job.command
        for name, value in (("results", self.results), ("workdir", self.workdir), ("gpus", len(gpus))):
            command = command.replace(f"{{{name}}}", shlex.quote(str(value)))
        words = shlex.split(command)
        if words[0] in ("tritflow", "python"):
            # Of this environment, whatever lies first on the path.
            words[:1] = [sys.executable] if words[0] == "python" else [sys.executable, "-m", "tritflow.cli.main"]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))} | job.environment
        self.tell(f"{job.name}: begins on {'GPU ' + ', '.join(map(str, gpus)) if gpus else 'the processor'}")
        with (self.workdir / f"{job.name}.log").open("ab") as log:
            try:
                process = subprocess.Popen(
                    words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
                )
            except OSError as error:
                log.write(f"{words[0]}: {error.strerror}\n".encode())
                self._note(job, FAILED, 0.0, 127)
                return
        self.running.append(_Running(job, process, gpus, time.monotonic()))

    def _reap(self, end: float) -> None:
        for r in list(self.running):
            code, taken = r.process.poll(), time.monotonic() - r.begin
            if code is not None:
                if code == 0 and r.job.keep:
                    self._pack(r.job)
                self._note(r.job, DONE if code == 0 else FAILED, taken, code)
            elif taken > r.job.patience:
                self._stop(r)
                self._note(r.job, LATE, taken, None)
            elif time.monotonic() > end:
                self._stop(r)
                self._note(r.job, CUT, taken, None)
            else:
                continue
            self.running.remove(r)

    def _pack(self, job: Job) -> None:
        """Keep what a job made, under its path inside of the working folder where it lies there."""
        packed = self.workdir / KEPT / f"{job.name}.tar"
        packed.parent.mkdir(exist_ok=True)
        unfinished = packed.with_suffix(".tmp")
        paths = [Path(name.replace("{workdir}", str(self.workdir))) for name in job.keep]
        with tarfile.open(unfinished, "w") as archive:
            for path in filter(Path.exists, paths):
                inside = path.relative_to(self.workdir) if path.is_relative_to(self.workdir) else Path(path.name)
                archive.add(path, inside)
        os.replace(unfinished, packed)
        missing = ", ".join(str(path) for path in paths if not path.exists())
        self.tell(
            f"{job.name}: {packed.stat().st_size / 1e6:.1f} MB kept in {packed}"
            + (f"; not there: {missing}" if missing else "")
        )

    def _stop(self, r: _Running) -> None:
        """End a job and all that it started."""
        for way in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(r.process.pid, way)
                r.process.wait(GRACE)
            except ProcessLookupError:
                return
            except subprocess.TimeoutExpired:
                continue
