import pytest
import torch
from torch import nn

from tritflow.config import TernaryConfig
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.modules.ternary_linear import TernaryLinear
from tritflow.quantization.compensate import compensate
from tritflow.quantization.convert import convert_, prepare_, twin_rounding
from tritflow.quantization.rounding import Rounded, round_weight
from tritflow.quantization.store import RoundedStore

CONFIG = TernaryConfig(targets=("blocks.*",), skip=("blocks.2",))


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Module()
        net.blocks = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 20), nn.Linear(20, 8, bias=False))
        net.head = nn.Linear(8, 3)
    return net.eval()


def output(net, x):
    return net.head(net.blocks(x)).detach()


def test_prepared_equals_converted_and_keeps_the_rest_dense():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    net, direct = model(), model()
    assert prepare_(net, CONFIG) == ["blocks.0", "blocks.3"]
    assert isinstance(net.blocks[0], FakeTernaryLinear)
    assert type(net.blocks[2]) is type(net.head) is nn.Linear
    prepared = output(net, x)
    assert convert_(net, CONFIG) == ["blocks.0", "blocks.3"]
    assert isinstance(net.blocks[3], TernaryLinear)
    torch.testing.assert_close(output(net, x), prepared, rtol=1e-5, atol=1e-6)
    assert convert_(direct, CONFIG) == ["blocks.0", "blocks.3"]
    torch.testing.assert_close(output(direct, x), prepared, rtol=1e-5, atol=1e-6)
    dense = output(model(), x)
    assert 0 < (prepared - dense).norm() < dense.norm()


def test_roundings_made_elsewhere_are_taken_over_exactly():
    net = model()
    weight = net.blocks[0].weight.detach()
    mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(3))
    trits, scale = compensate(weight, mix @ mix.T)
    assert not torch.equal(trits, round_weight(weight).trits)
    q = Rounded(trits, scale, bias=torch.arange(20.0))
    prepare_(net, CONFIG, rounded={"blocks.0": q}, activation_bits=8)
    twin = net.blocks[0]
    assert torch.equal(twin.trits(), trits)
    assert torch.equal(twin.bias, q.bias)
    assert twin.activation_bits == 8
    again = twin_rounding(twin)
    assert torch.equal(again.trits, trits)
    assert torch.equal(again.weight_scale, scale.bfloat16().float())
    with pytest.raises(ValueError, match=r"the rounding of 'blocks\.3'"):
        prepare_(model(), CONFIG, rounded={"blocks.3": q})


def test_mode_and_column_scales_come_from_the_config():
    import dataclasses

    config = dataclasses.replace(CONFIG, mode="w2a8", column_scale=True, activation_dtype="float8_e4m3fn")
    net = model()
    prepare_(net, config)
    assert net.blocks[0].activation_bits == 8
    assert net.blocks[0].log_input_scale.shape == (12,)
    convert_(net, config)
    assert net.blocks[0].mode == "w2a8"
    assert net.blocks[0].activation_dtype == "float8_e4m3fn"
    assert net.blocks[0].input_scale.shape == (12,)


def test_nothing_to_do_is_an_error():
    with pytest.raises(ValueError, match="nothing to do"):
        prepare_(model(), TernaryConfig())
    with pytest.raises(ValueError, match="nothing to do"):
        convert_(model(), TernaryConfig())
    with pytest.raises(ValueError, match="absmean"):
        round_weight(torch.ones(2, 2), "absmean", column_scale=True)


def test_store_gives_back_what_it_took(tmp_path):
    g = torch.Generator().manual_seed(0)
    a = round_weight(torch.randn(6, 130, generator=g), column_scale=True)
    b = round_weight(torch.randn(4, 9, generator=g))
    store = RoundedStore(tmp_path / "s", "job")
    store.write("block.0", {"block.0.a": a})
    store.write("block.1", {"block.1.b": b})
    again = RoundedStore(tmp_path / "s", "job")
    assert list(again) == ["block.0.a", "block.1.b"]
    assert again.has_group("block.1")
    for name, q in (("block.0.a", a), ("block.1.b", b)):
        assert torch.equal(again[name].trits, q.trits)
        assert torch.equal(again[name].weight_scale, q.weight_scale)
        assert (again[name].input_scale is None) == (q.input_scale is None)
        assert again[name].bias is None
    assert len(RoundedStore(tmp_path / "s", "another job")) == 0
    (tmp_path / "s" / "block.1.safetensors").write_bytes(b"cut")
    assert list(RoundedStore(tmp_path / "s", "job")) == ["block.0.a"]
