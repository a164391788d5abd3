from __future__ import annotations

import time

import pytest
import torch

from tritflow.formats.packing import pack_2bit
from tritflow.kernels import cpu, cpu_activations, reference
from tritflow.kernels.expansion import EXPANSION, Expansion
from tritflow.testing import assert_close


def _owned(weight):
    weight = weight.clone()
    setattr(weight, EXPANSION, Expansion())
    return weight


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("prepacked", [False, True])
@pytest.mark.parametrize("tokens", [1, 17, 300])
def test_int8_path_is_exact(problem, monkeypatch, tokens, prepacked, unsigned):
    if prepacked and not cpu._has_qlinear():
        pytest.skip("oneDNN's qlinear is not in this PyTorch")
    if unsigned and not prepacked and not cpu._takes_unsigned():
        pytest.skip("this PyTorch multiplies signed activations only")
    monkeypatch.setattr(cpu, "_QLINEAR_FROM", 0 if prepacked else 1 << 40)
    monkeypatch.setattr(cpu, "_signed", lambda: not unsigned)
    monkeypatch.setattr(cpu, "_has_int_mm", lambda: True)
    monkeypatch.setattr(cpu, "_COLUMNS", 20)
    monkeypatch.setattr(cpu, "_ROWS", 128)
    p = problem(tokens, 48, 131)
    p["x"][0] = 0.0
    form = cpu._Int8(p["weight"], torch.full((48,), 127.0), None, 131)
    q, amax = cpu_activations.quantize(p["x"], None, form.unsigned)
    expected_q, expected_scale = reference.quantize_activation(p["x"])
    assert torch.equal(amax.squeeze(-1)[1:] / 127, expected_scale[1:])
    exact = expected_q.long() @ p["trits"].long().t()
    sums = torch.cat([form.product(q, block) for block in form.blocks], dim=1)
    assert len(form.blocks) == (3 if prepacked else 1)
    assert torch.equal(sums.long()[1:], exact[1:])  # the row of zeros is multiplied by 0 instead
    args = (p["x"], p["weight"], p["weight_scale"], p["bias"], p["input_scale"])
    assert_close(cpu.w2a8_linear(*args), reference.w2a8_linear(*args), 1e-6)


@pytest.mark.parametrize(("tokens", "in_features"), [(1, 15361), (3, 15360), (40, 3072), (300, 96)])
def test_the_largest_sums_are_exact(monkeypatch, tokens, in_features):
    """AVX2's products of bytes are added in pairs in 16 bits, which saturate; nothing here may come near that."""
    if not cpu._has_qlinear():
        pytest.skip("oneDNN's qlinear is not in this PyTorch")
    monkeypatch.setattr(cpu, "_has_int_mm", lambda: False)
    g = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (35, in_features), generator=g, dtype=torch.int8)
    trits[0], trits[1] = 1, -1
    form = cpu._Int8(pack_2bit(trits), torch.full((35,), 127.0), None, in_features)
    assert form.prepacked
    assert form.unsigned
    q = torch.randint(0, 2, (tokens, in_features), generator=g, dtype=torch.uint8) * 255
    q[0] = 255
    exact = (q.long() - 128) @ trits.long().t()
    assert torch.equal(form.product(q, form.blocks[0]).long(), exact)
    q[0] = 0
    exact = (q.long() - 128) @ trits.long().t()
    assert torch.equal(form.product(q, form.blocks[0]).long(), exact)


