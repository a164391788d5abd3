import pytest
import torch
from torch import nn

from tritflow.calibration.trajectories import Trajectories, TrajectoryWriter
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.compensation import compensate_blocks, overwrite_, restore_
from tritflow.models.family import BlockCalls
from tritflow.modules.streamed import StreamedBlocks
from tritflow.quantization.compensate import InputStatistics, bias_correction, compensate
from tritflow.quantization.rounding import round_weight
from tritflow.quantization.store import RoundedStore
from tritflow.quantization.ternarize import dequantize


class Block(nn.Module):
    """Returns a tuple, as FLUX's blocks do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.calls = 0

    def forward(self, x, text):
        self.calls += 1
        return x + self.outer(torch.relu(self.inner(x))), text + 1


class Model(nn.Module):
    def __init__(self, depth: int = 5, width: int = 16) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
            self.mix = nn.Linear(width, width)

    def forward(self, hidden_states, pooled):
        x, text = torch.tanh(self.mix(hidden_states)), pooled
        for block in self.blocks:
            x, text = block(x, text)
        return x


BLOCKS = [f"blocks.{i}" for i in range(5)]
CALLS = BlockCalls(streams=("x", "text"), per_sample=(), final=("x",))
LINEARS = [f"{b}.{n}" for b in BLOCKS for n in ("inner", "outer")]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "t"
    writer = TrajectoryWriter(folder, {}, {})
    g = torch.Generator().manual_seed(2)
    x = torch.randn(10, 4, 6, 16, generator=g) @ torch.randn(16, 16, generator=g)
    writer.write(0, {"hidden_states": x, "velocity": torch.zeros_like(x)}, {"pooled": torch.randn(10, 3, generator=g)})
    writer.finish(1, {}, {})
    return Trajectories(folder, holdout=0.1)


def run(model, trajectories, folder, **kwargs):
    dense = Model()
    store = RoundedStore(folder, "job")
    streamed = StreamedBlocks.in_memory(model, BLOCKS)
    try:
        compensate_blocks(
            Blocks(streamed, model, LINEARS, CALLS),
            trajectories,
            store,
            weight_of=lambda name: dense.get_submodule(name).weight.detach(),
            samples=30,
            batch_size=8,
            **kwargs,
        )
    finally:
        streamed.close()
    return store


def indices(trajectories):
    return torch.linspace(0, trajectories.size("train") - 1, 30).round().long()


def test_it_is_compensation_on_the_rounded_models_own_activations(trajectories, tmp_path):
    """Against the plain way: run the whole model again for every block, watch, round, replace."""
    store = run(Model(), trajectories, tmp_path)
    slow = Model()
    batches = [trajectories.pairs(i).kwargs for i in indices(trajectories).split(8)]
    for block in BLOCKS:
        names = [name for name in LINEARS if name.startswith(block)]
        found = {name: InputStatistics.empty(slow.get_submodule(name).in_features) for name in names}
        hooks = [
            slow.get_submodule(name).register_forward_pre_hook(lambda m, a, s=stats: s.add(a[0]))
            for name, stats in found.items()
        ]
        with torch.no_grad():
            for kwargs in batches:
                slow(**kwargs)
        for hook in hooks:
            hook.remove()
        for name, stats in found.items():
            linear = slow.get_submodule(name)
            trits, scale = compensate(
                linear.weight.detach(),
                stats.hessian(centered=True),
                damping=0.01 * max(1, 8 * stats.mean.numel() / 180),
            )
            bias = linear.bias.detach() + bias_correction(linear.weight, trits, scale, stats.mean).detach()
            assert torch.equal(trits, store[name].trits)
            assert torch.equal(scale, store[name].weight_scale)
            torch.testing.assert_close(store[name].bias, bias)
            with torch.no_grad():
                linear.weight.copy_(dequantize(store[name].trits, store[name].weight_scale.bfloat16().float()))
                linear.bias.copy_(store[name].bias)


def test_it_beats_plain_rounding_and_leaves_the_model_alone(trajectories, tmp_path):
    model, dense, plain = Model(), Model(), Model()
    store = run(model, trajectories, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    for name in LINEARS:
        q = round_weight(plain.get_submodule(name).weight.detach())
        plain.get_submodule(name).weight.data.copy_(dequantize(q.trits, q.weight_scale))
        overwrite_(model.get_submodule(name), store[name])
    held = trajectories.pairs(torch.arange(trajectories.size("holdout")), "holdout").kwargs
    with torch.no_grad():
        target = dense(**held)
        errors = [float((m(**held) - target).square().mean()) for m in (model, plain)]
    assert errors[0] < 0.5 * errors[1]
    q = store["blocks.2.inner"]
    assert torch.equal(model.blocks[2].inner.weight, dequantize(q.trits, q.weight_scale.bfloat16().float()))
    restore_(model, LINEARS, lambda name: dense.get_submodule(name).weight)
    assert torch.equal(model.blocks[2].inner.weight, dense.blocks[2].inner.weight)
    assert torch.equal(model.blocks[2].inner.bias, q.bias)


def test_every_block_runs_twice_a_batch(trajectories, tmp_path, monkeypatch):
    count = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, text: (count.append(self), forward(self, x, text))[1])
    model = Model()
    run(model, trajectories, tmp_path)
    # 4 batches; what rounded blocks give is run on copies, and nothing comes after the last block.
    assert [sum(b is c for c in count) for b in model.blocks] == [4] * 5
    assert len(count) == 4 * (5 + 4)
    count.clear()
    run(model, trajectories, tmp_path)
    assert not count  # all done
    assert all("forward" not in b.__dict__ for b in model.blocks)


def test_killed_it_goes_on_to_the_same_roundings(trajectories, tmp_path):
    whole = run(Model(), trajectories, tmp_path / "whole")

    def kill(done, total):
        if done == 3:
            raise KeyboardInterrupt

    model = Model()
    with pytest.raises(KeyboardInterrupt):
        run(model, trajectories, tmp_path / "cut", on_progress=kill)
    assert all("forward" not in b.__dict__ for b in model.blocks)
    run(Model(), trajectories, tmp_path / "cut")
    for block in BLOCKS:
        name = f"{block}.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert len(whole) == len(LINEARS)


def test_column_scales(trajectories, tmp_path):
    store = run(Model(), trajectories, tmp_path, column_scale=True)
    assert all(store[name].input_scale.shape == (store[name].trits.shape[1],) for name in LINEARS)


def test_a_wrong_order_is_named(trajectories, tmp_path):
    model = Model()
    model.unused = Block(16)
    blocks = Blocks(StreamedBlocks.in_memory(model, ["unused"]), model, ["unused.inner"], CALLS)
    with pytest.raises(ValueError, match="without running 'unused'"):
        compensate_blocks(
            blocks,
            trajectories,
            RoundedStore(tmp_path, "job"),
            weight_of=lambda name: model.get_submodule(name).weight.detach(),
            samples=4,
            batch_size=4,
        )
