"""A plan is applied with stock hooks, held on CUDA, and refused elsewhere. The CPU stands for the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers.hooks.group_offloading import _is_group_offload_enabled
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.pipelines import loading, offloading
from tritflow.pipelines.component_sizes import sizes_of
from tritflow.pipelines.generate import generate
from tritflow.pipelines.loading import DeviceError, load_pipeline
from tritflow.pipelines.memory_plan import (
    CONTEXT,
    GIB,
    MemoryPlan,
    MemoryPlanError,
    MemorySizeError,
    Placement,
    Workload,
    evaluate,
)
from tritflow.pipelines.offloading import apply_plan, keep_plan, plan_memory
from tritflow.pipelines.quantize import quantize
from tritflow.testing import tiny_flux2_folder

OFF, ON, STREAMED, CPU = Placement.OFFLOADED, Placement.RESIDENT, Placement.STREAMED, Placement.CPU


@pytest.fixture(scope="module")
def folder(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("planned") / "flux"
    quantize(tiny_flux, out, "absmean", device="cpu")
    return out


def planned(pipe: Any, where: Sequence[Placement], tile: int | None = None) -> MemoryPlan:
    sizes = sizes_of(pipe)
    return evaluate(sizes, Workload(32, 32), {s.name: p for s, p in zip(sizes, where, strict=True)}, tile, 6 * GIB)


@pytest.mark.parametrize(
    "where",
    [
        (ON, ON, ON, ON),
        (OFF, OFF, OFF, OFF),
        (OFF, STREAMED, OFF, OFF),
        (OFF, STREAMED, STREAMED, OFF),
        (CPU, CPU, ON, ON),
        (CPU, CPU, STREAMED, OFF),
        (ON, ON, STREAMED, OFF),
    ],
)
def test_pictures_do_not_depend_on_the_plan(folder: Path, where: Sequence[Placement]) -> None:
    prompts, seeds = ["a red star", "a blue ring"], [0, 1]
    expected = generate(load_pipeline(folder, device="cpu"), prompts, seeds, batch_size=1)
    pipe = load_pipeline(folder, device="cpu")
    apply_plan(pipe, planned(pipe, where), torch.device("cpu"))
    found = generate(pipe, prompts, seeds, batch_size=1)  # two batches: the second finds what the first left
    assert [p.tobytes() for p in found] == [p.tobytes() for p in expected]
    for name, place in zip(("text_encoder", "text_encoder_2", "transformer", "vae"), where, strict=True):
        module = getattr(pipe, name)
        assert isinstance(getattr(module, "_hf_hook", None), CpuOffload) is (place is OFF)
        assert _is_group_offload_enabled(module) is (place is STREAMED)
    assert pipe.vae.use_slicing
    assert not pipe.vae.use_tiling


def test_offloaded_components_take_turns(folder: Path) -> None:
    pipe = load_pipeline(folder, device="cpu")
    apply_plan(pipe, planned(pipe, (OFF, STREAMED, OFF, OFF)), torch.device("cpu"))
    turns = [pipe.text_encoder, pipe.transformer, pipe.vae]
    displaced = [module._hf_hook.prev_module_hook.model for module in turns]
    assert all(a is b for a, b in zip(displaced, (pipe.vae, pipe.text_encoder, pipe.transformer), strict=True))
    alone = load_pipeline(folder, device="cpu")
    apply_plan(alone, planned(alone, (ON, ON, STREAMED, OFF)), torch.device("cpu"))
    assert alone.vae._hf_hook.prev_module_hook is None


def test_a_lora_loaded_before_the_plan_is_drawn_with(folder: Path) -> None:
    pytest.importorskip("peft")
    g = torch.Generator().manual_seed(1)
    pictures = []
    for where in ((ON, ON, ON, ON), (OFF, STREAMED, OFF, OFF), (OFF, OFF, STREAMED, OFF)):
        pipe = load_pipeline(folder, device="cpu")
        before = sizes_of(pipe)[2]
        g.manual_seed(1)
        at = "single_transformer_blocks.0.proj_out"
        linear = pipe.transformer.get_submodule(at)
        a, b = torch.randn(4, linear.in_features, generator=g), torch.randn(linear.out_features, 4, generator=g)
        pipe.load_lora_weights({f"transformer.{at}.lora_A.weight": a, f"transformer.{at}.lora_B.weight": b})
        after = sizes_of(pipe)[2]
        assert after.total == before.total + a.nbytes + b.nbytes
        apply_plan(pipe, planned(pipe, where), torch.device("cpu"))
        pictures.append(generate(pipe, "a red star")[0].tobytes())
    assert pictures[0] == pictures[1] == pictures[2]
    assert pictures[0] != generate(load_pipeline(folder, device="cpu"), "a red star")[0].tobytes()


def test_tiles_change_little(folder: Path) -> None:
    pipe = load_pipeline(folder, device="cpu")
    whole = generate(pipe, "a red star", 0, height=64, width=64)[0]
    apply_plan(pipe, planned(pipe, (ON, ON, ON, ON), tile=32), torch.device("cpu"))
    assert (pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size) == (32, 4)
    tiled = generate(pipe, "a red star", 0, height=64, width=64)[0]
    assert tiled.size == whole.size
    differences = [abs(a - b) for a, b in zip(tiled.tobytes(), whole.tobytes(), strict=True)]
    assert 0 < sum(differences) / len(differences) < 40  # random weights blend worse than trained ones


def test_flux2_is_planned_too(tmp_path: Path) -> None:
    klein = tiny_flux2_folder(tmp_path / "klein")
    expected = generate(load_pipeline(klein, device="cpu"), "a red star")[0]
    pipe = load_pipeline(klein, device="cpu")
    apply_plan(pipe, planned(pipe, (STREAMED, OFF, OFF), tile=512), torch.device("cpu"))
    assert generate(pipe, "a red star")[0].tobytes() == expected.tobytes()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A CUDA device as far as planning goes: 80 GiB, of which `free` are free; pipelines run on the CPU."""
    state: dict[str, Any] = {"free": 70 * GIB, "fraction": None}

    def fraction(share: float, device: int) -> None:
        assert device == 0, "the real one refuses a device without a number"
        state["fraction"] = share

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (state["free"], 80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fraction)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(offloading, "pick_device", lambda device: torch.device("cuda"))
    return state