def test_without_a_fast_int_mm_every_weight_is_prepacked(problem, monkeypatch):
    if not cpu._has_qlinear():
        pytest.skip("oneDNN's qlinear is not in this PyTorch")
    monkeypatch.setattr(cpu, "_has_int_mm", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    p = problem(2, 16, 64)
    args = (p["x"], p["weight"], p["weight_scale"], p["bias"])
    assert cpu._supports_w2a8(*args)
    assert_close(cpu.w2a8_linear(*args), reference.w2a8_linear(*args), 1e-6)


def test_a_loop_is_told_from_a_kernel():
    def loop(q, t):
        time.sleep(0.05)
        return q.float() @ t.float()

    assert cpu._is_a_loop(loop)
    assert not cpu._is_a_loop(lambda q, t: q)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_emulated_types_are_multiplied_in_float32_and_rounded_once(problem, monkeypatch, dtype):
    monkeypatch.setattr(cpu, "_is_emulated", lambda dtype: True)
    monkeypatch.setattr(cpu, "_has_packed_bf16", lambda: False)
    p = problem(40, 64, 96, dtype)
    weight = _owned(p["weight"])
    dense = reference.dequantize(p["weight"], 96, p["weight_scale"], dtype=dtype)
    expected = torch.nn.functional.linear(p["x"].float(), dense.float(), p["bias"].float()).to(dtype)
    assert torch.equal(cpu.w2a16_linear(p["x"], weight, p["weight_scale"], p["bias"]), expected)
    assert getattr(weight, EXPANSION).bytes == 64 * 96 * 2


@pytest.mark.parametrize("columns", [False, True])
def test_quantize_equals_the_reference_bit_for_bit_in_chunks(problem, columns):
    p = problem(2100, 4, 130, torch.bfloat16)
    c = p["input_scale"] if columns else None
    for found, expected in zip(
        cpu_activations.quantize_activation(p["x"], c), reference.quantize_activation(p["x"], c), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("unsigned", [False, True])
def test_poison_reaches_the_output_and_zeros_give_the_bias(problem, monkeypatch, unsigned):
    if unsigned and not cpu._takes_unsigned():
        pytest.skip("this PyTorch multiplies signed activations only")
    monkeypatch.setattr(cpu, "_signed", lambda: not unsigned)
    p = problem(4, 16, 64)
    p["x"][0, 5], p["x"][1, 5], p["x"][2] = float("nan"), float("inf"), 0.0
    out = cpu.w2a8_linear(p["x"], p["weight"], p["weight_scale"], p["bias"])
    assert not torch.isfinite(out[:2]).any()
    assert torch.equal(out[2], p["bias"])
    assert torch.isfinite(out[3]).all()


def test_an_activation_is_quantized_once_until_it_changes(problem, monkeypatch):
    p, other = problem(4, 16, 64), problem(4, 24, 64, seed=1)
    calls = []
    real = cpu_activations.quantize
    monkeypatch.setattr(cpu_activations, "quantize", lambda *a: calls.append(1) or real(*a))

    def check(count):
        for q in (p, other):
            args = (q["weight"], q["weight_scale"])
            assert_close(cpu.w2a8_linear(p["x"], *args), reference.w2a8_linear(p["x"], *args), 1e-6)
        assert len(calls) == count

    check(1)
    p["x"].mul_(-3)
    check(2)
    p["x"].data = other["x"].clone()
    check(3)
    del p["x"]
    assert cpu_activations.last.entry is None
    p["x"] = torch.randn(4, 64)
    check(4)


def test_a_bf16_layer_equals_the_dense_bf16_layer(problem):
    p = problem(40, 64, 96, torch.bfloat16)
    dense = reference.dequantize(p["weight"], 96, p["weight_scale"], dtype=torch.bfloat16)
    assert torch.equal(dense.float(), reference.dequantize(p["weight"], 96, p["weight_scale"]))
    out = cpu.w2a16_linear(p["x"], p["weight"], p["weight_scale"], p["bias"])
    assert_close(out, torch.nn.functional.linear(p["x"], dense, p["bias"]), 4e-3)


def test_the_packed_layout_serves_every_number_of_tokens(problem):
    p = problem(700, 64, 96, torch.bfloat16)
    weight = _owned(p["weight"])
    expected = reference.w2a16_linear(p["x"], weight, p["weight_scale"])
    for tokens in (1, 3, 64, 700, 2):
        assert_close(cpu.w2a16_linear(p["x"][:tokens], weight, p["weight_scale"]), expected[:tokens], 4e-3)


@pytest.mark.parametrize("op", ["w2a16_linear", "w2a8_linear"])
def test_expansion_is_kept_and_follows_every_change(problem, op):
    run, truth = getattr(cpu, op), getattr(reference, op)
    p, other = problem(4, 16, 64), problem(4, 16, 64, seed=1)
    weight, scale = _owned(p["weight"]), p["weight_scale"].clone()
    expansion = getattr(weight, EXPANSION)
    run(p["x"], weight, scale)
    form = expansion.form
    assert expansion.bytes == 16 * 64 * (4 if op == "w2a16_linear" else 1)
    run(p["x"], weight, scale)
    assert expansion.form is form

    weight.copy_(other["weight"])
    assert_close(run(p["x"], weight, scale), truth(p["x"], other["weight"], scale), 1e-5)
    weight.data = p["weight"].clone()
    assert_close(run(p["x"], weight, scale), truth(p["x"], p["weight"], scale), 1e-5)
    scale.mul_(2)
    assert_close(run(p["x"], weight, scale), truth(p["x"], p["weight"], scale), 1e-5)


def test_nothing_stays_on_a_plain_weight(problem, monkeypatch):
    p = problem(4, 16, 64)
    built = []
    real = cpu.reference.trits
    monkeypatch.setattr(cpu.reference, "trits", lambda *a: built.append(1) or real(*a))
    for _ in range(3):
        cpu.w2a8_linear(p["x"], p["weight"], p["weight_scale"])
    assert len(built) == 3
    weight = _owned(p["weight"])
    for _ in range(3):
        cpu.w2a8_linear(p["x"], weight, p["weight_scale"])
    assert len(built) == 4


def test_a_small_weight_is_prepacked_once_its_results_are_large_and_stays_so(problem, monkeypatch):
    if not cpu._has_qlinear():
        pytest.skip("oneDNN's qlinear is not in this PyTorch")
    monkeypatch.setattr(cpu, "_has_int_mm", lambda: True)
    monkeypatch.setattr(cpu, "_QLINEAR_RESULT", 32 * 48)
    monkeypatch.setattr(cpu, "_RESULT_CHUNK", 10 * 48)
    p = problem(32, 48, 131)
    weight = _owned(p["weight"])
    forms = []
    for tokens in (31, 32, 1, 32):  # 32 rows are scaled in chunks of 10
        args = (p["x"][:tokens], weight, p["weight_scale"], p["bias"])
        plain = (p["x"][:tokens], p["weight"], p["weight_scale"], p["bias"])
        assert_close(cpu.w2a8_linear(*args), reference.w2a8_linear(*plain), 1e-6)
        forms.append(getattr(weight, EXPANSION).form)
    assert [form.prepacked for form in forms] == [False, True, True, True]
    assert forms[1] is forms[2] is forms[3]
    assert getattr(weight, EXPANSION).bytes == 48 * 131


def test_without_onednn_the_reference_takes_over(problem, monkeypatch):
    monkeypatch.setattr(cpu, "_has_int_mm", lambda: False)
    monkeypatch.setattr(cpu, "_has_qlinear", lambda: False)
    p = problem(4, 16, 64)
    args = (p["x"], p["weight"], p["weight_scale"])
    assert not cpu._supports_w2a8(*args)
    assert torch.equal(torch.ops.tritflow.w2a8_linear(*args), reference.w2a8_linear(*args))
