"""The frame of the command: lazy verbs, one-line errors, exit codes that mean something."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import forked
import tritflow
from tritflow.cli import generate as generate_verb
from tritflow.cli.console import explain, share_the_cores
from tritflow.cli.main import VERBS, app
from tritflow.config import ConfigError
from tritflow.formats.errors import CheckpointError
from tritflow.pipelines.loading import DeviceError, ModelError


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `tritflow generate` raise what it is given."""

    def replace(error: BaseException) -> None:
        stub = typer.Typer()

        @stub.command()
        def generate() -> None:
            raise error

        monkeypatch.setattr(generate_verb, "app", stub)

    return replace


def test_help_lists_every_verb_that_is_there() -> None:
    shown = invoke("--help")
    assert shown.exit_code == 0
    for verb in ("generate", "compare", "demo"):
        assert verb in shown.stdout
        assert VERBS[verb].split()[0] in shown.stdout


@pytest.mark.parametrize("verb", ["generate", "compare", "demo"])
def test_every_verb_has_help_with_examples(verb: str) -> None:
    shown = invoke(verb, "--help")
    assert shown.exit_code == 0
    assert f"tritflow {verb} " in shown.stdout.split("Examples:")[1]
    assert "--json" in shown.stdout


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys; sys.argv = ['tritflow', '--help']\n"
        "from tritflow.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    assert invoke("--version").stdout.strip() == f"tritflow {tritflow.__version__}"


def test_an_unknown_verb_suggests_the_nearest() -> None:
    done = invoke("generat", "a star")
    assert done.exit_code == 2
    assert "generate" in done.stderr


def test_an_unknown_option_is_a_usage_error() -> None:
    done = invoke("generate", "a star", "--stps", "3")
    assert done.exit_code == 2
    assert "--steps" in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ModelError("no model 'x'"), 2, "error: no model 'x'"),
        (CheckpointError("damaged"), 2, "error: damaged"),
        (ConfigError("bad setting\nsecond line"), 2, "error: bad setting"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), 2, "a.txt"),
        (DeviceError("no CUDA"), 3, "error: no CUDA"),
        (MemoryError(), 3, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left"),
        (ValueError("from a library"), 1, "error: from a library"),
        (RuntimeError("odd"), 1, "RuntimeError: odd (this is a fault of tritflow"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(
    raising: Callable[[BaseException], None], error: BaseException, code: int, said: str
) -> None:
    raising(error)
    done = invoke("generate")
    assert done.exit_code == code
    assert said in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_debug_lets_the_traceback_through(raising: Callable[[BaseException], None]) -> None:
    raising(RuntimeError("odd"))
    done = invoke("--debug", "generate")
    assert isinstance(done.exception, RuntimeError)


def test_cuda_out_of_memory_is_known_by_its_name() -> None:
    error = type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 2 GiB")
    message, code = explain(error)
    assert code == 3
    assert "--batch-size" in message


def test_completion_knows_verbs_and_their_options() -> None:
    def complete(words: str) -> str:
        environment = {**os.environ, "_TRITFLOW_COMPLETE": "complete_bash", "COMP_WORDS": words}
        environment["COMP_CWORD"] = str(len(words.split(" ")) - 1)
        code = "import sys; sys.argv = ['tritflow']; from tritflow.cli.main import app; app(prog_name='tritflow')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
        return done.stdout

    assert "generate" in complete("tritflow gen").split()
    assert "--guidance" in complete("tritflow generate --gui").split()


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_interrupting_the_process_exits_130(tiny_flux: Path, tmp_path: Path) -> None:
    code = f"""
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit "ignore"
import tritflow.pipelines.generate as generation
from tritflow.cli.main import main

def slow(*_, **__):
    print("drawing", flush=True)
    time.sleep(100)

generation.generate = slow
sys.argv = ["tritflow", "generate", "a star", "-m", {str(tiny_flux)!r}, "-o", {str(tmp_path / "a.png")!r}]
main()
"""
    process = forked.start(["-c", code])
    try:
        deadline = time.monotonic() + 60
        while process.stdout != "drawing\n":
            assert process.poll() is None, process.stderr
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.stderr.strip() == "interrupted; the same command goes on where it can"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_spin_briefly_unless_the_user_decided(monkeypatch: pytest.MonkeyPatch, own: dict[str, str]) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    share_the_cores()
    expected = own or {"GOMP_SPINCOUNT": "1000"}
    assert {k: v for k, v in os.environ.items() if k in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} == expected


def test_the_command_does_not_import_torch_before_threads_are_told_how_to_wait() -> None:
    code = (
        "import os, sys; from tritflow.cli.main import _root; assert 'torch' not in sys.modules; "
        "_root(); print(os.environ['GOMP_SPINCOUNT'])"
    )
    clean = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert done.stdout == "1000\n", done.stderr


def test_a_file_where_a_folder_is_needed_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError) as caught:
        (tmp_path / "file").mkdir()
    message, code = explain(caught.value)
    assert code == 2
    assert "file is a file, where a folder is needed" in message
