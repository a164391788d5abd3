"""Other quantizers on a tiny FLUX. Libraries that are not installed are skipped; what stands in for them is not."""

import dataclasses
import importlib.util

import pytest
import torch

from tritflow.config import CalibrationConfig, DistillationConfig, OnlineConfig, Recipe
from tritflow.distillation.guard import DistillationError
from tritflow.distillation.online import OnlineStates
from tritflow.models import FLUX1
from tritflow.pipelines.quantize import plan
from tritflow.pipelines.rivals import (
    RIVALS,
    RivalError,
    absmean_lora,
    apply_rival_,
    chosen_rivals,
    find_rival,
    rival_identity,
)
from tritflow.pipelines.rivals.gptq import grid, round_gptq
from tritflow.pipelines.rivals.simulated import (
    LowRankInt4,
    int4_groups,
    nf4_levels,
    round_k_quant,
    round_nf4,
    round_tq2_0,
)
from tritflow.testing import random_linear, relative_error, tiny_flux_transformer, transformer_inputs


def flux(dtype=torch.float32):
    model = tiny_flux_transformer(hidden=256, heads=4, double=1, single=1).to(dtype)
    return model, list(FLUX1.block_linears({"_class_name": "FluxTransformer2DModel", **model.config}))


def installed(rival):
    if rival.module is None:
        return True
    try:
        return importlib.util.find_spec(rival.module) is not None
    except ModuleNotFoundError:
        return False


# Bits a weight of the format with fp32 scales (0: depends on the library's version), and the largest relative error
# of a whole forward that its bits allow.
EXPECTED = {
    "nf4": (4.127, 0.2),
    "quanto-int4": (4.5, 0.2),
    "quanto-int2": (2.5, 0.9),
    "sdnq-uint4": (0, 0.2),
    "sdnq-uint2": (0, 0.8),
    "hqq-2": (3.0, 0.8),
    "hqq-4": (5.0, 0.2),
    "gguf-tq2_0": (2.0625, 1.5),
    "q2_k-simulated": (2.625, 0.8),
    "q4_k-simulated": (4.5, 0.2),
    "svdquant-simulated": (0, 0.3),
    "nf4-simulated": (4.127, 0.2),
    "tq2_0-simulated": (2.0625, 1.5),
}


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_it_quantizes_every_block_linear_and_says_how_many_bits(name):
    rival = RIVALS[name]
    if not installed(rival):
        pytest.skip(f"{rival.package} is not installed")
    model, names = flux()
    inputs = transformer_inputs(model, batch=2)
    with torch.no_grad():
        before = model(**inputs)[0]
        dense = {n: model.get_submodule(n).weight.clone() for n in names}
        facts = apply_rival_(rival, model, names)
        after = model(**inputs)[0]
    bits, worst = EXPECTED[name]
    assert facts["weights"] == sum(w.numel() for w in dense.values())
    assert facts["bits_per_weight"] == pytest.approx(8 * facts["bytes"] / facts["weights"], abs=1e-3)
    if bits:
        assert facts["bits_per_weight"] == pytest.approx(bits, abs=0.02)
    assert 2.0 < facts["bits_per_weight"] < 8.0
    assert 1e-4 < relative_error(after, before) < worst
    assert facts["simulated"] == name.endswith("-simulated")
    changed = [n for n in names if type(model.get_submodule(n)) is torch.nn.Linear]
    assert all(not torch.equal(model.get_submodule(n).weight, dense[n]) for n in changed)
    assert type(model.proj_out) is torch.nn.Linear


def test_a_rival_that_cannot_run_says_so_in_a_line():
    model, names = flux()
    with pytest.raises(RivalError, match="did you mean 'nf4'"):
        find_rival("nf3")
    torchao = RIVALS["torchao-int4"]
    reason = torchao.why_not(torch.device("cpu"), torch.bfloat16)
    assert "CUDA" in reason or 'pip install "tritflow[rivals]"' in reason
    with pytest.raises(RivalError):
        apply_rival_(torchao, model, names)
    for name in ("q2_k-simulated", "svdquant-simulated"):
        small = tiny_flux_transformer()
        with pytest.raises(RivalError, match="inputs"):
            apply_rival_(RIVALS[name], small, ["transformer_blocks.0.attn.to_q"])
    model.transformer_blocks[0].attn.to_q = torch.nn.Identity()
    with pytest.raises(RivalError, match="not a dense linear"):
        apply_rival_(RIVALS["q4_k-simulated"], model, names)


