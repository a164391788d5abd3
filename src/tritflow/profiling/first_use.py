"""What a process pays before its first picture: fresh processes, with an empty cache of kernels and with a filled one.

Each stage is a child process with a time limit of its own that may die without taking the others with it, and what a
stage found before it died stays in the result, with its error. With FLUX.1-dev's configs and random weights in place
of a model, the first stage writes their folder (13 GB), so that loading is that of a real folder, from the page cache.

``python -m tritflow.profiling.first_use`` is what ``tritflow bench end-to-end --random`` runs.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tritflow import results
from tritflow.profiling.isolate import Task, run_isolated, serve
from tritflow.profiling.room import check_room

MODULE = "tritflow.profiling.first_use"
WRITE, FIRST, SECOND = "write", "first process", "second process"
SILENCE = {WRITE: 120.0, FIRST: 240.0, SECOND: 120.0}
"""Seconds that a stage may take."""
_ROOM = 17_000_000_000  # the folder, and the transformer's parts once more while they become one file


def run_stage(task: Task) -> dict[str, Any]:
    """One stage, in a process of its own."""
    from tritflow.pipelines import synthetic_pipeline

    begin = time.perf_counter()
    if task["stage"] == WRITE:
        size = synthetic_pipeline.write_random_pipeline(Path(task["model"]), task["writer"], task.get("parts"))
        return {"seconds": time.perf_counter() - begin, "bytes": size}
    from tritflow.profiling.end_to_end import measure

    kept = Path(task["kept"])

    def keep(run: dict[str, Any]) -> None:
        if "first" in run and "until_first_picture_seconds" not in run:
            run["until_first_picture_seconds"] = time.time() - task["asked"]
        results.write_atomically(kept, json.dumps(run).encode())

    import tritflow.pipelines.loading

    tritflow.pipelines.loading.pick_device(task["device"])  # a missing device is told before anything is read
    run = measure(
        task["model"],
        base=task["base"],
        device=task["device"],
        dtype=task["dtype"],
        mode=task["mode"],
        backend=task["backend"],
        optimized=task["optimized"],
        num_inference_steps=task["steps"],
        rounds=task["rounds"],
        deadline=time.monotonic() + task["patience"],
        keep=keep,
    )
    return {"seconds": time.time() - task["asked"], "run": run}


def bench(
    model: str | Path | None,
    workdir: Path | None = None,
    *,
    base: str | Path | None = None,
    device: str = "cuda",
    dtype: str | None = None,
    mode: str | None = None,
    backend: str | None = None,
    optimized: bool = False,
    num_inference_steps: int | None = None,
    rounds: int = 5,
    seconds: float = 400.0,
    note: str = "",
    parts: Any = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Draw in a first process, whose cache of compiled kernels is empty, and in a second one, which finds it filled.

    Args:
        model: a folder, hub id or built-in name; None for FLUX.1-dev's configs with random weights.
        workdir: for the random model's folder, which a later call uses again, and the cache; default: temporary.
        base, device, dtype, mode, backend, optimized, num_inference_steps, rounds: as in `end_to_end.measure`; the
            second process draws one picture after its first.
        seconds: for everything; stages that have not begun by then are skipped, one that runs is ended.
        note: kept in the results.
        parts: of the random pipeline, see `synthetic_pipeline.components`.
        say: told each stage's end in a line.

    Returns:
        The first process's run for `tritflow.results`, topic `end-to-end`, see `end_to_end.measure`, with
        `until_first_picture_seconds` from the process's start, `second_process` with the same of the second one, and
        `stages`: seconds of each stage, or its `error`. What a stage found before it died is there.

    Raises:
        DiskFullError: no room for the random folder.
    """
    deadline = time.monotonic() + seconds
    with _folder(workdir) as folder:
        place = str(model) if model is not None else str(folder / "random")
        found: dict[str, Any] = {}
        runs: dict[str, Any] = {}

        def note_it(task: Task, result: dict[str, Any]) -> None:
            stage = task["stage"]
            runs[stage] = result.pop("run", None)
            found[stage] = result
            say(f"{stage}: {result.get('error') or '{:.1f} s'.format(result['seconds'])}")

        if model is None and not (folder / "random" / "model_index.json").is_file():
            check_room(folder, _ROOM, "the random model's files")
        common: Task = {
            "model": place,
            "base": None if base is None else str(base),
            "device": device,
            "dtype": dtype,
            "mode": mode,
            "backend": backend,
            "optimized": optimized,
            "steps": num_inference_steps,
        }
        # A cache of this call's own: what other processes compiled would flatter the first use.
        cache = Path(tempfile.mkdtemp(prefix="kernels-", dir=folder))
        environment = {name: str(cache / name) for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")}
        for stage in (WRITE, FIRST, SECOND):
            if stage == WRITE and model is not None:
                continue
            if stage != WRITE and "error" in found.get(WRITE, {}):
                found[stage] = {"error": "skipped: there is no model to draw with"}
                continue
            kept = folder / f"{stage.replace(' ', '-')}.json"
            kept.unlink(missing_ok=True)
            patience = min(SILENCE[stage], deadline - time.monotonic())
            task = {**common, "stage": stage, "kept": str(kept), "asked": time.time()}
            task |= {"rounds": rounds if stage == FIRST else 1, "patience": 0.6 * patience}
            task |= {"writer": device, "parts": parts}
            run_isolated(
                MODULE, [task], silence=SILENCE[stage], deadline=deadline, on_result=note_it, environment=environment
            )
            if runs.get(stage) is None and kept.is_file():
                runs[stage] = json.loads(kept.read_text())
        shutil.rmtree(cache, ignore_errors=True)
    return _joined(runs, found, model, device, note)


def _joined(
    runs: dict[str, Any], stages: dict[str, Any], model: str | Path | None, device: str, note: str
) -> dict[str, Any]:
    from tritflow.pipelines.synthetic_pipeline import RANDOM

    source = results.provenance(device if device == "cpu" or torch.cuda.is_available() else "cpu")
    run = {**(runs.get(FIRST) or {}), **source}  # the command and the time are the parent's
    run["model"] = RANDOM if model is None else Path(model).name
    second = runs.get(SECOND) or {}
    names = ("load_seconds", "first", "first_picture_steps", "until_first_picture_seconds")
    run["second_process"] = {name: second[name] for name in names if name in second}
    return {**run, "stages": stages, "note": note}


@contextlib.contextmanager
def _folder(workdir: Path | None) -> Iterator[Path]:
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        yield workdir.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="tritflow-end-to-end-") as folder:
        yield Path(folder)


if __name__ == "__main__":
    if sys.argv[1:2] != ["--worker"]:
        raise SystemExit("this is the child's half of `tritflow bench end-to-end`; run that")
    serve(sys.argv[2], run_stage)
