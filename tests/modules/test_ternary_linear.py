from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritflow.config import ConfigError
from tritflow.formats.packing import pack_base3
from tritflow.kernels import w2a8_linear
from tritflow.modules import PackedWeight, TernaryLinear
from tritflow.testing import assert_close, random_linear


def _dense(layer, x):
    return F.linear(x, layer.dequantize(), layer.bias)


@pytest.mark.parametrize("columns", [False, True])
def test_forward_is_the_dequantized_layer(make_ternary, columns):
    layer = make_ternary(columns=columns)
    x = torch.randn(2, 5, 200)
    assert_close(layer(x), _dense(layer, x), 1e-5)
    layer.mode = "w2a8"
    assert_close(layer(x), _dense(layer, x), 2e-2)
    assert not torch.equal(layer(x), _dense(layer, x))
    expected = w2a8_linear(x, layer.packed, layer.weight_scale, layer.bias, layer.input_scale, backend="reference")
    assert_close(layer(x), expected, 1e-6)


def test_the_weight_shows_its_logical_shape_and_stores_bytes(make_ternary):
    layer = make_ternary()
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.weight, PackedWeight)
    assert layer.weight.shape == layer.weight.size() == (64, 200)
    assert (layer.weight.size(1), layer.weight.size(-1)) == (200, 200)
    assert layer.weight.numel() == 64 * 200
    assert layer.weight.nbytes == layer.weight.nelement() == 64 * 64
    assert layer.packed.shape == (64, 64)
    assert type(layer.packed) is torch.Tensor
    assert layer.packed.data_ptr() == layer.weight.data_ptr()
    assert [n for n, _ in layer.named_parameters()] == ["weight", "bias"]
    assert {n: tuple(t.shape) for n, t in layer.state_dict().items()} == {
        "weight": (64, 64),
        "weight_scale": (64,),
        "bias": (64,),
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("columns", [False, True])
def test_state_dict_round_trip(make_ternary, columns, assign):
    source, target = make_ternary(columns=columns), make_ternary(columns=columns, seed=1)
    x = torch.randn(3, 200)
    target(x)  # builds the expansion that loading must replace
    state = {k: v.clone() for k, v in source.state_dict().items()}
    assert not target.load_state_dict(state, strict=True, assign=assign).missing_keys
    assert torch.equal(target(x), source(x))
    assert torch.equal(target.trits(), source.trits())
    assert list(target.state_dict()) == list(source.state_dict())
    assert (target.packed.data_ptr() == state["weight"].data_ptr()) is assign


def test_five_trits_a_byte_are_expanded_on_loading(make_ternary):
    source, target = make_ternary(), make_ternary(seed=1)
    target.load_state_dict(source.state_dict() | {"weight": pack_base3(source.trits())})
    assert torch.equal(target.packed, source.packed)


def test_bad_states_are_refused_by_name(make_ternary):
    layer = make_ternary()
    state = layer.state_dict()
    before = layer.packed.clone()
    bad_code = state["weight"].clone()
    bad_code[3, 0] = 0b10
    for name, tensor, message in (
        ("weight", torch.randn(64, 200), "weight: "),
        ("weight", state["weight"][:10], "weight: "),
        ("weight", bad_code, "code 10"),
        ("weight_scale", torch.ones(3), "weight_scale"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(state | {name: tensor})
        assert torch.equal(layer.packed, before)
    with pytest.raises(RuntimeError, match=r"Missing key.*weight"):
        layer.load_state_dict({k: v for k, v in state.items() if k != "weight"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*input_scale"):
        layer.load_state_dict(state | {"input_scale": torch.ones(200)})


def test_dtype_changes_touch_the_bias_alone(make_ternary):
    layer = nn.Sequential(make_ternary(columns=True))
    digest = {k: v.clone() for k, v in layer.state_dict().items()}
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        layer.to(dtype)
        assert layer[0].weight.dtype == torch.uint8
        assert isinstance(layer[0].weight, PackedWeight)
        assert layer[0].bias.dtype == dtype
        assert torch.equal(layer[0].weight_scale, digest["0.weight_scale"])
        assert torch.equal(layer[0].input_scale, digest["0.input_scale"])
        assert layer(torch.randn(2, 200, dtype=dtype)).dtype == dtype


def test_moves_through_meta_keep_the_parameter_and_drop_the_expansion(make_ternary):
    source = make_ternary()
    x = torch.randn(2, 200)
    expected = source(x)
    assert source.expanded_bytes > 0
    moved = copy.deepcopy(source).to("meta")
    assert isinstance(moved.weight, PackedWeight)
    assert moved.weight.shape == (64, 200)
    assert moved.expanded_bytes == 0
    back = moved.to_empty(device="cpu")
    back.load_state_dict(source.state_dict())
    assert torch.equal(back(x), expected)
    source.to("cpu")
    assert source.expanded_bytes == 0


def test_on_meta_the_weight_has_the_shape_of_its_bytes_too(make_ternary):
    weight = make_ternary().to("meta").weight
    assert weight.shape == (64, 200)
    assert weight.shape == torch.Size((64, 64))  # accelerate's test before it puts bytes back
    assert (weight.shape != torch.Size((64, 64))) is False
    assert weight.shape != (64, 65)
    assert tuple(weight.shape) == (64, 200)
    assert weight.shape.numel() == weight.numel() == 64 * 200
    assert hash(weight.shape) == hash((64, 200))


def test_a_parameter_rebuilt_from_bytes_finds_its_width_again(make_ternary):
    layer = make_ternary()
    x = torch.randn(2, 200)
    expected = layer(x)
    layer._parameters["weight"] = PackedWeight(layer.packed)  # as accelerate does: it knows the bytes alone
    assert layer._parameters["weight"].in_features == 256
    assert layer.weight.shape == (64, 200)
    assert layer._parameters["weight"].in_features == 200
    assert torch.equal(layer(x), expected)


def test_keep_expanded_trades_memory(make_ternary):
    kept, lean = make_ternary(), make_ternary(keep_expanded=False)
    x = torch.randn(2, 200)
    assert torch.equal(kept(x), lean(x))
    assert (kept.expanded_bytes, lean.expanded_bytes) == (64 * 200 * 4, 0)
    kept.mode = "w2a8"
    kept(x)
    assert kept.expanded_bytes == 64 * 200


def test_copies_are_independent(make_ternary):
    layer = make_ternary()
    x = torch.randn(2, 200)
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, PackedWeight)
    twin.packed.zero_()
    assert torch.equal(twin(x), twin.bias.expand(2, 64))
    assert torch.equal(layer(x), expected)
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), expected)


def test_offloading_by_data_swap_is_seen(make_ternary):
    layer, other = make_ternary(), make_ternary(seed=1)
    x = torch.randn(2, 200)
    layer(x)
    layer.weight.data = other.packed.clone()
    layer.weight_scale.copy_(other.weight_scale)
    layer.bias.data = other.bias.data
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_compiles_whole_and_follows_new_weights(make_ternary, mode):
    layer, other = make_ternary(mode=mode, columns=True), make_ternary(mode=mode, columns=True, seed=1)
    model = nn.Sequential(layer, nn.GELU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 200)
    with torch.no_grad():
        assert torch.equal(compiled(x), model(x))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), F.gelu(other(x)))
        assert layer.expanded_bytes > 0
    x.requires_grad_()
    compiled(x).sum().backward()
    found, x.grad = x.grad, None
    model(x).sum().backward()
    assert_close(found, x.grad, 1e-6)


