"""The whole way at a tiny size on the CPU: VAE, flow, guidance, a stock FluxPipeline folder that draws."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

import forked
from tritflow.scenes import fidelity
from tritflow.training import models, run, start
from tritflow.training.__main__ import main
from tritflow.training.options import arguments

TINY = models.SmallFluxSize(hidden=64, heads=2, double=1, single=2, text_width=32, text_layers=1, pooled_width=32)


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16,) * 4,
        latent_channels=16,
        norm_num_groups=16,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


class NoPool:
    """No worker processes: examples are made on the spot, and nothing is scored in so short a run."""

    def __init__(self, *args: object, **options: object) -> None: ...

    def submit(self, work: Callable[[object], object], task: object) -> Future[object]:
        future: Future[object] = Future()
        future.set_result(work(task))
        return future

    def shutdown(self, **options: object) -> None: ...


@contextmanager
def quick() -> Iterator[pytest.MonkeyPatch]:
    """Sizes and counts with which a run takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SmallFluxSize", lambda: TINY)
        patch.setattr(models, "build_vae", tiny_vae)
        patch.setattr("tritflow.training.export.CALIBRATION_PROMPTS", 32)
        patch.setattr(run, "ProcessPoolExecutor", NoPool)
        patch.setattr("tritflow.training.supply.CHUNK", 16)
        patch.setattr("tritflow.training.data.CHUNK", 16)
        patch.setattr("os.cpu_count", lambda: 1)
        patch.setattr("tritflow.training.stages.vae.detector_scores", lambda *a: {"texture": 1.0, "ghosts": 0.0})
        patch.setattr(run, "evaluation_prompts", lambda n, seed: _prompts(seed))
        # What the VAE keeps of every colour on every ground is measured in tests of the autoencoder.
        for name in ("COLORS", "TEXTURES", "BACKGROUNDS"):
            patch.setattr(fidelity, name, getattr(fidelity, name)[:1])
        patch.setattr("tritflow.training.vae.train_vae.__kwdefaults__", _smaller_batch())
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training") / "run"
    options = "--size 32 --examples 64 --batch 8 --vae-seconds 1 --vae-further-seconds 0.5 --reading-seconds 0.5"
    options += " --reading-floor 0 --flow-seconds 1 --guidance-seconds 0.5"
    with quick():
        main(["--out", str(out), *options.split()])
    return out


def _smaller_batch() -> dict[str, object]:
    from tritflow.training.vae import train_vae

    return {**train_vae.__kwdefaults__, "batch": 8}


def _prompts(seed: int) -> list[object]:
    from tritflow.scenes import evaluation_prompts

    # The sheet takes 8 of every 32.
    return evaluation_prompts(32, seed, ("single_object",))  # type: ignore[return-value]


def test_all_artifacts_are_there(folder: Path) -> None:
    for name in ("vae.safetensors", "flow.safetensors", "guided.safetensors", "sheet.png", "pipeline/generation.json"):
        assert (folder / name).is_file(), name
    assert not list(folder.glob("*.tmp"))
    log = (folder / "log-0.txt").read_text()
    assert "64 examples" in log
    assert "reading: error" in log
    assert log.rstrip().endswith("written")
    statistics = json.loads((folder / "vae.json").read_text())
    assert statistics["scale"] > 0
    captions = (folder / "pipeline" / "calibration_prompts.txt").read_text().splitlines()
    assert len(captions) == len(set(captions)) == 32