COUNTS, COLORS, SHAPES = ("one", "two", "three"), ("red", "blue", "green", "black"), ("cube", "star", "ring")
LEARN = Recipe(
    "learn",
    calibration=CalibrationConfig(num_inference_steps=4, batch_size=9),
    distillation=DistillationConfig(steps=60, batch_size=16, learning_rate=1e-3, warmup_steps=2, checkpoint_every=0),
)


def test_absmean_with_a_lora_learns_on_the_recipes_own_states_at_its_own_rate(tiny_flux, tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{n} {c} {s}" for n in COUNTS for c in COLORS for s in SHAPES))
    steps = dataclasses.replace(LEARN.distillation, steps=6, learning_rate=1e3)  # of other weights than the branch's
    recipe = dataclasses.replace(LEARN, distillation=steps, online=OnlineConfig(pool=2, num_inference_steps=4))
    job = plan(tiny_flux, recipe, prompts=prompts, device="cpu")
    seen = []
    distill = absmean_lora.distill_

    def watched(*args, **kwargs):
        seen.append((args[1][0].learning_rate, kwargs["states"]))
        return distill(*args, **kwargs)

    monkeypatch.setattr(absmean_lora, "distill_", watched)
    slow = absmean_lora.train(job, tmp_path / "lora", learning_rate=1e-5)
    assert slow["branch_rate"] == 1e-5
    fast = absmean_lora.train(job, tmp_path / "other", learning_rate=1e-3)
    assert fast["validation_mse"]["6"] < slow["validation_mse"]["6"]
    assert [rate for rate, _ in seen] == [1e-5, 1e-3]
    assert all(isinstance(states, OnlineStates) for _, states in seen)
    assert absmean_lora.train(job, tmp_path / "lora", learning_rate=1e-5) == slow  # nothing left to do
    with pytest.raises(DistillationError, match="another run"):
        absmean_lora.train(job, tmp_path / "lora", learning_rate=1e-4)


def test_absmean_with_a_lora_is_trained_resumed_and_applied(tiny_flux, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"{n} {c} {s}" for n in COUNTS for c in COLORS for s in SHAPES))
    job = plan(tiny_flux, LEARN, prompts=prompts, device="cpu")
    meta = absmean_lora.train(job, tmp_path / "lora")
    assert meta["validation_mse"]["60"] < 0.95 * meta["validation_mse"]["0"]
    assert absmean_lora.train(job, tmp_path / "lora") == meta  # nothing left to do
    rival = find_rival(f"absmean-lora={tmp_path / 'lora'}")
    assert rival_identity(rival)["settings"]["trained"]["adapter_sha256"] == meta["adapter_sha256"]
    model = tiny_flux_transformer()
    names = list(FLUX1.block_linears({"_class_name": "FluxTransformer2DModel", **model.config}))
    errors = []
    inputs = transformer_inputs(model, batch=8, seed=3)
    with torch.no_grad():
        target = model(**inputs)[0]
        for trained in (False, True):
            student = tiny_flux_transformer()
            if trained:
                facts = apply_rival_(rival, student, names)
            else:
                absmean_lora.insert_(student, names)
            errors.append(relative_error(student(**inputs)[0], target))
    assert errors[1] < errors[0]
    rank_bits = 16 * (32 + 32) / (32 * 32)  # rank 1 beside a 32 x 32 linear
    assert 2.0 < facts["bits_per_weight"] < 2.0 + rank_bits + 0.6
    with pytest.raises(RivalError, match="is trained first"):
        apply_rival_(RIVALS["absmean-lora"], tiny_flux_transformer(), names)
    with pytest.raises(RivalError, match="holds no"):
        rival_identity(find_rival("absmean-lora=nowhere"))
    with pytest.raises(RivalError, match="is not trained"):
        find_rival("nf4=folder")
    with pytest.raises(RivalError, match="no distillation"):
        absmean_lora.train(plan(tiny_flux, "fast"), tmp_path / "no")


def test_an_identity_tells_rivals_and_versions_apart():
    seen = [str(rival_identity(rival)) for rival in RIVALS.values()]
    assert len(set(seen)) == len(RIVALS)
    assert all(rival.name == name for name, rival in RIVALS.items())


