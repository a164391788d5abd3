import copy
import dataclasses

import pytest
import torch
from torch import nn

from tritflow.calibration.trajectories import Trajectories, TrajectoryWriter
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.importance import stream_importance
from tritflow.models import FLUX1
from tritflow.models.family import BlockCalls
from tritflow.modules.streamed import StreamedBlocks
from tritflow.testing import assert_close, tiny_flux_transformer, transformer_inputs

CALLS = BlockCalls(streams=("text", "x"), per_sample=(), final=("x",))


class Block(nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def forward(self, x, text):
        return text, self.gain * x + text.mean(1, keepdim=True)


class Model(nn.Module):
    """Linear, so that the diagonal of J^T J is known."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.head = nn.Parameter(torch.randn(6, 5, generator=g), requires_grad=False)
        self.blocks = nn.ModuleList(Block(gain) for gain in (2.0, 3.0))

    def forward(self, hidden_states):
        x, text = hidden_states, hidden_states[:, :2]
        for block in self.blocks:
            text, x = block(x, text)
        return (x @ self.head,)


def test_it_is_the_diagonal_of_the_jacobian_squared(tmp_path):
    writer = TrajectoryWriter(tmp_path, {}, {})
    x = torch.randn(100, 5, 8, 6)
    writer.write(0, {"hidden_states": x, "velocity": x.clone()}, {})
    writer.finish(1, {}, {})
    model = Model()
    found = stream_importance(
        Blocks(StreamedBlocks.in_memory(model, ["blocks.0", "blocks.1"]), model, [], CALLS),
        Trajectories(tmp_path, holdout=0),
        samples=500,
        batch_size=64,
    )
    diagonal = model.head.square().sum(dim=1)
    assert_close(found[1]["x"], 8 * diagonal, 0.1)
    assert_close(found[0]["x"], 8 * 9 * diagonal, 0.1)
    assert torch.equal(found[1]["text"], torch.zeros(6))
    # A token of two reaches every token of x at half its size, with signs that add up at random.
    assert_close(found[0]["text"], 2 * 8 / 4 * diagonal, 0.15)
    assert not model.blocks[0]._forward_hooks


@pytest.mark.parametrize("batch_size", [2, 3])
def test_on_flux_a_small_error_costs_what_it_says(tmp_path, batch_size):
    """Noise put on one stream behind one block changes the velocity by importance times its variance, on average."""
    model = tiny_flux_transformer(double=2, single=1).double().requires_grad_(False)
    inputs = transformer_inputs(model, batch=12, dtype=torch.float64)
    shared = {n: inputs.pop(n) for n in ("img_ids", "txt_ids")}
    inputs.pop("return_dict", None)
    steps = {"hidden_states": inputs.pop("hidden_states")[:, None], "timestep": inputs.pop("timestep")[:, None]}
    writer = TrajectoryWriter(tmp_path, {}, {})
    writer.write(0, {**steps, "velocity": torch.zeros_like(steps["hidden_states"])}, inputs)
    writer.finish(1, shared, {})
    trajectories = Trajectories(tmp_path, holdout=0)
    order = FLUX1.block_order({"_class_name": "FluxTransformer2DModel", **model.config})

    def run(**kwargs):
        return model(**kwargs, return_dict=False)

    blocks = Blocks(StreamedBlocks.in_memory(model, order), run, [], FLUX1.block_calls)
    found = stream_importance(blocks, trajectories, samples=12, batch_size=batch_size, seed=3)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    streamed = Blocks(StreamedBlocks(copy.deepcopy(model), order, state.__getitem__), None, [], FLUX1.block_calls)
    streamed = dataclasses.replace(streamed, run=lambda **kwargs: streamed.model(**kwargs, return_dict=False))
    again = stream_importance(streamed, trajectories, samples=12, batch_size=batch_size, seed=3)
    for one, other in zip(found, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert streamed.dense.peak == max(streamed.dense.parameters_of(name) for name in order)
    assert len(found) == 3
    assert not found[2]["encoder_hidden_states"].any()
    kwargs = trajectories.pairs(torch.arange(12), "all").kwargs
    with torch.no_grad():
        clean = run(**kwargs)[0]
        for place, stream in enumerate(FLUX1.block_calls.streams):
            noisy = torch.zeros(())
            generator = torch.Generator().manual_seed(0)

            def disturb(module, args, out, place=place, generator=generator):
                noise = 1e-4 * torch.randn(out[place].shape, generator=generator, dtype=torch.float64)
                return tuple(t + noise if i == place else t for i, t in enumerate(out))

            handle = model.get_submodule(order[0]).register_forward_hook(disturb)
            for _ in range(8):
                noisy = noisy + (run(**kwargs)[0] - clean).square().sum() / 12 / 8
            handle.remove()
            assert float(noisy / 1e-8) == pytest.approx(float(found[0][stream].sum()), rel=0.5)
