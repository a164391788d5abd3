"""Real processes that start in milliseconds: forks of one server that has imported torch, diffusers and transformers.

Importing those takes a fresh interpreter some ten seconds of a slow core. A fork is a process as good as another: it
has a PID, dies of SIGKILL, and imports tritflow itself. What only a fresh interpreter shows (which modules a command
imports, what libraries print meanwhile, torchrun's launcher) is tested with `subprocess`.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = [
    "numpy",
    "torch",
    "torch.distributed.fsdp",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.flux.pipeline_flux",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
]


class Forked:
    """One process; its output goes to files, so that nobody has to read along."""

    def __init__(self, process: ForkServerProcess, folder: tempfile.TemporaryDirectory[str]) -> None:
        self._process, self._folder = process, folder

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """The return code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send_signal(signal.SIGKILL)
            self._process.join()
            raise AssertionError(f"not done in {timeout} s: {self.stderr[-2000:]}")
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        """What was said so far."""
        return (Path(self._folder.name) / "1").read_text()

    @property
    def stderr(self) -> str:
        return (Path(self._folder.name) / "2").read_text()


def start(arguments: Sequence[object], env: Mapping[str, str] | None = None) -> Forked:
    """As `Popen([sys.executable, *arguments])` would: `-m MODULE ...`, `-c CODE ...` or `FILE ...`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    folder = tempfile.TemporaryDirectory(prefix="forked-")
    for name in "12":
        (Path(folder.name) / name).touch()
    words = [str(a) for a in arguments]
    process = context.Process(target=_begin, args=(words, dict(os.environ if env is None else env), folder.name))
    process.start()
    return Forked(process, folder)


def run(arguments: Sequence[object], env: Mapping[str, str] | None = None, timeout: float = 300) -> Forked:
    process = start(arguments, env)
    process.wait(timeout)
    return process


def run_ranks(arguments: Sequence[object], count: int, timeout: float = 300) -> list[Forked]:
    """`count` processes that find each other as torchrun's do; when one fails, the others have 5 s to end as well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(count):
        places = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        added = {name: str(value) for name, value in {**world, **places}.items()}
        ranks.append(start(arguments, {**os.environ, **added}))
    deadline = time.monotonic() + timeout
    while any(r.poll() is None for r in ranks):
        if any(r.poll() for r in ranks):
            deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.send_signal(signal.SIGKILL)
        time.sleep(0.02)
    return ranks


def torchrun(arguments: Sequence[object], count: int, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """`count` processes by torchrun's own launcher, and what they printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [*launch, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


def _begin(arguments: list[str], env: dict[str, str], folder: str) -> None:
    """In the fork: stand where a fresh interpreter stands before its first line."""
    for number in (1, 2):
        file = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(env)
    if "OMP_NUM_THREADS" in env:
        import torch

        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        sys.path.insert(0, os.getcwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")
