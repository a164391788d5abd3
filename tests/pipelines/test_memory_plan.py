"""The planner's arithmetic on FLUX.1-dev's components, built from their configs on the meta device."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from flux1_dev_components import flux1_dev
from torch import nn

from tritflow.formats.accounting import storage_estimate
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.modules import TernaryLinear
from tritflow.pipelines.component_sizes import Size, measure, read_sizes, sizes_of
from tritflow.pipelines.defaults import ModelError
from tritflow.pipelines.loading import load_pipeline, resolve_model
from tritflow.pipelines.memory_plan import (
    CONTEXT,
    GIB,
    MEASURED_OUTSIDE,
    SLACK,
    MemoryPlan,
    MemoryPlanError,
    MemorySizeError,
    Placement,
    Workload,
    choose_plan,
    evaluate,
    on_device,
    parse_bytes,
    plans,
    working_bytes,
)
from tritflow.pipelines.quantize import quantize
from tritflow.testing import tiny_flux2_folder

FULL = Workload(1024, 1024)
BUDGETS = [n * GIB // 4 for n in range(4, 200)]


@pytest.fixture(scope="module")
def ternary() -> list[Size]:
    return flux1_dev()


@pytest.fixture(scope="module")
def dense() -> list[Size]:
    return flux1_dev(ternary=False)


def placed(plan: MemoryPlan) -> list[Placement]:
    return [plan.placements[size.name] for size in plan.sizes]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * GIB),
        ("6 gib", 6 * GIB),
        ("6GB", 6 * 10**9),
        ("1.5G", 1_500_000_000),
        ("800MiB", 800 << 20),
        ("7", 7),
    ],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "six", "6 TiB", "-1GiB", "0", "1.2.3GB", "GiB"])
def test_what_is_no_amount_is_said(text: str) -> None:
    with pytest.raises(MemorySizeError, match="write for example 6GiB"):
        parse_bytes(text)


def test_components_weigh_what_they_are_known_to(ternary: list[Size], dense: list[Size]) -> None:
    clip, t5, transformer, vae = ternary
    assert clip.total == pytest.approx(2 * 123.06e6, rel=1e-3)
    assert t5.total == pytest.approx(2 * 4.762e9, rel=1e-3)
    assert vae.total == pytest.approx(2 * 83.82e6, rel=1e-3)
    assert dense[2].total == 2 * 11_901_408_320
    estimate = storage_estimate(flux1_shapes(FLUX1_DEV))
    assert transformer.total == estimate.total
    # 19 double blocks and 38 single ones, the former 2.4 times as large.
    assert 19 * transformer.block < transformer.total - transformer.outside < 57 * transformer.block
    assert t5.leaf == 2 * 32128 * 4096
    assert t5.block * 24 + t5.outside == pytest.approx(t5.total, rel=0.01)


def test_working_memory_covers_what_was_measured(dense: list[Size]) -> None:
    """One H200, 1024x1024: 24.33 GB at the peak, 23.80 GB of them weights."""
    assert 0.53e9 < working_bytes(dense[2], FULL) < 0.53e9 * 1.5
    double = working_bytes(dense[2], Workload(1024, 1024, batch=2))
    assert 1.8 < double / working_bytes(dense[2], FULL) < 2
    vae = dense[3]
    assert working_bytes(vae, FULL, tile=512) < working_bytes(vae, FULL) / 3
    assert working_bytes(vae, Workload(256, 256), tile=512) == working_bytes(vae, Workload(256, 256))


def test_streamed_components_are_never_whole(ternary: list[Size], dense: list[Size]) -> None:
    for size in (*ternary[:3], dense[2]):
        assert on_device(size, Placement.CPU) == 0
        assert on_device(size, Placement.OFFLOADED) == on_device(size, Placement.RESIDENT) == size.total
        assert size.leaf <= on_device(size, Placement.STREAMED) < size.total / 2


def test_the_budget_covers_what_was_measured_outside_of_the_allocator(ternary: list[Size]) -> None:
    """Once 640 MiB were kept free and 696 were taken: 4.55 GiB of a budget of 4.5, by the driver's count."""
    assert CONTEXT >= MEASURED_OUTSIDE + (64 << 20)
    for budget in ("4.5GiB", "5.3GiB", "6GiB"):
        plan = choose_plan(ternary, FULL, parse_bytes(budget))
        allowed = plan.budget - CONTEXT  # all that PyTorch's allocator may reserve, see `keep_plan`
        assert allowed + MEASURED_OUTSIDE <= plan.budget
        assert max(plan.peaks.values()) - CONTEXT <= allowed
        assert plan.placements["transformer"] is Placement.OFFLOADED
    # One H200, stock forward, W2A16: 3.609 GB allocated at the peak of a step, fewer bytes than the plan reckons with.
    estimate = ternary[2].total + working_bytes(ternary[2], FULL)
    assert 3_608_812_544 < estimate < 3_608_812_544 * 1.1


