"""The bench in fresh processes, on a pipeline of FLUX.1-dev's kind and none of its size: stages, and what is left."""

from __future__ import annotations

import json
import shutil

import pytest

from tritflow.formats.errors import DiskFullError
from tritflow.pipelines import synthetic_pipeline
from tritflow.profiling import end_to_end, first_use
from tritflow.results import canonical

SMALL = {
    "text_encoder": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "text_encoder_2": {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "transformer": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "axes_dims_rope": [16, 24, 24],
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
    },
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1, "norm_num_groups": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The random folder, written beforehand with settings that a CPU can draw with."""
    parts = tuple(
        (name, kind, library, cls, config | SMALL[name])
        for name, kind, library, cls, config in synthetic_pipeline.components()
    )
    out = tmp_path_factory.mktemp("first-use")
    synthetic_pipeline.write_random_pipeline(out / "random", "cpu", parts)
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}
    (out / "random" / "generation.json").write_text(json.dumps(settings))
    return out


@pytest.fixture
def here(monkeypatch):
    """Stages in this process, since importing everything in three children takes a while; an error is one line."""

    def run(module, tasks, *, on_result, environment, **limits):
        assert module == first_use.MODULE
        assert set(environment) == {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}
        for task in tasks:
            try:
                result = first_use.run_stage(json.loads(json.dumps(task)))
            except Exception as error:
                result = {"error": str(error)}
            on_result(task, result)

    real = first_use.run_isolated
    monkeypatch.setattr(first_use, "run_isolated", run)
    return real


def test_two_processes_draw(folder, here):
    said = []
    run = first_use.bench(
        None, folder, device="cpu", dtype="bfloat16", mode="w2a8", optimized=True, rounds=2, say=said.append
    )
    assert run["model"] == synthetic_pipeline.RANDOM
    assert run["optimized"]
    assert set(run["stages"]) == {"write", "first process", "second process"}
    assert all("error" not in stage for stage in run["stages"].values()), run["stages"]
    assert run["rounds"] == 2
    assert run["later"]["total"]["p50"] > 0
    assert run["until_first_picture_seconds"] > run["load_seconds"] + run["first"]["total"]
    assert run["second_process"]["first"]["total"] > 0
    assert run["second_process"]["until_first_picture_seconds"] > 0
    canonical(run)  # can be stored
    assert "a second process" in end_to_end.table(run)
    assert len(said) == 3
    assert not list(folder.glob("kernels-*"))


def test_what_was_found_before_a_stage_died_is_kept(folder, here, monkeypatch):
    """A real child finds the folder written; the first process dies after loading; the second one draws."""
    in_this_process, calls = first_use.run_isolated, []

    def some(module, tasks, **options):
        (task,) = tasks
        calls.append(task["stage"])
        if task["stage"] == "first process":
            run = {"load_seconds": 1.0, "optimized": False, "settings": {"height": 64, "width": 64}}
            run["settings"]["num_inference_steps"] = 2
            (folder / "first-process.json").write_text(json.dumps(run))
            options["on_result"](task, {"error": "no answer within 240 s"})
        else:
            (here if task["stage"] == "write" else in_this_process)(module, tasks, **options)

    monkeypatch.setattr(first_use, "run_isolated", some)
    run = first_use.bench(None, folder, device="cpu", dtype="bfloat16", rounds=1, say=lambda _: None)
    assert calls == ["write", "first process", "second process"]
    assert run["stages"]["write"]["bytes"] > 1000
    assert run["stages"]["first process"] == {"error": "no answer within 240 s"}
    assert run["load_seconds"] == 1.0
    assert "later" not in run
    assert run["second_process"]["first"]["total"] > 0
    assert "first process: no answer within 240 s" in end_to_end.table(run)


def test_a_failing_stage_is_named(tmp_path, here):
    run = first_use.bench(tmp_path / "nothing", tmp_path, device="cpu", say=lambda _: None)
    assert "no model" in run["stages"]["first process"]["error"]
    assert "no model" in end_to_end.table(run)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(DiskFullError, match=r"files take 17\.0 GB.*--workdir"):
            first_use.bench(None, tmp_path / "other", device="cpu")
