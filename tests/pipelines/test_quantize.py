import dataclasses
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

import forked
from tritflow.calibration.prompt_sources import PromptsError
from tritflow.config import (
    CalibrationConfig,
    ConfigError,
    DistillationConfig,
    OnlineConfig,
    Recipe,
    ReconstructionConfig,
)
from tritflow.formats.checkpoint import TernaryFolder, verify_folder
from tritflow.formats.errors import CheckpointError
from tritflow.pipelines import quantize as module
from tritflow.pipelines.demands import check_disk, check_memory, checkpoint_bytes
from tritflow.pipelines.quantize import QuantizeError, quantize
from tritflow.quantization.ternarize import absmean, mse_optimal
from tritflow.recipes import load_recipe

LINEARS = 20  # one double block and one single block


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rounding_streams_to_a_whole_pipeline_folder(tiny_flux, tmp_path):
    seen = []
    report = quantize(tiny_flux, tmp_path / "out", "fast", on_progress=lambda *a: seen.append(a))
    assert report.linears == LINEARS
    assert report.components
    assert not report.resumed
    folder = TernaryFolder(tmp_path / "out" / "transformer")
    verify_folder(tmp_path / "out" / "transformer")
    from safetensors.torch import load_file

    dense = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    trits, scale = mse_optimal(dense[f"{name}.weight"])
    stored = folder.linear(name)
    from tritflow.formats.packing import pack_2bit

    assert torch.equal(stored.packed, pack_2bit(trits))
    assert torch.equal(stored.weight_scale, scale.bfloat16())
    assert torch.equal(stored.bias, dense[f"{name}.bias"])
    assert torch.equal(folder.tensor("x_embedder.weight"), dense["x_embedder.weight"])
    assert seen[0][0] == "round"
    assert seen[-1][0] == "copy"
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["complete"]
    assert meta["recipe"]["name"] == "fast"
    assert meta["digest"] == report.digest
    assert not (tmp_path / "out" / ".work").exists()
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert quantize(tiny_flux, tmp_path / "out", "fast").resumed


def test_overrides_end_up_in_the_config(tiny_flux, tmp_path):
    report = quantize(
        tiny_flux,
        tmp_path / "out",
        "absmean",
        mode="w2a8",
        packing="base3",
        skip=["*.norm1.linear", "*.norm1_context.linear"],
    )
    assert (report.linears, report.skipped) == (LINEARS - 2, 2)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["mode"] == "w2a8"
    assert config["packing"] == "base3"
    assert config["skip"] == ["*.norm1.linear", "*.norm1_context.linear"]
    folder = TernaryFolder(tmp_path / "out" / "transformer")
    from safetensors.torch import load_file

    dense = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "single_transformer_blocks.0.proj_out"
    assert torch.equal(folder.linear(name).weight_scale, absmean(dense[f"{name}.weight"])[1].bfloat16())
    assert "transformer_blocks.0.norm1.linear.weight" in folder


def test_column_scales(tiny_flux, tmp_path):
    quantize(tiny_flux, tmp_path / "out", "fast", column_scale=True)
    stored = TernaryFolder(tmp_path / "out" / "transformer").linear("transformer_blocks.0.ff.net.2")
    assert stored.input_scale is not None
    assert stored.input_scale.shape == (stored.in_features,)


@pytest.mark.parametrize("after", [0, 3, 17, 40])
def test_killed_anywhere_it_resumes_to_the_same_bytes(tiny_flux, tmp_path, after):
    quantize(tiny_flux, tmp_path / "whole", "fast")

    def kill(stage, done, total):
        if stage == "round" and done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_flux, tmp_path / "cut", "fast", on_progress=kill)
    assert not json.loads((tmp_path / "cut" / "meta.json").read_text())["complete"]
    quantize(tiny_flux, tmp_path / "cut", "fast")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_another_job_is_not_mixed_in(tiny_flux, tmp_path):
    out = tmp_path / "out"
    first = quantize(tiny_flux, out, "fast")
    with pytest.raises(QuantizeError, match="--overwrite"):
        quantize(tiny_flux, out, "absmean")
    second = quantize(tiny_flux, out, "absmean", overwrite=True)
    assert second.digest != first.digest
    dense = tmp_path / "dense"
    shutil.copytree(tiny_flux, dense)
    with pytest.raises(QuantizeError, match="did not write"):
        quantize(tiny_flux, dense, "fast", overwrite=True)
    with pytest.raises(QuantizeError, match="where the source lies"):
        quantize(dense, dense, "fast")


