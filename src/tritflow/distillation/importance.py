"""How much the velocity depends on each channel of each stream, behind every block.

A small error d in a stream changes the velocity by J d. With r of random signs, E[(J^T r)^2] is the diagonal of J^T J,
so one backward pass a batch, from a random projection of the velocity, weighs every channel of every block at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.trajectories import Trajectories
from tritflow.models.family import BlockCalls


def stream_importance(
    model: nn.Module,
    run: Callable[..., Any],
    order: Sequence[str],
    calls: BlockCalls,
    trajectories: Trajectories,
    *,
    samples: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Run the dense model forward and backward over recorded inputs.

    Args:
        model, run: `run(**kwargs)` runs `model` and returns the velocity, alone or first in a tuple.
        order: names of the blocks.
        calls: how blocks call each other.
        trajectories: `samples` pairs are drawn evenly from the training split.
        batch_size: pairs run at once; the activations of all blocks are alive, so this is what takes memory.
        seed: of the projections.

    Returns:
        For each block, stream -> fp32 [C]: mean square of the gradient, summed over tokens; zero where nothing that
        follows reads the stream.
    """
    blocks = [model.get_submodule(name) for name in order]
    seen: list[dict[str, Tensor]] = []
    sums: list[dict[str, Tensor]] = [{} for _ in blocks]

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        given = out if isinstance(out, tuple) else (out,)
        # What the first block returns begins the graph: no parameter asks for gradients. Later ones are views, so
        # that a stream which a block hands on untouched has a gradient of its own behind it.
        given = tuple(t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in given)
        for tensor in given:
            tensor.retain_grad()
        seen.append(dict(zip(calls.streams, given, strict=True)))
        return given if isinstance(out, tuple) else given[0]

    handles = [block.register_forward_hook(hook) for block in blocks]
    generator = torch.Generator().manual_seed(seed)
    size = trajectories.size("train")
    chosen = torch.linspace(0, size - 1, min(samples, size)).round().long()
    try:
        for indices in chosen.split(batch_size):
            seen.clear()
            with torch.enable_grad():
                out = run(**trajectories.pairs(indices, "train", device).kwargs)
                velocity = out[0] if isinstance(out, tuple) else out
                signs = torch.randint(0, 2, velocity.shape, generator=generator).to(velocity) * 2 - 1
                (velocity * signs).sum().backward()
            for total, streams in zip(sums, seen, strict=True):
                for name, tensor in streams.items():
                    g = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                    part = g.float().square().flatten(0, -2).sum(dim=0)
                    total[name] = total[name] + part if name in total else part
    finally:
        for handle in handles:
            handle.remove()
    return [{name: part / len(chosen) for name, part in total.items()} for total in sums]