def test_a_card_of_six_gib_holds_ternary_flux1_dev(ternary: list[Size]) -> None:
    plan = choose_plan(ternary, FULL, parse_bytes("6GiB"))
    clip, t5, transformer, vae = placed(plan)
    assert t5 is Placement.STREAMED
    assert clip is transformer is vae is Placement.OFFLOADED
    assert plan.tile is None
    assert plan.peak < parse_bytes("5.3GiB")  # the bar of what the driver reports
    assert plan.peak == max(plan.peaks.values()) == plan.peaks["steps"]
    assert plan.peaks["steps"] == CONTEXT + round(SLACK * (ternary[2].total + working_bytes(ternary[2], FULL)))


def test_a_large_card_keeps_everything(ternary: list[Size], dense: list[Size]) -> None:
    for sizes in (ternary, dense):
        plan = choose_plan(sizes, FULL, 80 * GIB)
        assert set(placed(plan)) == {Placement.RESIDENT}
        weights = sum(size.total for size in sizes)
        assert all(weights < peak < weights * SLACK + 4e9 for peak in plan.peaks.values())


def test_a_dense_model_is_streamed_where_a_ternary_one_is_not(ternary: list[Size], dense: list[Size]) -> None:
    assert placed(choose_plan(dense, FULL, 6 * GIB))[2] is Placement.STREAMED
    assert placed(choose_plan(ternary, FULL, 6 * GIB))[2] is Placement.OFFLOADED


@pytest.mark.parametrize("which", ["ternary", "dense"])
def test_every_budget_gets_the_fastest_plan_that_fits_or_is_refused(
    which: str, ternary: list[Size], dense: list[Size]
) -> None:
    sizes = ternary if which == "ternary" else dense
    ranks = []
    for budget in BUDGETS:
        all_plans = list(plans(sizes, FULL, budget))
        try:
            plan = choose_plan(sizes, FULL, budget)
        except MemoryPlanError:
            assert not any(p.fits for p in all_plans)
            continue
        assert plan.peak <= budget
        rank = next(i for i, p in enumerate(all_plans) if p == plan)
        assert not any(p.fits for p in all_plans[:rank])
        ranks.append(rank)
    assert len(ranks) > 100
    assert ranks == sorted(ranks, reverse=True)  # more memory never makes it slower
    assert len(set(ranks)) > 4


@pytest.mark.parametrize("which", ["ternary", "dense"])
def test_a_refusal_names_what_would_fit(which: str, ternary: list[Size], dense: list[Size]) -> None:
    sizes = ternary if which == "ternary" else dense
    work = Workload(2048, 2048, batch=4)
    with pytest.raises(MemoryPlanError) as refused:
        choose_plan(sizes, work, int(3.2 * GIB))
    said = str(refused.value)
    assert "\n" not in said
    least = re.search(r"--max-memory (\S+)\)", said)
    assert least
    choose_plan(sizes, work, parse_bytes(least[1]))
    side = re.search(r"--height (\d+) --width (\d+)", said)
    assert side
    assert side[1] == side[2]
    choose_plan(sizes, Workload(int(side[1]), int(side[2])), int(3.2 * GIB))
    with pytest.raises(MemoryPlanError, match="--batch-size 1"):
        choose_plan(sizes, Workload(1024, 1024, batch=8), int(3.2 * GIB))
    with pytest.raises(MemoryPlanError, match="the least is") as hopeless:
        choose_plan(sizes, FULL, 1 << 20)
    assert "would fit" not in str(hopeless.value)


def test_the_guides_table_is_true(ternary: list[Size]) -> None:
    off, on, streamed, cpu = Placement.OFFLOADED, Placement.RESIDENT, Placement.STREAMED, Placement.CPU
    table = [
        (16.3, (on, on, on, on), None),
        (14.2, (on, on, off, off), None),
        (10.5, (off, off, off, off), None),
        (6.9, (off, streamed, on, on), None),
        (4.5, (off, streamed, off, off), None),
        (3.6, (off, streamed, streamed, off), None),
        (2.0, (off, streamed, streamed, off), 512),
        (1.9, (cpu, cpu, streamed, off), 512),
    ]
    for amount, placements, tile in table:
        plan = choose_plan(ternary, FULL, parse_bytes(f"{amount}GiB"))
        assert (tuple(placed(plan)), plan.tile) == (placements, tile), amount
        guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
        assert f"| {amount} GiB |" in guide
    assert placed(choose_plan(ternary, FULL, 6 * GIB)) == list(table[4][1])


