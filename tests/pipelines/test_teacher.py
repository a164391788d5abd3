import dataclasses

import pytest
import torch
from diffusers import FluxPipeline

from tritflow.calibration.artifacts import file_sha256
from tritflow.calibration.trajectories import Trajectories, TrajectoryError
from tritflow.config import CalibrationConfig
from tritflow.distillation.sharded import Ranks
from tritflow.pipelines.teacher import TeacherError, _plan, _Recorder, record_trajectories

PROMPTS = ["a red cube", "a blue circle on a square", "two stars", "three hearts", "a cross"]
CONFIG = CalibrationConfig(num_inference_steps=3, batch_size=2, guidance_scales=(1.5, 3.5, 4.5), seed=0)


@pytest.fixture(scope="module")
def pipe(tiny_flux):
    pipe = FluxPipeline.from_pretrained(tiny_flux)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_jitter_it_is_the_stock_pipeline(tiny_flux, dtype):
    pipe = FluxPipeline.from_pretrained(tiny_flux, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    config = dataclasses.replace(CONFIG, timestep_jitter=0.0, guidance_scales=(3.5,))
    sizes = {"height": 32, "width": 48, "max_sequence_length": 16}
    recorder = _Recorder(pipe, config, sizes, dtype, dtype, torch.device("cpu"))
    from tritflow.calibration.prompts import Prompt

    plans = [_plan(i, Prompt(t, "x"), config) for i, t in enumerate(PROMPTS[:2])]
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
    expected = pipe(
        PROMPTS[:2], latents=recorder._noise(plans), num_inference_steps=3, output_type="latent", **sizes
    ).images
    hook.remove()
    steps, trajectory = recorder.run(plans)
    assert torch.equal(recorder.last, expected)
    for i, kwargs in enumerate(seen):
        assert torch.equal(steps["hidden_states"][:, i], kwargs["hidden_states"])
        assert torch.equal(steps["timestep"][:, i], kwargs["timestep"])
        assert torch.equal(trajectory["guidance"], kwargs["guidance"])
        assert torch.equal(trajectory["encoder_hidden_states"], kwargs["encoder_hidden_states"])
        assert torch.equal(trajectory["pooled_projections"], kwargs["pooled_projections"])
        assert torch.equal(recorder.shared()["img_ids"], kwargs["img_ids"])
        assert torch.equal(recorder.shared()["txt_ids"], kwargs["txt_ids"])


def test_stored_pairs_are_exact(pipe, tmp_path):
    data = record_trajectories(pipe, PROMPTS, tmp_path / "t", CONFIG)
    assert data.count == 5
    assert data.steps == 3
    batch = data.pairs(torch.arange(15), "all")
    with torch.no_grad():
        velocity = pipe.transformer(**batch.kwargs, return_dict=False)[0]
    torch.testing.assert_close(velocity, batch.velocity, rtol=2e-3, atol=2e-3)  # kept in half precision
    assert len(set(batch.kwargs["guidance"].tolist())) > 1
    times = batch.kwargs["timestep"].reshape(5, 3)
    assert torch.equal(times[:, 0], torch.ones(5))
    assert times[:, 1].unique().numel() == 5
    assert ((times > 0) & (times <= 1)).all()


def test_batch_size_does_not_change_a_trajectory(pipe, tmp_path):
    one = record_trajectories(pipe, PROMPTS[:3], tmp_path / "a", dataclasses.replace(CONFIG, batch_size=1))
    all_ = record_trajectories(pipe, PROMPTS[:3], tmp_path / "b", dataclasses.replace(CONFIG, batch_size=3))
    a, b = (d.pairs(torch.arange(9), "all") for d in (one, all_))
    torch.testing.assert_close(a.kwargs["hidden_states"], b.kwargs["hidden_states"], rtol=2e-3, atol=2e-3)
    assert torch.equal(a.kwargs["timestep"], b.kwargs["timestep"])
    assert torch.equal(a.kwargs["guidance"], b.kwargs["guidance"])


def test_a_killed_recording_resumes_to_the_same_bytes(pipe, tmp_path, monkeypatch):
    record_trajectories(pipe, PROMPTS, tmp_path / "whole", CONFIG)
    run = _Recorder.run
    calls: list = []

    def killed(self, plans):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(plans)
        return run(self, plans)

    monkeypatch.setattr(_Recorder, "run", killed)
    with pytest.raises(KeyboardInterrupt):
        record_trajectories(pipe, PROMPTS, tmp_path / "cut", CONFIG)

    def counted(self, plans):
        calls.append(plans)
        return run(self, plans)

    monkeypatch.setattr(_Recorder, "run", counted)
    data = record_trajectories(pipe, PROMPTS, tmp_path / "cut", CONFIG)
    assert len(calls) == 3
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    assert isinstance(data, Trajectories)
    with pytest.raises(TrajectoryError, match="another configuration"):
        record_trajectories(pipe, PROMPTS, tmp_path / "cut", dataclasses.replace(CONFIG, seed=8))


def test_processes_share_the_shards(pipe, tmp_path, monkeypatch):
    """As two would, one after the other; `tests/pipelines/test_processes.py` has two real ones."""
    told, read = [], []

    class Half(Ranks):
        def wait(self):
            pass

        def every(self, value):
            told.append(value)
            return told

    def digest(path):
        read.append(path.name)
        return file_sha256(path)

    record_trajectories(pipe, PROMPTS, tmp_path / "whole", CONFIG)
    monkeypatch.setattr("tritflow.calibration.trajectories.file_sha256", digest)
    calls = []
    with pytest.raises(TrajectoryError, match="not finished"):  # the first process has not been there yet
        record_trajectories(
            pipe, PROMPTS, tmp_path / "two", CONFIG, ranks=Half(1, 2), on_progress=lambda *now: calls.append(now)
        )
    assert calls == [(4, 5)]
    assert [p.name for p in (tmp_path / "two").glob("shard-*")] == ["shard-00001.safetensors"]
    record_trajectories(
        pipe, PROMPTS, tmp_path / "two", CONFIG, ranks=Half(0, 2), on_progress=lambda *now: calls.append(now)
    )
    assert calls[1:] == [(4, 5), (5, 5)]
    assert read == ["shared.safetensors"]  # nobody's shard was read for its checksum
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_refusals(pipe, tmp_path):
    from diffusers import FlowMatchHeunDiscreteScheduler

    other = FluxPipeline(**{**pipe.components, "scheduler": FlowMatchHeunDiscreteScheduler()})
    with pytest.raises(TeacherError, match="not FlowMatchHeunDiscreteScheduler"):
        record_trajectories(other, PROMPTS, tmp_path, CONFIG)
    with pytest.raises(TeacherError, match="too few"):
        record_trajectories(pipe, PROMPTS, tmp_path / "s", dataclasses.replace(CONFIG, height=8))