def test_a_component_that_changed_without_changing_its_size_is_copied_again(tiny_flux, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_flux, source)
    quantize(source, out, "fast")
    name = "scheduler/scheduler_config.json"
    changed = (source / name).read_text().replace("true", "fals").replace("false", "true ")
    assert changed != (source / name).read_text()
    (source / name).write_text(changed)
    assert len((out / name).read_text()) == len(changed)
    quantize(source, out, "fast", overwrite=True)
    assert (out / name).read_text() == changed


def test_large_components_stay_where_they_are(tiny_flux, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COMPONENTS_LIMIT", 1000)
    report = quantize(tiny_flux, tmp_path / "out", "fast")
    assert not report.components
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["base"] == str(tiny_flux.resolve())
    assert quantize(tiny_flux, tmp_path / "full", "fast", full=True).components


def test_bad_requests_are_one_line(tiny_flux, tmp_path):
    quantize(tiny_flux, tmp_path / "out", "fast")
    cases = [
        (lambda: quantize(tmp_path / "out", tmp_path / "again"), CheckpointError, "quantized already"),
        (lambda: quantize(tmp_path / "nowhere", tmp_path / "x"), CheckpointError, "does not exist"),
        (lambda: quantize(tiny_flux, tmp_path / "x", "fsat"), ConfigError, "did you mean 'fast'"),
        (lambda: quantize(tiny_flux, tmp_path / "x", mode="w2a4"), ConfigError, "w2a4"),
        (lambda: quantize(tiny_flux, tmp_path / "x", skip=["nothing.*"]), QuantizeError, "matches none"),
        (lambda: quantize(tiny_flux, tmp_path / "x", skip=["*"]), QuantizeError, "nothing to quantize"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_memory_is_one_tensor_at_a_time(tiny_flux, tmp_path, monkeypatch):
    """No more than one source tensor beside its bias is alive while the next is read."""
    import weakref

    from tritflow.formats.source import FolderSource

    read = FolderSource.tensor
    alive: list = []
    most = 0

    def counted(self, name, device="cpu"):
        nonlocal most
        tensor = read(self, name, device)
        alive[:] = [r for r in alive if r() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(FolderSource, "tensor", counted)
    quantize(tiny_flux, tmp_path / "out", "fast")
    assert most <= 3


LEARN = Recipe(
    "learn",
    compensation=True,
    compensation_samples=24,
    calibration=CalibrationConfig(num_inference_steps=4, batch_size=4, guidance_scales=(2.0, 3.5)),
    distillation=DistillationConfig(
        steps=24, batch_size=8, learning_rate=6e-3, scale_learning_rate=3e-3, warmup_steps=3, checkpoint_every=8
    ),
)
PROMPTS = [f"{count} {color} {shape}" for count in ("one", "two") for color in ("red", "blue", "green")
           for shape in ("cube", "star")]  # fmt: skip


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "mine.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def velocity_error(folder, pipe):
    """Mean square error against the dense model, on inputs no stage has seen."""
    from diffusers import FluxTransformer2DModel

    from tritflow.testing import transformer_inputs

    student = FluxTransformer2DModel.from_pretrained(folder)
    inputs = transformer_inputs(pipe.transformer, batch=16, seed=5)
    with torch.no_grad():
        return float((student(**inputs)[0] - pipe.transformer(**inputs)[0]).square().mean())


def test_learned_recipes_beat_rounding(tiny_flux, prompts, tmp_path):
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(tiny_flux)
    seen = []
    learned = quantize(
        tiny_flux, tmp_path / "learn", LEARN, prompts=prompts, device="cpu", on_progress=lambda *a: seen.append(a)
    )
    assert list(dict.fromkeys(stage for stage, _, _ in seen)) == [
        "record",
        "compensate",
        "distill",
        "write",
        "copy",
    ]
    assert list(learned.validation) == [0, 8, 16, 24]
    compensated = quantize(
        tiny_flux,
        tmp_path / "compensated",
        dataclasses.replace(LEARN, name="c", distillation=DistillationConfig()),
        prompts=prompts,
        device="cpu",
    )
    assert compensated.validation == {}
    plain = quantize(tiny_flux, tmp_path / "plain", "fast")
    errors = [velocity_error(r.transformer, pipe) for r in (learned, compensated, plain)]
    assert max(errors[:2]) < errors[2]
    meta = json.loads((tmp_path / "learn" / "meta.json").read_text())
    assert meta["prompts"]["count"] == len(PROMPTS)
    assert meta["parents"]["prompts"] == meta["prompts"]["sha256"]
    assert not (tmp_path / "learn" / ".work").exists()


@pytest.mark.parametrize(("stage", "at"), [("record", 8), ("compensate", 1), ("distill", 13), ("write", 30)])
def test_learning_killed_in_any_stage_resumes_to_the_same_bytes(tiny_flux, prompts, tmp_path, stage, at, learned_files):
    def kill(now, done, total):
        if now == stage and done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_flux, tmp_path / "out", LEARN, prompts=prompts, device="cpu", on_progress=kill)
    quantize(tiny_flux, tmp_path / "out", LEARN, prompts=prompts, device="cpu")
    assert files_of(tmp_path / "out") == learned_files


@pytest.fixture(scope="module")
def learned_files(tiny_flux, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "out"
    quantize(tiny_flux, out, LEARN, prompts=prompts, device="cpu")
    return files_of(out)


def test_a_kill_9_while_distilling(tiny_flux, prompts, tmp_path, learned_files):
    """A real process, really killed."""
    script = (
        "import json, os, signal, sys\n"
        "from tritflow.config import *\n"
        "from tritflow.pipelines.quantize import quantize\n"
        "a = json.loads(sys.argv[1])\n"
        "recipe = Recipe('learn', compensation=True, compensation_samples=24,\n"
        "    calibration=CalibrationConfig.from_dict(a['calibration']),\n"
        "    distillation=DistillationConfig.from_dict(a['distillation']))\n"
        "def kill(stage, done, total):\n"
        "    if stage == 'distill' and done >= 10: os.kill(os.getpid(), signal.SIGKILL)\n"
        "import torch; torch.set_num_threads(int(sys.argv[5]))\n"
        "quantize(sys.argv[2], sys.argv[3], recipe, prompts=sys.argv[4], device='cpu', on_progress=kill)\n"
    )
    settings = {"calibration": LEARN.calibration.to_dict(), "distillation": LEARN.distillation.to_dict()}
    done = forked.run(
        ["-c", script, json.dumps(settings), tiny_flux, tmp_path / "out", prompts, torch.get_num_threads()]
    )
    assert done.poll() == -signal.SIGKILL, done.stderr[-500:]
    quantize(tiny_flux, tmp_path / "out", LEARN, prompts=prompts, device="cpu")
    assert files_of(tmp_path / "out") == learned_files


def test_block_reconstruction_stands_between_compensation_and_distillation(tiny_flux, prompts, tmp_path):
    """On a FLUX of three blocks, killed in the middle, at 8 bits, it ends in less error than compensation."""
    from diffusers import FluxPipeline

    reconstruction = ReconstructionConfig(
        steps=40, window=2, stride=1, samples=40, batch_size=8, learning_rate=0.01, warmup_steps=4
    )
    recipe = dataclasses.replace(LEARN, name="r", reconstruction=reconstruction, distillation=DistillationConfig())
    seen = []

    def kill(stage, done, total):
        seen.append(stage)
        if stage == "reconstruct" and seen.count("reconstruct") == 1:
            raise KeyboardInterrupt

    options = {"prompts": prompts, "device": "cpu", "mode": "w2a8", "on_progress": kill, "keep_work": True}
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_flux, tmp_path / "out", recipe, **options)
    report = quantize(tiny_flux, tmp_path / "out", recipe, **options)
    assert list(dict.fromkeys(seen)) == ["record", "compensate", "reconstruct", "write", "copy"]
    whole = quantize(tiny_flux, tmp_path / "whole", recipe, prompts=prompts, device="cpu", mode="w2a8")
    assert report.digest == whole.digest
    curve = json.loads((tmp_path / "out" / ".work" / "reconstructed" / "curve.json").read_text())
    assert curve["config"]["activation_bits"] == 8
    assert all(sum(w["after"].values()) < sum(w["before"].values()) for w in curve["windows"])
    start = dataclasses.replace(recipe, name="c", reconstruction=ReconstructionConfig())
    compensated = quantize(tiny_flux, tmp_path / "start", start, prompts=prompts, device="cpu", mode="w2a8")
    pipe = FluxPipeline.from_pretrained(tiny_flux)
    assert velocity_error(report.transformer, pipe) < velocity_error(compensated.transformer, pipe)
    distilled = dataclasses.replace(recipe, name="d", distillation=LEARN.distillation)
    final = quantize(tiny_flux, tmp_path / "distilled", distilled, prompts=prompts, device="cpu", mode="w2a8")
    assert final.validation[24] < final.validation[0]


ONLINE = dataclasses.replace(
    LEARN,
    name="o",
    compensation=False,
    smoothing=0.0,
    online=OnlineConfig(
        pool=3, num_inference_steps=5, student_share=0.5, early_share=0.5, early_steps=2, mixed_share=0.5
    ),
    distillation=dataclasses.replace(
        LEARN.distillation,
        optimizer="muon",
        learning_rate=5e-3,
        rest_learning_rate=1e-3,
        batch_size=4,
        freeze_share=0.25,
        feature_weight=0.1,
    ),
)


@pytest.mark.parametrize("compensated", [False, True])
def test_all_but_the_trits_learns_at_a_rate_of_nothing(tiny_flux, prompts, tmp_path, compensated):
    """No weight of a linear is read for it but to be rounded; killed on the way, it resumes to the same bytes."""

    def kill(stage, done, total):
        if stage == "distill" and done > 12:
            raise KeyboardInterrupt

    still = dataclasses.replace(
        LEARN.distillation, learning_rate=0.0, scale_learning_rate=1e-3, optimizer="muon", lean=True
    )
    recipe = dataclasses.replace(LEARN, name="s", compensation=compensated, distillation=still)
    options = {"prompts": prompts, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_flux, tmp_path / "cut", recipe, on_progress=kill, **options)
    report = quantize(tiny_flux, tmp_path / "cut", recipe, **options)
    whole = quantize(tiny_flux, tmp_path / "whole", recipe, **options)
    assert report.digest == whole.digest
    if not compensated:  # compensation leaves this random model next to nothing to learn
        assert whole.validation[24] < whole.validation[0]
    short = dataclasses.replace(recipe, distillation=DistillationConfig())
    quantize(tiny_flux, tmp_path / "before", short if compensated else "fast", **options)
    before, after = (TernaryFolder(tmp_path / name / "transformer") for name in ("before", "whole"))
    moved = 0
    for name in before.linears:
        was, now = before.linear(name), after.linear(name)
        assert torch.equal(was.packed, now.packed)
        moved += not torch.equal(was.weight_scale, now.weight_scale)
    assert moved == LINEARS


@pytest.mark.parametrize("compensated", [False, True])
def test_latents_in_memory_give_the_same_bytes_and_go_on_without(tiny_flux, prompts, tmp_path, compensated):
    """A run that was killed on a small card goes on, on a large one: where latents lie is no part of the job."""

    def kill(stage, done, total):
        if stage == "distill" and done > 12:
            raise KeyboardInterrupt

    lean = dataclasses.replace(LEARN.distillation, optimizer="muon", lean=True, rest_learning_rate=1e-3)
    recipe = dataclasses.replace(LEARN, name="l", compensation=compensated, distillation=lean)
    options = {"prompts": prompts, "device": "cpu"}
    away = ["streaming.latent_store=ram"]
    whole = quantize(tiny_flux, tmp_path / "whole", recipe, **options)
    report = quantize(tiny_flux, tmp_path / "away", recipe, settings=away, **options)
    assert report.digest == whole.digest
    assert report.validation == whole.validation
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_flux, tmp_path / "cut", recipe, settings=away, on_progress=kill, **options)
    assert quantize(tiny_flux, tmp_path / "cut", recipe, **options).digest == whole.digest
    if not compensated:  # a leg begins alike, too
        legs = {
            name: quantize(
                tiny_flux, tmp_path / name, recipe, settings=how, start=tmp_path / "whole", seed=1, **options
            )
            for name, how in (("on", []), ("on-away", away))
        }
        assert legs["on"].digest == legs["on-away"].digest != whole.digest


def test_memory_that_latents_do_not_fit_into_is_told_before_any_work(tiny_flux, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("tritflow.pipelines.demands.machine_bytes", lambda: 100_000)
    away = ["streaming.latent_store=ram", "calibration.num_inference_steps=2"]
    with pytest.raises(QuantizeError, match=r"keeps .* MB of latent weights and momenta.* this machine has 0.1 MB"):
        quantize(tiny_flux, tmp_path / "out", "large-distilled", prompts=prompts, device="cpu", settings=away)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("lean", [False, True])
def test_states_are_made_while_the_student_learns(tiny_flux, prompts, tmp_path, lean):
    """Killed on the way, it resumes to the same bytes; all that is not ternary is trained as well, and written."""

    from diffusers import FluxTransformer2DModel

    def kill(stage, done, total):
        if stage == "distill" and done > 12:
            raise KeyboardInterrupt

    options = {"prompts": prompts, "device": "cpu", "keep_work": True}
    learning = dataclasses.replace(ONLINE.distillation, lean=lean, feature_weight=0.0 if lean else 0.1)
    online = dataclasses.replace(ONLINE, distillation=learning)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_flux, tmp_path / "cut", online, on_progress=kill, **options)
    report = quantize(tiny_flux, tmp_path / "cut", online, **options)
    whole = quantize(tiny_flux, tmp_path / "whole", online, **options)
    assert report.digest == whole.digest
    assert whole.validation[24] < whole.validation[0]
    alone = dataclasses.replace(online, distillation=dataclasses.replace(learning, rest_learning_rate=0.0))
    quantize(tiny_flux, tmp_path / "alone", alone, **options)
    source, student, frozen = (
        FluxTransformer2DModel.from_pretrained(folder / "transformer").proj_out.weight
        for folder in (tiny_flux, tmp_path / "whole", tmp_path / "alone")
    )
    assert torch.equal(source, frozen)
    assert not torch.equal(source, student)


def test_a_student_too_large_for_the_gpu_is_refused_before_any_work(monkeypatch):
    class Card:
        total_memory = 80 * 10**9

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setenv("WORLD_SIZE", "4")
    weights, cuda = 12 * 10**9, torch.device("cuda")
    told = r"144 GB, and 1 x cuda has 80 GB; take --recipe large-distilled \(48 GB\), large-offloaded \(48 GB of"
    with pytest.raises(QuantizeError, match=told):
        check_memory(load_recipe("best"), weights, cuda)  # Muon: every process holds all of it
    check_memory(load_recipe("large-distilled"), weights, cuda)
    check_memory(load_recipe("reconstructed"), weights, cuda)  # 192 GB over four
    Card.total_memory = 24 * 10**9
    check_memory(load_recipe("large"), weights, cuda)  # trits that stand still: a byte each
    check_memory(load_recipe("best"), weights, torch.device("cpu"))


def test_checkpoints_that_will_not_fit_the_disk_are_refused_before_any_work(tiny_flux, prompts, tmp_path, monkeypatch):
    weights = 12 * 10**9
    # Latents and momenta in bf16, of the last checkpoint, the best and the one being written; float32 where not lean.
    assert checkpoint_bytes(load_recipe("large-offloaded"), weights) == 3 * 4 * weights
    assert checkpoint_bytes(load_recipe("best"), weights) == 3 * 8 * weights
    assert checkpoint_bytes(load_recipe("large"), weights) == 0
    assert checkpoint_bytes(load_recipe("fast"), weights) == 0
    short = 10**5
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=short))
    with pytest.raises(QuantizeError, match=r"keeps up to .* of checkpoints under .* and 0.1 MB are free") as error:
        quantize(tiny_flux, tmp_path / "out", LEARN, prompts=prompts, device="cpu")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    job, work = module.plan(tiny_flux, LEARN, prompts=prompts), tmp_path / "other" / module.WORK
    folder = work / "distilled"
    folder.mkdir(parents=True)
    needed = checkpoint_bytes(job.recipe, job.weights)
    (folder / "checkpoint.safetensors").write_bytes(bytes(needed - short))
    check_disk(job.recipe, job.weights, work)  # what is there need not be written again
    (folder / "checkpoint.safetensors").write_bytes(bytes(needed - 2 * short))
    os.link(folder / "checkpoint.safetensors", folder / "best.safetensors")  # one file, counted once
    with pytest.raises(QuantizeError, match="keeps up to"):
        check_disk(job.recipe, job.weights, work)


