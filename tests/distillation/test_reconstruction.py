import dataclasses
import json

import pytest
import torch
from torch import nn

from tritflow.calibration.trajectories import Trajectories, TrajectoryWriter
from tritflow.config import ReconstructionConfig
from tritflow.distillation.block_streams import first_inputs
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.compensation import compensate_blocks
from tritflow.distillation.reconstruction import (
    ReconstructionError,
    Window,
    _parameter_groups,
    reconstruct_blocks,
    windows,
)
from tritflow.models.family import BlockCalls
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.modules.streamed import StreamedBlocks
from tritflow.quantization.convert import twin_of
from tritflow.quantization.store import RoundedStore

CALLS = BlockCalls(streams=("text", "x"), per_sample=("temb",), final=("x",))


class Block(nn.Module):
    """Two streams that see each other, and a condition, as FLUX's blocks have."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.words = nn.Linear(width, width)

    def forward(self, x, text, temb, rotary):
        h = torch.nn.functional.gelu(self.inner(x * (1 + temb[:, None]) + text.mean(1, keepdim=True)))
        return text + torch.tanh(self.words(text)), x + self.outer(h) * rotary


class Model(nn.Module):
    def __init__(self, depth: int = 5, width: int = 24) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            self.mix = nn.Linear(width, width)

    def forward(self, hidden_states, text, pooled):
        x = torch.tanh(self.mix(hidden_states))
        for block in self.blocks:
            text, x = block(x, text, temb=0.1 * pooled, rotary=torch.ones(()))
        return x


NAMES = [f"blocks.{i}" for i in range(5)]
LINEARS = [f"{b}.{n}" for b in NAMES for n in ("inner", "outer", "words")]
CONFIG = ReconstructionConfig(
    steps=60, samples=150, batch_size=16, learning_rate=0.02, scale_learning_rate=3e-3, warmup_steps=4
)


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "t"
    writer = TrajectoryWriter(folder, {}, {})
    g = torch.Generator().manual_seed(2)
    x = torch.randn(48, 4, 6, 24, generator=g) @ torch.randn(24, 24, generator=g)
    text = torch.randn(48, 4, 6, 24, generator=g) @ torch.randn(24, 24, generator=g) / 5
    steps = {"hidden_states": x, "text": text, "velocity": torch.zeros_like(x)}
    writer.write(0, steps, {"pooled": torch.randn(48, 24, generator=g)})
    writer.finish(1, {}, {})
    return Trajectories(folder, holdout=0.2)


@pytest.fixture(scope="module")
def compensated(trajectories, tmp_path_factory):
    dense = Model()
    store = RoundedStore(tmp_path_factory.mktemp("compensated"), "job")
    compensate_blocks(
        blocks_of(Model()), trajectories, store,
        weight_of=lambda n: dense.get_submodule(n).weight.detach(), samples=150, batch_size=50,
    )  # fmt: skip
    return store


def blocks_of(model):
    return Blocks(StreamedBlocks.in_memory(model, NAMES), model, LINEARS, CALLS)


def reconstruct(trajectories, compensated, folder, config=CONFIG, **kwargs):
    model = Model()
    store = RoundedStore(folder, "job")
    curve = reconstruct_blocks(blocks_of(model), trajectories, compensated, store, config, **kwargs)
    return model, store, curve


def settings(**changes):
    return ReconstructionConfig(**{**CONFIG.to_dict(), **changes})


def model_error(store, trajectories, bits=16):
    """Of the whole model on held-out inputs, relative."""
    dense, model = Model(), Model()
    for name in LINEARS:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        setattr(model.get_submodule(parent), leaf, twin_of(linear, store[name], activation_bits=bits))
    held = trajectories.pairs(torch.arange(trajectories.size("holdout")), "holdout").kwargs
    with torch.no_grad():
        target = dense(**held)
        return float((model(**held) - target).square().mean() / target.square().mean())


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (2, 1), (2, 2), (9, 9)])
def test_it_beats_the_compensated_start_in_every_window_and_as_a_whole(
    trajectories, compensated, tmp_path, window, stride
):
    _, store, curve = reconstruct(trajectories, compensated, tmp_path, settings(window=window, stride=stride))
    assert [e["first"] for e in curve] == [w.first for w in windows(5, window, stride)]
    for entry in curve:
        assert entry["kept"]
        assert sum(entry["after"].values()) < sum(entry["before"].values())
    assert set(curve[0]["before"]) == ({"text", "x"} if window < 5 else {"x"})
    assert set(curve[-1]["before"]) == {"x"}  # nobody reads the text behind the last block
    assert model_error(store, trajectories) < 0.6 * model_error(compensated, trajectories)
    moved = sum(int((store[n].trits != compensated[n].trits).sum()) for n in LINEARS)
    assert moved > 50
    assert not list(tmp_path.glob("overlap-*"))


def test_without_importance_every_stream_counts_alike(trajectories, compensated, tmp_path):
    _, store, curve = reconstruct(trajectories, compensated, tmp_path, settings(importance_samples=0))
    assert model_error(store, trajectories) < 0.6 * model_error(compensated, trajectories)
    _, _, weighed = reconstruct(trajectories, compensated, tmp_path / "weighed")
    # Unweighed, each stream's error is a share of its own change; weighed, of the change of all.
    assert curve[0]["before"]["text"] > 2 * weighed[0]["before"]["text"]


def test_the_model_is_left_alone(trajectories, compensated, tmp_path):
    model, store, _ = reconstruct(trajectories, compensated, tmp_path, settings(steps=5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Model().parameters(), strict=True))
    assert len(store) == len(LINEARS)


def test_streams_are_what_the_blocks_are_given(trajectories):
    model = Model()
    indices = torch.linspace(0, trajectories.size("train") - 1, 9).round().long()
    streams = first_inputs(blocks_of(model), trajectories, indices, batch_size=4)
    kwargs = trajectories.pairs(indices).kwargs
    torch.testing.assert_close(streams.streams["x"], torch.tanh(model.mix(kwargs["hidden_states"])).detach())
    assert torch.equal(streams.streams["text"], kwargs["text"])
    assert torch.equal(streams.per_sample["temb"], 0.1 * kwargs["pooled"])
    assert set(streams.shared) == {"rotary"}
    before = {name: t.clone() for name, t in streams.streams.items()}
    out = streams
    for block in model.blocks:
        out = out.through(block, in_place=out is not streams)
    assert all(torch.equal(before[name], t) for name, t in streams.streams.items())
    torch.testing.assert_close(out.streams["x"], model(**kwargs).detach())
    assert not model.blocks[0]._forward_pre_hooks


def test_eight_bit_activations_are_in_the_loop(trajectories, compensated, tmp_path):
    for bits in (8, 16):
        _, store, _ = reconstruct(trajectories, compensated, tmp_path / str(bits), settings(activation_bits=bits))
        assert model_error(store, trajectories, bits=8) < 0.8 * model_error(compensated, trajectories, bits=8)
    one, other = (RoundedStore(tmp_path / bits, "job")["blocks.1.inner"] for bits in ("8", "16"))
    assert not torch.equal(one.weight_scale, other.weight_scale)


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("after", [1, 3])
def test_killed_it_goes_on_to_the_same_roundings(trajectories, compensated, tmp_path, window, stride, after):
    config = settings(steps=6, window=window, stride=stride)
    _, _, whole = reconstruct(trajectories, compensated, tmp_path / "whole", config)

    def kill(done, total):
        assert total == 5
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reconstruct(trajectories, compensated, tmp_path / "cut", config, on_progress=kill)
    assert RoundedStore(tmp_path / "cut", "job").has_group("blocks.4") == (window == 3 and after == 3)
    _, _, curve = reconstruct(trajectories, compensated, tmp_path / "cut", config)
    assert curve == whole
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name
    _, _, again = reconstruct(trajectories, compensated, tmp_path / "cut", config)  # nothing is left to do
    assert again == whole


def test_killed_between_latents_and_roundings_it_trains_that_window_again(trajectories, compensated, tmp_path):
    config = settings(steps=4, window=2, stride=1)
    _, whole, _ = reconstruct(trajectories, compensated, tmp_path / "whole", config)

    class Cut(RoundedStore):
        def write(self, group, rounded):
            if group == "blocks.1":
                raise KeyboardInterrupt
            super().write(group, rounded)

    store = Cut(tmp_path / "cut", "job")
    with pytest.raises(KeyboardInterrupt):
        reconstruct_blocks(blocks_of(Model()), trajectories, compensated, store, config)
    _, again, _ = reconstruct(trajectories, compensated, tmp_path / "cut", config)
    assert all(torch.equal(whole[n].trits, again[n].trits) for n in LINEARS)
    assert all(torch.equal(whole[n].weight_scale, again[n].weight_scale) for n in LINEARS)


def test_what_makes_it_worse_is_not_kept(trajectories, compensated, tmp_path):
    _, store, curve = reconstruct(
        trajectories, compensated, tmp_path, settings(steps=8, learning_rate=20.0, scale_learning_rate=0.5)
    )
    assert not curve[0]["kept"]
    q = store["blocks.0.inner"]
    assert torch.equal(q.trits, compensated["blocks.0.inner"].trits)
    assert torch.equal(q.weight_scale, compensated["blocks.0.inner"].weight_scale.bfloat16().float())


def test_a_loss_that_is_no_number_is_one_line(trajectories, compensated, tmp_path):
    model = Model()
    with torch.no_grad():
        model.blocks[0].inner.weight[0, 0] = torch.nan
    with pytest.raises(ReconstructionError, match=r"blocks\.0 is not finite"):
        reconstruct_blocks(
            blocks_of(model), trajectories, compensated, RoundedStore(tmp_path, "job"), settings(steps=2)
        )


def test_only_trits_scales_and_biases_are_trained():
    linear = nn.Linear(8, 8)
    from tritflow.quantization.rounding import round_weight

    block = nn.ModuleDict({"a": twin_of(linear, round_weight(linear.weight.detach())), "norm": nn.LayerNorm(8)})
    block.requires_grad_(False)
    groups = {g.name: g for g in _parameter_groups({"b": block}, settings(learning_rate=0.5))}
    twin = block["a"]
    assert isinstance(twin, FakeTernaryLinear)
    assert groups["latent weights"].learning_rate == 0.5
    assert groups["latent weights"].parameters == {"b.a.weight": twin.weight}
    assert all(p.requires_grad for p in twin.parameters())
    assert not any(p.requires_grad for p in block["norm"].parameters())
    frozen = {g.name: g for g in _parameter_groups({"b": block}, settings(train_scales=False, train_biases=False))}
    assert not frozen["scales"].parameters
    assert not frozen["biases"].parameters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_the_graph_does_what_eager_does(trajectories, compensated, tmp_path):
    def run(name, graph):
        model = Model().cuda()
        store = RoundedStore(tmp_path / name, "job")
        return reconstruct_blocks(
            blocks_of(model), trajectories, compensated, store, settings(window=2), cuda_graph=graph
        )

    eager, graph = run("eager", False), run("graph", True)
    for one, other in zip(eager, graph, strict=True):
        assert other["kept"]
        assert sum(other["after"].values()) == pytest.approx(sum(one["after"].values()), rel=0.05)


def test_windows_cover_every_block_once():
    assert windows(5, 2, 2) == [Window(0, 2, 2), Window(2, 4, 4), Window(4, 5, 5)]
    assert windows(5, 3, 1) == [Window(0, 3, 1), Window(1, 4, 2), Window(2, 5, 5)]
    assert windows(1, 4, 2) == [Window(0, 1, 1)]


def test_wrong_calls_are_named(trajectories):
    model = Model()
    wrong = BlockCalls(streams=("hidden_states",), per_sample=(), final=("hidden_states",))
    with pytest.raises(ValueError, match="not called with a tensor 'hidden_states'"):
        first_inputs(dataclasses.replace(blocks_of(model), calls=wrong), trajectories, torch.arange(2), batch_size=2)


def test_the_curve_says_what_was_gained(trajectories, compensated, tmp_path):
    reconstruct(trajectories, compensated, tmp_path, settings(steps=4))
    found = json.loads((tmp_path / "curve.json").read_text())
    assert found["kind"] == "reconstruction"
    assert found["config"]["steps"] == 4
    assert [w["blocks"] for w in found["windows"]] == [[name] for name in NAMES]
    assert all(len(w["loss"]) == 4 for w in found["windows"])
