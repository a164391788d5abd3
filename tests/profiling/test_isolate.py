"""One bad task must not take the others with it."""

import os
import textwrap
import time
from pathlib import Path

import pytest

import tritflow
from tritflow.profiling.isolate import run_isolated, run_side_by_side

WORKER = """
import os, sys, time
from tritflow.profiling.isolate import serve

def handle(task):
    if task["do"] == "crash":
        os._exit(11)
    if task["do"] == "hang":
        time.sleep(60)
    if task["do"] == "raise":
        raise ValueError("bad\\n  luck")
    if task["do"] == "environment":
        return {"stays": os.environ["STAYS"], "added": os.environ["ADDED"]}
    print("a library's chatter")
    return {"square": task["x"] ** 2}

serve(sys.argv[2], handle)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "probe_worker.py").write_text(textwrap.dedent(WORKER))
    root = Path(tritflow.__file__).parents[1]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(root)]))
    return "probe_worker"


def test_crash_hang_and_error_are_results(worker):
    tasks = [
        {"do": "square", "x": 3},
        {"do": "raise"},
        {"do": "crash"},
        {"do": "square", "x": 4},
        {"do": "hang"},
        {"do": "square", "x": 5},
    ]
    found = []
    run_isolated(
        worker,
        tasks,
        silence=3,
        deadline=time.monotonic() + 50,
        on_result=lambda task, result: found.append((task["do"], result)),
    )
    assert len(found) == len(tasks)
    assert [r["square"] for d, r in found if d == "square"] == [9, 16, 25]
    by_kind = dict(found)
    assert by_kind["raise"]["error"] == "ValueError: bad | luck"
    assert "code 11" in by_kind["crash"]["error"]
    assert "no answer within 3 s" in by_kind["hang"]["error"]


def test_the_end_of_all_time_is_not_taken_for_a_hanging_task(worker):
    found = []
    run_isolated(
        worker,
        [{"do": "hang"}, {"do": "square", "x": 1}],
        silence=200,
        deadline=time.monotonic() + 8,
        on_result=lambda task, result: found.append(result["error"]),
    )
    assert found[0].startswith("stopped after ")
    assert "no answer" not in found[0]
    assert int(found[0].split()[2]) <= 8
    assert found[1] == "skipped: out of time"


def test_the_environment_is_added_to(worker, monkeypatch):
    monkeypatch.setenv("STAYS", "here")
    found = []
    run_isolated(
        worker,
        [{"do": "environment"}],
        silence=30,
        deadline=time.monotonic() + 30,
        on_result=lambda task, result: found.append(result),
        environment={"ADDED": "too"},
    )
    assert found == [{"stays": "here", "added": "too"}]


def test_out_of_time_is_said(worker):
    found = []
    run_isolated(
        worker,
        [{"do": "square", "x": 1}],
        silence=3,
        deadline=time.monotonic() - 1,
        on_result=lambda task, result: found.append(result),
    )
    assert found == [{"error": "skipped: out of time"}]


def test_a_child_that_cannot_start_is_said(monkeypatch):
    found = []
    run_isolated(
        "no_such_module_at_all",
        [{"do": "square", "x": 1}],
        silence=20,
        deadline=time.monotonic() + 20,
        on_result=lambda task, result: found.append(result),
    )
    assert "No module named" in found[0]["error"]


def test_children_at_once_answer_every_task(worker, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)  # two children
    tasks = [{"do": "square", "x": x} for x in range(5)] + [{"do": "crash"}]
    found = []
    run_side_by_side(
        worker,
        tasks,
        silence=30,
        deadline=time.monotonic() + 100,
        on_result=lambda task, result: found.append((task.get("x"), result)),
    )
    assert sorted(r["square"] for x, r in found if x is not None) == [0, 1, 4, 9, 16]
    assert "error" in dict(found)[None]
