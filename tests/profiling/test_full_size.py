"""Quantizing and loading at real size, on a config that is none: every stage runs, resumes, and tells what it did."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tiny_config import CONFIG

from tritflow.formats.architecture import flux1_shapes
from tritflow.formats.errors import DiskFullError
from tritflow.formats.source import open_source
from tritflow.profiling import full_size

STAGES = ["write bf16", "quantize 2bit", "quantize base3", "load 2bit, to the GPU", "load base3, to the GPU"]
FIRST = STAGES[1]  # with nothing to read


def test_a_dense_folder_is_the_config_in_shards(tmp_path):
    size = full_size.write_dense(tmp_path / "dense", CONFIG, "cpu", shard_bytes=200_000)
    shards = list((tmp_path / "dense").glob("*.safetensors"))
    assert len(shards) > 1
    source = open_source(tmp_path / "dense")
    shapes = flux1_shapes(CONFIG)
    assert {n: tuple(s) for n, s in source.shapes().items()} == {n: tuple(s) for n, s in shapes.items()}
    assert sum(2 * torch.Size(s).numel() for s in shapes.values()) < size < 1.2 * sum(p.stat().st_size for p in shards)
    weight = source.tensor("single_transformer_blocks.0.proj_mlp.weight").float()
    assert weight.std().item() == pytest.approx(weight.shape[1] ** -0.5, rel=0.1)


@pytest.fixture(scope="module")
def stages_of(tmp_path_factory):
    """Runs, one after the other in one folder, each with what was said: a stage that cannot be, all, all again."""
    folder, runs = tmp_path_factory.mktemp("full-size"), []
    for stages in ([FIRST], STAGES, STAGES):
        said: list[str] = []
        run = full_size.bench(folder, config=CONFIG, device="cpu", stages=stages, say=said.append)
        runs.append((run, said))
    return folder, *runs


def test_stages_run_apart_and_are_not_run_twice(stages_of):
    _, _, (run, said), (again, said_again) = stages_of
    assert list(run["stages"]) == STAGES
    found = run["stages"]["quantize base3"]
    assert found["linears"] == 20
    assert found["ratio"] == pytest.approx(run["stages"]["write bf16"]["bytes"] / found["bytes"])
    assert all(result["seconds"] > 0 and result["peak_rss_bytes"] > 1e7 for result in run["stages"].values())
    assert len(said) == 5
    assert again["stages"] == run["stages"]
    assert not said_again
    assert "load base3, to the GPU" in full_size.table(run)


def test_a_stage_that_failed_is_run_again(stages_of):
    folder, (failed, _), (run, _), _ = stages_of
    assert "error" in failed["stages"][FIRST]
    assert FIRST in full_size.table(failed)
    assert run["stages"][FIRST]["seconds"] > 0
    assert "error" not in json.loads((folder / "stages.json").read_text())[FIRST]


def test_what_cannot_be_is_said_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="unknown stage 'fly'"):
        full_size.bench(tmp_path, stages=["fly"])
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match="the files take 35"):
        full_size.bench(tmp_path)
    assert not list(tmp_path.iterdir())
