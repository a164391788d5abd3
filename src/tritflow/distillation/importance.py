"""How much the velocity depends on each channel of each stream, behind every block.

A small error d in a stream changes the velocity by J d. With r of random signs, E[(J^T r)^2] is the diagonal of J^T J,
so one backward pass a batch, from a random projection of the velocity, weighs every channel of every block at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.trajectories import Trajectories
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.step import training_attention


def stream_importance(
    blocks: Blocks,
    trajectories: Trajectories,
    *,
    samples: int,
    batch_size: int,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Run the dense model forward and backward over recorded inputs.

    Args:
        blocks: the dense model; its `run` returns the velocity, alone or first in a tuple.
        trajectories: `samples` pairs are drawn evenly from the training split.
        batch_size: pairs run at once; the streams behind all blocks are alive, so this is what takes memory.
        seed: of the projections.

    Returns:
        For each block, stream -> fp32 [C]: mean square of the gradient, summed over tokens; zero where nothing that
        follows reads the stream.
    """
    modules = [blocks.model.get_submodule(name) for name in blocks.order]
    names, device = blocks.calls.streams, blocks.dense.device
    sums: list[dict[str, Tensor]] = [{} for _ in modules]
    place = 0

    def adder(total: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            total[name] += gradient.float().square().flatten(0, -2).sum(dim=0)

        return add

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        nonlocal place
        given = out if isinstance(out, tuple) else (out,)
        # What the first block returns begins the graph: no parameter asks for gradients. Later ones are views, so
        # that a stream which a block hands on untouched has a gradient of its own behind it.
        given = tuple(t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in given)
        for name, tensor in zip(names, given, strict=True):
            total = sums[place]
            if name not in total:
                total[name] = torch.zeros(tensor.shape[-1], device=tensor.device)
            tensor.register_hook(adder(total, name))
        place += 1
        return given if isinstance(out, tuple) else given[0]

    handles = [module.register_forward_hook(hook) for module in modules]
    generator = torch.Generator().manual_seed(seed)
    size = trajectories.size("train")
    chosen = torch.linspace(0, size - 1, min(samples, size)).round().long()
    try:
        for indices in chosen.split(batch_size):
            place = 0
            with torch.enable_grad(), training_attention(device):
                out = blocks.run(**trajectories.pairs(indices, "train", device).kwargs)
                velocity = out[0] if isinstance(out, tuple) else out
                signs = torch.randint(0, 2, velocity.shape, generator=generator).to(velocity) * 2 - 1
                (velocity * signs).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    return [{name: part / len(chosen) for name, part in total.items()} for total in sums]