def size(name: str, kind: Any, total: int) -> Size:
    return Size(name, kind, total, leaf=total // 10, block=total // 10, outside=0, width=0)


def test_an_offloaded_component_stays_until_the_next_wants_its_place() -> None:
    one, two, core, vae = sizes = [
        size("text_encoder", "text", 10 * GIB),
        size("text_encoder_2", "text", 20 * GIB),
        size("transformer", "transformer", 40 * GIB),
        size("vae", "vae", 80 * GIB),
    ]
    nothing = Workload(16, 16)

    def peaks(*where: Placement) -> dict[str, float]:
        names = [s.name for s in sizes]
        plan = evaluate(sizes, nothing, dict(zip(names, where, strict=True)), None, 0)
        return {stage: round((peak - CONTEXT) / SLACK / GIB) for stage, peak in plan.peaks.items()}

    off, on, streamed, cpu = Placement.OFFLOADED, Placement.RESIDENT, Placement.STREAMED, Placement.CPU
    assert peaks(off, off, off, off) == {"text": 20, "steps": 40, "decode": 80}
    assert peaks(on, on, on, on) == {"text": 150, "steps": 150, "decode": 150}
    # The first encoder is still there while the second is streamed through.
    assert peaks(off, streamed, off, off) == {"text": 12, "steps": 40, "decode": 80}
    # Nothing takes the VAE's place before the transformer of the next batch.
    assert peaks(cpu, cpu, off, off) == {"text": 80, "steps": 40, "decode": 80}
    assert peaks(cpu, cpu, streamed, off)["steps"] == 80 + 8
    assert peaks(on, off, off, off) == {"text": 90, "steps": 50, "decode": 90}
    assert (one, two, core, vae) == tuple(sizes)


def test_the_plan_is_told_to_people_and_programs(ternary: list[Size]) -> None:
    lines = choose_plan(ternary, FULL, 3 * GIB).lines()
    assert lines[0] == "plan for 3.00 GiB:"
    assert re.fullmatch(r"  text_encoder_2 +8\.87 GiB  streamed to the GPU part by part", lines[2])
    assert lines[4].endswith("decoding tiles of 512 pixels")
    assert re.search(r"peaks: text [\d.]+ GiB, steps [\d.]+ GiB, decode [\d.]+ GiB", lines[5])
    told = json.loads(json.dumps(choose_plan(ternary, FULL, 3 * GIB).to_dict()))
    assert told["vae_tile"] == 512
    assert told["components"]["transformer"]["bytes"] == ternary[2].total
    assert max(told["estimated_peaks"].values()) <= told["budget"] == 3 * GIB


def test_sizes_from_configs_are_those_of_the_loaded_pipeline(tiny_flux: Path, tmp_path: Path) -> None:
    quantize(tiny_flux, tmp_path / "ternary", "absmean", device="cpu")
    klein = tiny_flux2_folder(tmp_path / "klein")
    for folder in (tiny_flux, tmp_path / "ternary", klein):
        read = read_sizes(resolve_model(folder), torch.float32)
        assert read == sizes_of(load_pipeline(folder, device="cpu"))
        assert [s.kind for s in read][-2:] == ["transformer", "vae"]
    bare = read_sizes(resolve_model(tmp_path / "ternary" / "transformer", base=tiny_flux), torch.float32)
    assert bare == read_sizes(resolve_model(tmp_path / "ternary"), torch.float32)


def test_what_cannot_be_planned_is_named(tiny_flux: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_flux, tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderOfTomorrow"]}))
    config = json.loads((folder / "vae" / "config.json").read_text())
    (folder / "vae" / "config.json").write_text(json.dumps(config | {"_class_name": "AutoencoderOfTomorrow"}))
    with pytest.raises(ModelError, match="AutoencoderOfTomorrow"):
        read_sizes(resolve_model(folder), torch.float32)
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no vae/config\.json"):
        read_sizes(resolve_model(folder), torch.float32)


def test_shared_tensors_count_once() -> None:
    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    linear = TernaryLinear(256, 64, bias=False)
    model = nn.Module()
    model.blocks = nn.ModuleList([Block(linear), Block(nn.Linear(4, 4, bias=False))])
    model.again = linear
    model.config = type("Config", (), {"num_attention_heads": 2, "attention_head_dim": 8})
    found = measure("transformer", "transformer", model)
    assert found.total == 64 * 64 + 2 * 64 + 4 * 4 * 4
    assert found.block == 64 * 64 + 2 * 64
    assert found.outside == 0
    assert found.matrix == 256 * 64