def test_k_quants_are_on_their_grid_and_better_than_rounding_to_the_range():
    w = random_linear(512, 8).weight.detach()
    for block, bits, scale_bits in ((16, 2, 4), (32, 4, 6)):
        q = round_k_quant(w, block, bits, scale_bits)
        groups, rounded = w.reshape(-1, block), q.reshape(-1, block)
        assert max(len(set(row)) for row in rounded.tolist()) <= 2**bits
        low, high = groups.amin(1, keepdim=True).clamp_max(0), groups.amax(1, keepdim=True)
        step = (high - low) / (2**bits - 1)
        naive = ((groups - low) / step).round() * step + low
        assert (rounded - groups).square().sum() < (naive - groups).square().sum()
    assert torch.equal(round_k_quant(torch.zeros(2, 256), 16, 2, 4), torch.zeros(2, 256))


def test_int4_groups_and_the_low_rank_branch():
    x = torch.randn(3, 128)
    q = int4_groups(x, 64)
    assert (q - x).abs().max() <= x.abs().max() / 14 + 1e-6
    assert len(q[0, :64].unique()) <= 15
    linear = random_linear(128, 96)
    whole = LowRankInt4(linear, 96, 64)  # of full rank nothing is left to round
    with torch.no_grad():
        assert relative_error(whole(x), linear(x)) < 1e-4
        errors = [relative_error(LowRankInt4(linear, rank, 64)(x), linear(x)) for rank in (1, 48)]
    assert errors[1] < errors[0] < 0.25


def test_nf4_has_its_published_levels_and_takes_the_nearest():
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    assert nf4_levels().tolist() == pytest.approx(published, abs=2e-6)
    w = random_linear(512, 64).weight.detach()
    q = round_nf4(w)
    amax = w.reshape(-1, 64).abs().amax(1, keepdim=True)
    levels = nf4_levels()
    nearest = levels[(w.reshape(-1, 64)[..., None] / amax[..., None] - levels).abs().argmin(-1)] * amax
    # Only the second quantization, of the maxima, stands between: 8 bits of what they differ by.
    # It may tip a weight on a border to the next level.
    assert relative_error(q.reshape(-1, 64), nearest) < 0.04
    assert 0.05 < relative_error(q, w) < 0.12


def test_tq2_0_is_the_largest_magnitude_a_block():
    w = random_linear(512, 8).weight.detach()
    q = round_tq2_0(w).reshape(-1, 256)
    for row, block in zip(q, w.reshape(-1, 256), strict=True):
        scale = float(block.abs().max().half())
        assert set(row.tolist()) <= {-scale, 0.0, scale}
        assert torch.equal(row != 0, block.abs() >= 0.5 * block.abs().max())


def test_gptq_stays_on_its_grid_and_beats_rounding_to_it():
    g = torch.Generator().manual_seed(0)
    w = random_linear(128, 96).weight.detach()
    x = torch.randn(2000, 128, generator=g) @ torch.randn(128, 128, generator=g)  # correlated inputs
    h = x.T @ x / len(x)
    q = round_gptq(w, h, 2, 64)
    plain = torch.empty_like(w)
    for start in (0, 64):
        part = w[:, start : start + 64]
        step, zero = grid(part, 2)
        codes = ((part / step[:, None]).round() + zero[:, None]).clamp(0, 3)
        plain[:, start : start + 64] = (codes - zero[:, None]) * step[:, None]
        assert all(len(set(row)) <= 4 for row in q[:, start : start + 64].tolist())

    def error(rounded):
        return float((((rounded - w) @ h) * (rounded - w)).sum())

    assert error(q) < 0.7 * error(plain)
    # Inputs that are independent and alike leave nothing to push around but the rounding itself.
    even = round_gptq(w, torch.eye(128), 2, 64)
    assert (even - w).square().sum() == pytest.approx(float((plain - w).square().sum()), rel=1e-4)


def test_all_rivals_are_those_that_need_no_training_and_no_twice():
    names = [rival.name for rival in chosen_rivals("all")]
    assert "absmean-lora" not in names
    assert "gptq-2" in names
    assert ("nf4-simulated" in names) == (not installed(RIVALS["nf4"]))
    assert [r.name for r in chosen_rivals("hqq-2, gptq-2")] == ["hqq-2", "gptq-2"]
    with pytest.raises(RivalError, match="did you mean 'gptq-2'"):
        chosen_rivals("gptq2")


def test_a_rival_that_calibrates_wants_the_pipeline():
    model, names = flux()
    with pytest.raises(RivalError, match="needs the whole pipeline"):
        apply_rival_(RIVALS["gptq-2"], model, names)