def test_captions_of_the_built_in_world_are_prompts(tiny_flux):
    job = module.plan(tiny_flux, LEARN, prompts="scenes:40")
    assert len(job.prompts) == 40
    assert job.prompts.name == "scenes:40"
    assert module.plan(tiny_flux, LEARN, prompts="scenes:40").prompts.sha256 == job.prompts.sha256


def test_eight_bit_activations_are_in_the_loop(tiny_flux, prompts, tmp_path):
    job = module.plan(tiny_flux, LEARN, mode="w2a8", prompts=prompts)
    assert job.recipe.distillation.activation_bits == 8
    assert module.plan(tiny_flux, LEARN, prompts=prompts).recipe.distillation.activation_bits == 16


def test_where_prompts_and_text_encoders_come_from(tiny_flux, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITFLOW_CACHE", str(tmp_path / "cache"))
    with pytest.raises(PromptsError, match="tritflow prompts fetch"):
        quantize(tiny_flux, tmp_path / "x", LEARN)
    own = tmp_path / "own"
    shutil.copytree(tiny_flux, own)
    shutil.copy(prompts, own / "calibration_prompts.txt")
    assert module.plan(own, LEARN).prompts.texts == PROMPTS
    bare = tmp_path / "bare"
    shutil.copytree(tiny_flux / "transformer", bare)
    with pytest.raises(ValueError, match="--base FLUX_DIR"):
        quantize(bare, tmp_path / "y", LEARN, prompts=prompts, device="cpu")
    short = dataclasses.replace(LEARN, distillation=DistillationConfig())
    report = quantize(bare, tmp_path / "z", short, prompts=prompts, base=tiny_flux, device="cpu")
    assert not report.components
    assert json.loads((tmp_path / "z" / "meta.json").read_text())["base"] == str(tiny_flux)
