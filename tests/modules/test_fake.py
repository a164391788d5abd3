from __future__ import annotations

import pytest
import torch

from tritflow.kernels import quantize_activation
from tritflow.modules import FakeTernaryLinear
from tritflow.testing import assert_close, random_linear


def _fake(columns=False, seed=0, bias=True, **kwargs):
    g = torch.Generator().manual_seed(seed)
    linear = random_linear(120, 48, seed=seed, bias=bias)
    scale = linear.weight.detach().abs().mean(1) * 1.1
    input_scale = torch.rand(120, generator=g) + 0.5 if columns else None
    return FakeTernaryLinear.from_linear(linear, scale, input_scale, **kwargs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("bits", "kind"), [(16, "int8"), (8, "int8"), (8, "float8_e4m3fn")])
def test_converting_changes_nothing(columns, bits, kind, bias):
    fake = _fake(columns, bias=bias, activation_bits=bits, activation_dtype=kind)
    x = torch.randn(3, 11, 120)
    for _ in range(2):
        ternary = fake.to_ternary()
        assert ternary.mode == ("w2a8" if bits == 8 else "w2a16")
        assert torch.equal(ternary.trits(), fake.trits())
        assert_close(ternary(x), fake(x), 2e-6)
        with torch.no_grad():  # moved by training, not only at the start
            for p in fake.parameters():
                p.add_(torch.randn(p.shape) * 0.02)
    assert fake.trits().unique().tolist() == [-1, 0, 1]


def test_converting_changes_nothing_in_bf16_beyond_its_rounding():
    fake = _fake(activation_bits=8)
    x = torch.randn(64, 120).bfloat16()
    assert_close(fake(x), fake.to_ternary()(x), 5e-3)


def test_trits_are_the_rounded_latents():
    fake = _fake(columns=True)
    rows, columns = fake.scales()
    assert torch.equal(rows, rows.bfloat16().float())
    assert torch.equal(columns, columns.bfloat16().float())
    assert torch.equal(fake.trits().float(), fake.weight.round().clamp(-1, 1))
    linear = random_linear(120, 48)
    assert_close(fake.weight * rows[:, None] * columns, linear.weight, 1e-6)


def test_gradients_pass_straight_through_to_latents_and_truly_to_scales():
    fake = _fake(columns=True)
    x, seed = torch.randn(9, 120), torch.randn(9, 48)
    fake(x).backward(seed)
    rows, columns = (s.detach() for s in fake.scales())
    trits = fake.trits().float()
    assert_close(fake.weight.grad, (seed.t() @ x) * rows[:, None] * columns, 1e-5)
    through_rows = ((seed.t() @ x) * trits * columns).sum(1) * fake.log_weight_scale.detach().exp()
    assert_close(fake.log_weight_scale.grad, through_rows, 1e-5)
    through_columns = ((seed.t() @ x) * trits * rows[:, None]).sum(0) * fake.log_input_scale.detach().exp()
    assert_close(fake.log_input_scale.grad, through_columns, 1e-5)
    assert_close(fake.bias.grad, seed.sum(0), 1e-6)


def test_eight_bit_activations_are_those_of_the_kernel_with_a_straight_gradient():
    fake = _fake(activation_bits=8, bias=False)
    x = torch.randn(9, 120, requires_grad=True)
    q, scale = fake._quantize(x)
    expected_q, expected_scale = quantize_activation(x.detach())
    assert torch.equal(q.detach().to(torch.int8), expected_q)
    assert torch.equal(scale.squeeze(-1), expected_scale)
    seed = torch.randn(9, 48)
    fake(x).backward(seed)
    rows, _ = fake.scales()
    assert_close(x.grad, seed @ (rows.detach()[:, None] * fake.trits()), 1e-5)


def test_given_trits_are_kept_and_other_latents_left_alone():
    linear = random_linear(120, 48)
    scale = linear.weight.detach().abs().mean(1)
    g = torch.Generator().manual_seed(3)
    trits = torch.randint(-1, 2, (48, 120), generator=g, dtype=torch.int8)
    fake = FakeTernaryLinear.from_linear(linear, scale, trits=trits)
    assert torch.equal(fake.trits(), trits)
    natural = FakeTernaryLinear.from_linear(linear, scale)
    inner = (natural.trits() == trits) & ((linear.weight / scale[:, None]).frac().abs() < 0.4)
    assert inner.float().mean() > 0.1
    assert torch.equal(fake.weight[inner], natural.weight[inner])
    rows, _ = natural.scales()
    assert_close(natural.weight * rows[:, None], linear.weight, 1e-6)


def test_trits_that_stand_still_take_a_byte_and_learn_nothing():
    moving = _fake(columns=True)
    linear, (rows, columns) = random_linear(120, 48), moving.scales()
    linear.weight = torch.nn.Parameter(linear.weight.to("meta"))
    still = FakeTernaryLinear.from_linear(
        linear, rows.detach(), columns.detach(), trits=moving.trits(), latent_dtype=torch.int8, device="cpu"
    )
    assert still.weight.nbytes == 120 * 48
    assert torch.equal(still.trits(), moving.trits())
    x = torch.randn(5, 120)
    for fake in (still, moving):
        fake(x).square().sum().backward()
    assert torch.equal(still(x), moving(x))
    assert torch.equal(still.to_ternary()(x), moving.to_ternary()(x))
    assert still.weight.grad is None
    assert_close(still.log_weight_scale.grad, moving.log_weight_scale.grad, 5e-3)  # of scales before their rounding
    assert still.float().weight.dtype == torch.int8
    with pytest.raises(ValueError, match="have to be given"):
        FakeTernaryLinear.from_linear(linear, rows.detach(), latent_dtype=torch.int8, device="cpu")


def test_a_row_of_zeros_stays_zero():
    linear = random_linear(16, 4)
    with torch.no_grad():
        linear.weight[1] = 0
    fake = FakeTernaryLinear.from_linear(linear, linear.weight.detach().abs().mean(1))
    assert not fake.trits()[1].any()
    assert torch.isfinite(fake(torch.randn(2, 16))).all()


@pytest.mark.parametrize("bits", [8, 16])
def test_training_lowers_the_loss_and_moves_trits(bits):
    torch.manual_seed(0)
    target = random_linear(120, 48, seed=5)
    fake = FakeTernaryLinear.from_linear(target, target.weight.detach().abs().mean(1), activation_bits=bits)
    before = fake.trits()
    optimizer = torch.optim.Adam(fake.parameters(), lr=3e-3)
    losses = []
    mix = torch.randn(24, 120) * 0.2  # correlated inputs: with white ones rounding each weight alone is the optimum
    for _ in range(60):
        x = torch.randn(128, 24) @ mix
        loss = (fake(x) - target(x)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])
    assert (fake.trits() != before).float().mean() > 0.005


def test_compiles_whole_in_training():
    fake = _fake(columns=True, activation_bits=8)
    x = torch.randn(5, 120)
    fake(x).square().sum().backward()
    expected = {n: p.grad.clone() for n, p in fake.named_parameters()}
    fake.zero_grad()
    torch.compile(fake, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for name, p in fake.named_parameters():
        assert_close(p.grad, expected[name], 1e-5)


def test_state_dict_round_trip_and_bad_settings():
    source, target = _fake(columns=True), _fake(columns=True, seed=1)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source.to_ternary().packed, target.to_ternary().packed)
    with pytest.raises(ValueError, match="8 or 16"):
        FakeTernaryLinear(8, 8, activation_bits=4)
    with pytest.raises(ValueError, match="int4"):
        FakeTernaryLinear(8, 8, activation_dtype="int4")