def test_the_stock_pipeline_loads_and_draws(folder: Path) -> None:
    from diffusers import FluxPipeline

    defaults = json.loads((folder / "pipeline" / "generation.json").read_text())
    assert defaults["height"] == defaults["width"] == 32
    pipe = FluxPipeline.from_pretrained(folder / "pipeline", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    defaults["num_inference_steps"] = 3
    drawn = [
        np.asarray(pipe("a red star", generator=torch.Generator().manual_seed(s), **defaults).images[0])
        for s in (0, 0, 1)
    ]
    assert drawn[0].shape == (32, 32, 3)
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_guidance_changes_the_transformer_alone(folder: Path) -> None:
    before, after = load_file(folder / "flow.safetensors"), load_file(folder / "guided.safetensors")
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"transformer"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--out"),
        (["--out", "x", "--size", "100"], "multiple of 16"),
        (["--out", "x", "--batch", "0"], "--batch 0: give a number above 0"),
        (["--out", "x", "--resume", "none.safetensors"], "no such checkpoint"),
        (["--out", "x", "--blended", "1.5"], "--blended 1.5: give a share from 0 to 1"),
        (["--out", "x", "--from", "nothing-here"], "'nothing-here' is no pipeline folder"),
    ],
)
def test_bad_options_say_so(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_stops_when_its_encoders_cannot_read(folder: Path, tmp_path: Path) -> None:
    with quick():
        for name in ("vae.safetensors", "vae.json", "autoencoder.json"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        options = "--size 32 --examples 2048 --batch 8 --reading-seconds 0.1 --flow-seconds 1"
        with pytest.raises(RuntimeError, match=r"did not learn to read .*--reading-seconds"):
            main(["--out", str(tmp_path), *options.split()])


def test_a_leg_starts_from_a_pipeline(folder: Path, tmp_path: Path) -> None:
    """One command: VAE further, flow and guidance on from the parts of a pipeline folder, and a pipeline again."""
    options = "--size 32 --examples 32 --batch 4 --vae-further-seconds 0.3 --flow-seconds 0.3 --guidance-seconds 0.3"
    with quick() as patch:
        patch.setattr(models, "SmallFluxSize", None)  # all sizes come from the folder
        main(["--out", str(tmp_path), "--from", str(folder / "pipeline"), *options.split()])
    before, after = load_file(folder / "guided.safetensors"), load_file(tmp_path / "guided.safetensors")
    assert before.keys() == after.keys()
    kept = {k.split(".")[0] for k in before if torch.equal(before[k].bfloat16(), after[k].bfloat16())}
    assert {"clip", "t5"} <= kept
    transformer = [k for k in before if k.startswith("transformer.") and before[k].ndim == 2]
    apart = sum(float((after[k] - before[k]).norm()) for k in transformer)
    size = sum(float(before[k].norm()) for k in transformer)
    assert 0 < apart < 0.5 * size  # trained on, not from nothing
    log = (tmp_path / "log-0.txt").read_text()
    assert "reading:" not in log
    assert json.loads((tmp_path / "autoencoder.json").read_text())["encoder"] is True
    assert (tmp_path / "pipeline" / "model_index.json").is_file()


def test_a_second_leg_in_the_folder_keeps_its_vae(folder: Path, tmp_path: Path) -> None:
    for name in ("vae.safetensors", "vae.json", "autoencoder.json", "guided.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    options = "--size 32 --examples 16 --batch 4 --flow-seconds 0.2 --guidance-seconds 0"
    with quick():
        resume = str(tmp_path / "guided.safetensors")
        main(["--out", str(tmp_path), "--resume", resume, *options.split()])
    assert (tmp_path / "vae.safetensors").read_bytes() == (folder / "vae.safetensors").read_bytes()
    assert "vae: detector" not in (tmp_path / "log-0.txt").read_text()


def test_a_leg_at_twice_the_size_starts_from_the_smaller_one(folder: Path, tmp_path: Path) -> None:
    options = "--size 64 --examples 16 --batch 2 --vae-further-seconds 0.1 --flow-seconds 0.1 --guidance-seconds 0.1"
    with quick():
        main(["--out", str(tmp_path), "--from", str(folder / "pipeline"), *options.split()])
    pipeline = tmp_path / "pipeline"
    assert json.loads((pipeline / "generation.json").read_text())["height"] == 64
    assert json.loads((pipeline / "vae" / "config.json").read_text())["sample_size"] == 64
    assert "encoded (16, 16, 64)" in (tmp_path / "log-0.txt").read_text()


@pytest.mark.slow
def test_two_processes_make_one_model(tmp_path: Path) -> None:
    """A whole leg by ranks with gloo: other examples in each process, the same weights."""
    options = "--size 32 --examples 32 --batch 4 --vae-seconds 0.5 --vae-further-seconds 0.5 --reading-seconds 0.3"
    options += " --reading-floor 0 --flow-seconds 1 --guidance-seconds 0.5"
    driver = Path(__file__).with_name("quick_leg.py")
    ranks = forked.run_ranks([driver, "--out", tmp_path, *options.split()], 2, timeout=900)
    assert [r.poll() for r in ranks] == [0, 0], [r.stderr[-3000:] for r in ranks]
    facts = [json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1)]
    assert facts[0]["first"] != facts[1]["first"]  # each saw scenes of its own
    assert facts[0]["steps"] == facts[1]["steps"] > 0
    for part in ("vae", "flow"):
        assert facts[0][part] == facts[1][part], part
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    assert (tmp_path / "log-1.txt").is_file()


def test_another_vocabulary_is_refused(folder: Path) -> None:
    tokenizers = models.build_tokenizers(["a", "star"])
    with pytest.raises(start.StartError, match="another vocabulary"):
        start.model_of(folder / "pipeline", tokenizers)


def test_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        arguments(["--help"])
    assert stop.value.code == 0
    assert "python -m tritflow.training" in capsys.readouterr().out
