"""Run a list of tasks in a child process that may crash or hang, and keep what the others found.

A faulty GPU kernel takes its whole process down, or never returns. The parent starts a child on all tasks, reads one
JSON line a task, and when the child dies or stays silent too long, notes the task it was at and starts a new child
on the rest.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Task = dict[str, Any]


def run_isolated(
    module: str,
    tasks: list[Task],
    *,
    silence: float,
    deadline: float,
    on_result: Callable[[Task, dict[str, Any]], None],
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run ``python -m MODULE --worker TASKS`` until every task has a result; see ``serve`` for the child's half.

    ``silence`` is how many seconds a task may take; past ``deadline`` (``time.monotonic()``) what is left is reported
    as skipped, and a task that runs is ended. A result is the child's dict, or {"error": one line}, which tells the
    two apart. ``environment`` is added to this process's.
    """
    todo = list(enumerate(tasks))
    while todo:
        if time.monotonic() > deadline:
            for _, task in todo:
                on_result(task, {"error": "skipped: out of time"})
            return
        done, broken, why = _one_child(module, todo, silence, deadline, on_result, environment)
        todo = [(i, t) for i, t in todo if i not in done]
        if broken is not None:
            on_result(tasks[broken], {"error": why})
            todo = [(i, t) for i, t in todo if i != broken]
        elif todo and not done:
            for _, task in todo:
                on_result(task, {"error": f"the child did nothing: {why}"})
            return


def run_side_by_side(
    module: str,
    tasks: list[Task],
    *,
    silence: float,
    deadline: float,
    on_result: Callable[[Task, dict[str, Any]], None],
    most: int = 14,
) -> None:
    """`run_isolated` in as many children at once as there are spare cores, `most` at the most: for tasks that mostly
    compile. Results come from several threads."""
    workers = max(1, min(most, len(tasks), (os.cpu_count() or 2) - 2))
    threads = [
        threading.Thread(
            target=run_isolated,
            args=(module, tasks[i::workers]),
            kwargs={"silence": silence, "deadline": deadline, "on_result": on_result},
        )
        for i in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _one_child(
    module: str,
    todo: list[tuple[int, Task]],
    silence: float,
    deadline: float,
    on_result: Callable[[Task, dict[str, Any]], None],
    environment: Mapping[str, str] | None,
) -> tuple[set[int], int | None, str]:
    tasks = dict(todo)
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as handle:
        json.dump(todo, handle)
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed below, it outlives the child
    child = subprocess.Popen(
        [sys.executable, "-m", module, "--worker", handle.name],
        stdout=subprocess.PIPE,
        stderr=log,
        text=False,
        env=None if environment is None else {**os.environ, **environment},
    )
    assert child.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(child.stdout, selectors.EVENT_READ)
    done: set[int] = set()
    current: int | None = None
    why = ""
    rest = b""
    began = time.monotonic()
    try:
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not selector.select(min(silence, left)):
                # The end of everybody's time says nothing about the task; its own limit does.
                own = time.monotonic() - began
                why = f"no answer within {silence:.0f} s" if left > silence else _out_of_time(own)
                break
            data = os.read(child.stdout.fileno(), 1 << 16)
            if not data:
                child.wait()
                log.seek(0)
                last = [line for line in log.read().splitlines() if line.strip()][-1:] or [""]
                why = f"the child ended with code {child.returncode}: {last[0][:300]}"
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"{"):
                    continue  # something a library printed
                message = json.loads(line)
                current, began = message["task"], time.monotonic()
                if "result" in message:
                    # At once: whoever stops this process still has what was found.
                    done.add(message["task"])
                    on_result(tasks[message["task"]], message["result"])
                    current = None
    finally:
        if child.poll() is None:
            child.kill()
        child.wait()
        log.close()
        Path(handle.name).unlink(missing_ok=True)
    return done, current, why


def _out_of_time(seconds: float) -> str:
    return (
        f"stopped after {seconds:.0f} s: the time given for everything was up, so nothing is known about it; give more"
    )


def serve(path: str, handle: Callable[[Task], dict[str, Any]]) -> None:
    """The child's half: say which task begins, run it, say what came out; an exception is a result."""
    for index, task in json.loads(Path(path).read_text()):
        print(json.dumps({"task": index}), flush=True)
        try:
            result = handle(task)
        except Exception as error:  # the point of a probe is to go on
            text = " | ".join(line.strip() for line in str(error).splitlines() if line.strip())
            result = {"error": f"{type(error).__name__}: {text[-400:]}"}
        print("\n" + json.dumps({"task": index, "result": result}), flush=True)
