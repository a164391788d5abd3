"""The GPU benchmark's course and its arithmetic; the measuring itself needs a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tritflow.profiling import kernels
from tritflow.profiling.isolate import Task

TIMES = {
    "fp8 row gauss fast": 100.0,
    "fp8 row trits fast": 90.0,
    "bf16 gauss": 180.0,
    "int_mm gauss": 200.0,
    "int8 hopper": 80.0,
    "fp8 hopper": 125.0,
    "bf16 hopper": 200.0,
}


def _answer(task: Task) -> dict[str, Any]:
    if task["kind"] == "check":
        return {"wrong": int(task["variant"] == "narrow"), "worst": 0.001}
    if task["kind"] == "gemm":
        times: dict[str, Any] = {name: {"p20": us, "p50": us, "p80": us} for name, us in TIMES.items()}
        return {"times": times | {"int8 broken": {"error": "does not run"}}}
    if task["kind"] == "skinny":
        return {"times": {"bf16 gauss": {"p50": 32.0}, "skinny, 4 warps": {"p50": 8.0}, "triton": {"p50": 16.0}}}
    return {"copy_tb_s": float("inf")} if task["kind"] == "ceilings" else {}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    seen: list[Task] = []

    def run(module: str, tasks: list[Task], *, on_result: Any, **_: Any) -> None:
        for task in tasks:
            seen.append(json.loads(json.dumps(task)))
            on_result(task, _answer(task))

    monkeypatch.setattr(kernels, "run_isolated", run)
    return seen


def test_only_what_is_right_is_timed(asked: list[Task], tmp_path: Path) -> None:
    records = kernels.probe(tmp_path, 60.0)
    timed = [task for task in asked if task["kind"] == "gemm"]
    assert [tuple(task["shape"]) for task in timed] == kernels.SHAPES
    for task in timed:
        assert "hopper" in task["variants"]["int8"]
        assert "narrow" not in task["variants"]["int8"]
    compiled = {(task["dtype"], task["variant"]) for task in asked if task["kind"] == "compile"}
    checked = {(task["dtype"], task["variant"]) for task in asked if task["kind"] == "check"}
    assert checked == compiled | {(kind, "hopper") for kind in ("int8", "fp8", "bf16")}
    assert json.loads((tmp_path / "kernels.json").read_text())[-1]["task"]["kind"] == "gemm"
    assert len(records) == len(asked)


def test_a_run_holds_ratios_and_means_and_no_infinity(
    asked: list[Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "A GPU")
    run = kernels.bench_gpu("cuda", 60.0, False, "a note", tmp_path)
    assert (run["device"], run["note"], run["quick"]) == ("A GPU", "a note", False)
    assert run["ceilings"]["copy_tb_s"] is None
    assert len(run["products"]) == len(kernels.SHAPES)
    ratios = run["products"]["4608x9216x3072"]["ratios"]
    assert ratios["int8 / fp8 row"] == pytest.approx(1.25)
    assert ratios["int8 / bf16"] == pytest.approx(2.25)
    assert ratios["w2a16 / bf16"] == pytest.approx(0.9)
    assert run["means"]["fp8 / fp8 row"] == pytest.approx(0.8)
    assert run["few_rows"]["1x18432x3072"]["fastest"] == "skinny, 4 warps"
    assert run["few_rows"]["1x18432x3072"]["ratios"] == {"w2a16 / bf16": 4.0}
    assert run["checks"]["int8 narrow"]["wrong"] == 1
    text = kernels.table((4608, 9216, 3072), run["products"]["4608x9216x3072"]["microseconds"])
    assert text.splitlines()[1].split()[:2] == ["int8", "hopper"]
    assert "does not run" in text


def test_a_part_alone_compiles_and_times_nothing_else(asked: list[Task], tmp_path: Path) -> None:
    kernels.probe(tmp_path, 60.0, parts=("first factor", "passes"))
    assert {task["kind"] for task in asked} == {"ceilings", "first factor", "passes"}
    asked.clear()
    kernels.probe(tmp_path, 60.0, parts=("16-bit products",))
    assert {task.get("dtype", "bf16") for task in asked} == {"bf16"}
    assert [tuple(task["shape"]) for task in asked if task["kind"] == "16 bits"] == kernels.SHAPES
    assert not [task for task in asked if task["kind"] == "gemm"]
    run = kernels.summarize([{"task": {"kind": "16 bits", "shape": [1, 2, 3]}, "result": {"times": {}}}])
    assert run["sixteen_bits"] == {"1x2x3": {"times": {}}}
    assert run["products"] == {}


def test_limits_are_no_products() -> None:
    us = {"bf16 gauss": 20.0, "triton": 12.0, "skinny, digits": 5.0}
    us |= {"limit, read": 3.0, "limit, read, 32 rows": 2.5, "limit, empty": 1.0}
    task = {"kind": "skinny", "shape": [1, 9216, 3072]}
    result = {"times": {name: {"p50": t} for name, t in us.items()}}
    (entry,) = kernels.summarize([{"task": task, "result": result}])["few_rows"].values()
    assert entry["fastest"] == "skinny, digits"
    assert entry["limits"] == {"read": 2.5, "empty": 1.0, "fastest": 5.0, "share": 0.5}
    assert entry["ratios"] == {"w2a16 / bf16": 4.0}