def test_the_budget_is_held(folder: Path, cuda: dict[str, Any]) -> None:
    plan = plan_memory(folder, "6GiB")
    assert set(plan.placements.values()) == {ON}
    pipe = load_pipeline(folder, device="cpu", plan=plan)
    assert cuda["fraction"] == pytest.approx((6 * GIB - CONTEXT) / (80 * GIB))
    assert generate(pipe, "a red star")[0].size == (32, 32)
    cuda["free"] = 1 << 10
    with pytest.raises(MemoryPlanError, match=r"has 0\.00 GiB free of 80\.00 GiB"):
        keep_plan(plan, torch.device("cuda"))


def test_what_is_drawn_decides_the_plan(folder: Path, cuda: dict[str, Any]) -> None:
    small = plan_memory(folder, 6 * GIB)
    large = plan_memory(folder, 6 * GIB, height=512, width=512, batch=2, max_sequence_length=64, dtype="bfloat16")
    assert large.peaks["decode"] > small.peaks["decode"]
    with pytest.raises(MemoryPlanError, match=r"nothing fits 0\.00 GiB at 32x32"):
        plan_memory(folder, "1MiB")
    with pytest.raises(MemorySizeError):
        plan_memory(folder, "lots")


def test_only_cuda_is_bounded(folder: Path) -> None:
    with pytest.raises(DeviceError, match="--max-memory bounds a CUDA device's memory, and this is cpu"):
        plan_memory(folder, "6GiB", device="cpu")


def test_the_command_says_its_plan_and_keeps_it(
    folder: Path, tmp_path: Path, cuda: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "pick_device", lambda device: torch.device("cpu"))

    def run(*extra: str) -> Any:
        args = ["generate", "a red star", "--model", str(folder), "--out", str(tmp_path / "a.png"), *extra]
        return CliRunner().invoke(app, args)

    done = run("--max-memory", "5GiB")
    assert done.exit_code == 0, done.stderr
    assert "plan for 5.00 GiB:" in done.stderr
    assert "transformer" in done.stderr
    assert (tmp_path / "a.png").is_file()
    assert cuda["fraction"] == pytest.approx((5 * GIB - CONTEXT) / (80 * GIB))
    assert '"memory_plan"' in run("--max-memory", "5GiB", "--json").stdout
    refused = run("--max-memory", "1MiB")
    assert refused.exit_code == 3
    assert refused.stderr.startswith("error: nothing fits")
    assert run("--max-memory", "much").exit_code == 2
