"""`tritflow bench` from the command line to the results file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tritflow import results
from tritflow.cli.main import app
from tritflow.profiling import cpu, latency, storage


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "LARGE", cpu.Product(8, 48, 64))
    monkeypatch.setattr(cpu, "small_step", lambda batch: [cpu.Product(batch, 16, 32)])


def test_help_shows_the_three_benches_with_examples() -> None:
    shown = invoke("bench", "--help")
    assert shown.exit_code == 0
    for word in ("kernels", "latency", "storage", "end-to-end", "tritflow bench storage --full-size"):
        assert word in shown.stdout
    for verb in ("kernels", "latency", "storage", "full-size", "transformer", "lora", "memory", "end-to-end"):
        shown = invoke("bench", verb, "--help")
        assert shown.exit_code == 0
        assert f"tritflow bench {verb}" in shown.stdout
        assert "--results" in shown.stdout


@pytest.mark.usefixtures("quick")
def test_kernels_prints_stores_and_speaks_json(tmp_path: Path) -> None:
    done = invoke("bench", "kernels", "--seconds", 0.02, "--results", tmp_path, "--note", "a test")
    assert done.exit_code == 0, done.stderr
    assert "64 -> 48, 8 tokens" in done.stdout
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("kernels-cpu-")
    (run,) = results.read(file, "kernels-cpu")
    assert run["note"] == "a test"
    done = invoke("bench", "kernels", "--seconds", 0.02, "--json")
    assert len(json.loads(done.stdout)["comparisons"]) == 3


def test_no_gpu_is_one_line_and_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for verb in ("kernels", "latency"):
        done = invoke("bench", verb, "--device", "cuda")
        assert done.exit_code == 3
        assert len(done.stderr.splitlines()) == 1
        assert "--device cpu" in done.stderr
    for verb in ("transformer", "lora", "memory", "tune", "attention"):
        done = invoke("bench", verb)
        assert done.exit_code == 3
        assert "sees no CUDA device here" in done.stderr


def test_gpu_kernels_store_what_the_probe_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tritflow.profiling import kernels

    def probe(out: Path, seconds: float, quick: bool, parts: tuple[str, ...]) -> list[dict[str, Any]]:
        print("running account")
        assert (seconds, quick, parts) == (240.0, True, kernels.DEFAULT_PARTS)
        times = {"bf16 gauss": {"p50": 3.0}, "bf16 hopper": {"p50": float("nan")}}
        return [{"task": {"kind": "gemm", "shape": [1, 2, 3]}, "result": {"times": times}}]

    monkeypatch.setattr(kernels, "probe", probe)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "A GPU")
    done = invoke("bench", "kernels", "--device", "cuda", "--quick", "--json", "--results", tmp_path)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["products"]["1x2x3"]["ratios"] == {"w2a16 / bf16": None}
    assert "running account" in done.stderr
    assert (tmp_path / "kernels-cuda-a-gpu.json").exists()


def test_attention_passes_what_was_asked_and_stores_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tritflow.profiling import attention

    def bench(shapes: list[tuple[int, int, int]], note: str, say: Any) -> dict[str, Any]:
        say("running account")
        assert shapes == [(1536, 24, 64), (4608, 24, 64)]
        return {"device": "A GPU", "note": note, "attention": []}

    monkeypatch.setattr(attention, "bench", bench)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    args = ("--tokens", 1536, "--tokens", 4608, "--features", 64, "--note", "a test", "--json", "--results", tmp_path)
    done = invoke("bench", "attention", *args)
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["note"] == "a test"
    assert "running account" in done.stderr
    assert (tmp_path / "attention-a-gpu.json").exists()


def test_latency_passes_what_was_asked_and_stores_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def measure(dense: str, ternary: str, **settings: Any) -> list[dict[str, Any]]:
        asked.update(settings, dense=dense, ternary=ternary)
        ms = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
        row = {"label": "W2A8 bf16, batch 2", "milliseconds": ms, "speed": 1.5, "resident_bytes": 10, "rounds": 3}
        sizes = {"height": 128, "width": 128, "num_inference_steps": 28}
        return [{**results.provenance(), **row, "threads": 1, "load_before": 0.1, "settings": sizes}]

    monkeypatch.setattr(latency, "measure", measure)
    done = invoke(
        "bench", "latency", "--batch-size", 2, "--rounds", 3, "--results", tmp_path, "--dense", "A", "--ternary", "B"
    )
    assert done.exit_code == 0, done.stderr
    assert (asked["dense"], asked["ternary"], asked["batch_sizes"], asked["rounds"]) == ("A", "B", [2], 3)
    assert "W2A8 bf16, batch 2" in done.stdout
    (file,) = tmp_path.iterdir()
    assert results.read(file, "latency-cpu")[0]["speed"] == 1.5


def test_an_unknown_model_is_one_line() -> None:
    done = invoke("bench", "latency", "--dense", "smal")
    assert done.exit_code == 2
    assert "did you mean 'small'" in done.stderr


def test_storage_measures_the_small_flux_and_the_proof_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path | None] = []

    def full_size(workdir: Path | None, progress: Any) -> list[dict[str, Any]]:
        asked.append(workdir)
        return [{**results.provenance(), "label": "big", "bytes": 5, "ratio": 2.0}]

    monkeypatch.setattr(storage, "full_size", full_size)
    done = invoke("bench", "storage", "--json")
    assert done.exit_code == 0, done.stderr
    assert [r["label"] for r in json.loads(done.stdout)] == [f"small FLUX, {n}" for n in ("bf16", "2-bit", "base-3")]
    assert asked == []
    done = invoke("bench", "storage", "--full-size", "--workdir", tmp_path, "--results", tmp_path / "results")
    assert asked == [tmp_path]
    assert "big" in done.stdout
    (file,) = (tmp_path / "results").iterdir()
    assert len(results.read(file, "storage")) == 4