def test_gradients_reach_the_input_and_no_weight(make_ternary):
    layer = make_ternary(columns=True).requires_grad_(True)
    x = torch.randn(3, 200, requires_grad=True)
    layer(x).square().sum().backward()
    y = x.detach().requires_grad_()
    _dense(layer, y).square().sum().backward()
    assert_close(x.grad, y.grad, 1e-4)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


def test_set_packed(make_ternary):
    layer, other = make_ternary(), make_ternary(seed=1)
    layer.set_packed_(other.packed)
    assert torch.equal(layer.trits(), other.trits())
    with pytest.raises(ValueError, match="64 rows"):
        layer.set_packed_(other.packed[:5])
    with pytest.raises(ValueError, match="uint8"):
        layer.set_packed_(other.packed.float())
    with pytest.raises(ValueError, match="no gradient"):
        PackedWeight(other.packed, requires_grad=True)
    assert PackedWeight(other.packed).shape == (64, 256)


def test_from_linear_refuses_what_does_not_fit():
    linear = random_linear(8, 4)
    trits = torch.zeros(4, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match="weight_scale"):
        TernaryLinear.from_linear(linear, trits, torch.ones(8))
    with pytest.raises(ValueError, match="input_scale"):
        TernaryLinear.from_linear(linear, trits, torch.ones(4), torch.ones(4))
    with pytest.raises(ValueError, match="trits"):
        TernaryLinear.from_linear(linear, trits + 2, torch.ones(4))
    with pytest.raises(ConfigError, match="did you mean 'w2a8'"):
        TernaryLinear(8, 4, mode="w2a9")


def test_meta_construction_is_filled_piece_by_piece(make_ternary):
    source = make_ternary(columns=True)
    layer = TernaryLinear(200, 64, bias=True, column_scale=True, device="meta")
    assert all(t.is_meta for t in layer.state_dict().values())
    layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(2, 200)
    assert torch.equal(layer(x), source(x))


def test_zero_tokens(make_ternary):
    for mode in ("w2a16", "w2a8"):
        assert make_ternary(mode=mode)(torch.randn(2, 0, 200)).shape == (2, 0, 64)
