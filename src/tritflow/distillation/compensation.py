"""Error compensation block after block, each on the inputs that the blocks rounded before it really give.

Knows no model family: it is told the blocks' names in the order in which they run, and how to run the model. In
the pass for a block, the block before it runs with its new weights and its outputs are kept; those still earlier
hand out placeholders, since nobody looks at theirs any more. So every block runs twice a sample, whatever the
model's depth, and only one block's statistics and outputs are in memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tritflow.calibration.trajectories import Trajectories
from tritflow.quantization.compensate import InputStatistics, bias_correction, compensate
from tritflow.quantization.rounding import Rounded, round_weight
from tritflow.quantization.store import RoundedStore
from tritflow.quantization.ternarize import dequantize

DAMPING = 0.01


class _Stop(Exception):
    """Raised behind the block of interest: the rest of the model need not run."""


def compensate_blocks_(
    model: nn.Module,
    run: Callable[..., Any],
    blocks: Sequence[str],
    linears: Sequence[str],
    trajectories: Trajectories,
    store: RoundedStore,
    *,
    weight_of: Callable[[str], Tensor],
    samples: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    column_scale: bool = False,
    column_of: Callable[[str, Tensor], Tensor] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Round `linears` with error compensation; the model's weights become the rounded ones, in place.

    Args:
        model: dense; its named linears are overwritten.
        run: called with a batch's kwargs; runs `model`.
        blocks: module names in running order.
        linears: names of the linears to round, each inside a block.
        trajectories: inputs are drawn evenly from the training split.
        store: receives a group a block; groups it has already are taken over, so a killed job goes on.
        weight_of: the original weight [N, K] of a linear, any dtype.
        samples: recorded pairs that the statistics come from.
        batch_size: pairs run at once.
        device: of the model.
        column_scale: also fit a scale per input column, from the weights.
        column_of: gives the column scales [K] of a linear by name and weight instead.
        on_progress: called as (blocks done, of how many).
    """
    size = trajectories.size("train")
    indices = torch.linspace(0, size - 1, min(samples, size)).round().long().split(batch_size)
    replay = _Replay(model, blocks)
    try:
        for number, block in enumerate(blocks):
            inside = [name for name in linears if name.startswith(f"{block}.")]
            found: dict[str, InputStatistics] = {}
            watched = [] if store.has_group(block) else inside
            replay.enter(number)
            for i, chosen in enumerate(indices):
                kwargs = trajectories.pairs(chosen, "train", device).kwargs
                replay.run(i, functools.partial(run, **kwargs), watched, found)
            if watched:
                rounded = {}
                for name in inside:
                    weight = weight_of(name).to(device)
                    column = None if column_of is None else column_of(name, weight)
                    rounded[name] = _round(model.get_submodule(name), weight, found.pop(name), column_scale, column)
                store.write(block, rounded)
            for name in inside:
                overwrite_(model.get_submodule(name), store[name])
            if on_progress is not None:
                on_progress(number + 1, len(blocks))
    finally:
        replay.close()


class _Replay:
    """Runs a model up to one block, with the blocks before it taken from memory."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]) -> None:
        self.model, self.names = model, blocks
        self.blocks = [model.get_submodule(name) for name in blocks]
        self._kept: list[Any] = []  # outputs of block `number - 2`, one a batch
        self._next: list[Any] = []
        self.number = -1
        self._batch = 0

    def enter(self, number: int) -> None:
        """Prepare the pass for block `number`."""
        self.number = number
        self._kept, self._next = self._next, []
        if number >= 2:
            self.blocks[number - 2].forward = lambda *a, **k: self._kept[self._batch]
        if number >= 3:
            shape_of = tree_map(_placeholder, self._kept[0])
            self.blocks[number - 3].forward = lambda *a, _out=shape_of, **k: _out

    @torch.no_grad()
    def run(
        self, batch: int, call: Callable[[], Any], watched: Sequence[str], found: dict[str, InputStatistics]
    ) -> None:
        """Run one batch up to and including the current block; adds the inputs of `watched` to `found`."""
        self._batch = batch
        hooks = [self.model.get_submodule(name).register_forward_pre_hook(_watch(name, found)) for name in watched]
        if self.number >= 1:
            hooks.append(self.blocks[self.number - 1].register_forward_hook(lambda m, a, out: self._next.append(out)))
        hooks.append(self.blocks[self.number].register_forward_hook(_stop))
        try:
            call()
        except _Stop:
            missing = [name for name in watched if name not in found]
            if missing:
                raise ValueError(f"'{missing[0]}' never ran: it cannot be calibrated") from None
            return
        finally:
            for handle in hooks:
                handle.remove()
        raise ValueError(f"the model finished without running '{self.names[self.number]}': check the block order")

    def close(self) -> None:
        """Give every block its own forward back."""
        for block in self.blocks:
            block.__dict__.pop("forward", None)
        self._kept, self._next = [], []


def _watch(name: str, found: dict[str, InputStatistics]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0]
        if name not in found:
            found[name] = InputStatistics.empty(x.shape[-1], x.device)
        found[name].add(x)

    return hook


def _stop(*_: Any) -> None:
    raise _Stop


def _placeholder(value: Any) -> Any:
    """Zeros of the same shape that take no memory: what runs between blocks may look at shapes."""
    return value.new_zeros(()).expand(value.shape) if isinstance(value, Tensor) else value


def _round(
    linear: nn.Module, weight: Tensor, statistics: InputStatistics, column_scale: bool, column: Tensor | None
) -> Rounded:
    bias = linear.bias
    # With a bias to take up the mean error, only the covariance of the inputs matters.
    hessian = statistics.hessian(centered=bias is not None)
    if column is None and column_scale:
        start = round_weight(weight, column_scale=True, input_importance=hessian.diagonal())
        column = start.input_scale
    # Few inputs (modulation sees one a sample) say little about many columns: lean on the weights then.
    damping = DAMPING * max(1.0, 8.0 * weight.shape[1] / max(1, statistics.count))
    trits, scale = compensate(weight, hessian, input_scale=column, damping=damping)
    moved = None
    if isinstance(bias, Tensor):
        moved = bias.detach().float() + bias_correction(weight, trits, scale, statistics.mean, column)
    return Rounded(trits, scale, column, moved)


@torch.no_grad()
def overwrite_(linear: nn.Module, q: Rounded) -> None:
    """Give a dense linear the weight, and the bias if there is one, that a rounding stands for once it is stored."""
    assert isinstance(linear, nn.Linear)
    # Scales as the format will store them.
    rows = q.weight_scale.bfloat16().float()
    columns = None if q.input_scale is None else q.input_scale.bfloat16().float()
    linear.weight.copy_(dequantize(q.trits, rows, columns))
    if q.bias is not None and linear.bias is not None:
        linear.bias.copy_(q.bias)


def restore_(
    model: nn.Module,
    linears: Sequence[str],
    weight_of: Callable[[str], Tensor],
    bias_of: Callable[[str], Tensor | None] | None = None,
) -> None:
    """Put the original weights back, as latents for distillation; biases stay as compensated without `bias_of`."""
    with torch.no_grad():
        for name in linears:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.copy_(weight_of(name))
            bias = None if bias_of is None else bias_of(name)
            if bias is not None and linear.bias is not None:
                linear.bias.copy_(bias)
