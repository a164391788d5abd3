"""Error compensation block after block, each on the inputs that the blocks rounded before it really give.

Knows no model family: it is told the blocks' names in the order in which they run, and how to run the model. The
model is run again for every block and stopped behind it, so that only one block's statistics are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.trajectories import Batch, Trajectories
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
        column_scale: also fit a scale per input column.
        on_progress: called as (blocks done, of how many).
    """
    size = trajectories.size("train")
    indices = torch.linspace(0, size - 1, min(samples, size)).round().long()
    for done, block in enumerate(blocks, 1):
        inside = [name for name in linears if name.startswith(f"{block}.")]
        if inside and not store.has_group(block):
            batches = (trajectories.pairs(i, "train", device) for i in indices.split(batch_size))
            statistics = _collect(model, run, block, inside, batches)
            rounded = {
                name: _round(model.get_submodule(name), weight_of(name).to(device), statistics.pop(name), column_scale)
                for name in inside
            }
            store.write(block, rounded)
        for name in inside:
            _overwrite(model.get_submodule(name), store[name])
        if on_progress is not None:
            on_progress(done, len(blocks))


@torch.no_grad()
def _collect(
    model: nn.Module, run: Callable[..., Any], block: str, names: Sequence[str], batches: Any
) -> dict[str, InputStatistics]:
    found: dict[str, InputStatistics] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            if name not in found:
                found[name] = InputStatistics.empty(x.shape[-1], x.device)
            found[name].add(x)

        return hook

    def stop(*_: Any) -> None:
        raise _Stop

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    hooks.append(model.get_submodule(block).register_forward_hook(stop))
    try:
        for batch in batches:
            _run_until_stop(run, batch)
    finally:
        for handle in hooks:
            handle.remove()
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(f"'{missing[0]}' never ran: it cannot be calibrated")
    return found


def _run_until_stop(run: Callable[..., Any], batch: Batch) -> None:
    try:
        run(**batch.kwargs)
    except _Stop:
        return
    raise ValueError("the model finished without running the block that is calibrated")


def _round(linear: nn.Module, weight: Tensor, statistics: InputStatistics, column_scale: bool) -> Rounded:
    bias = linear.bias
    # With a bias to take up the mean error, only the covariance of the inputs matters.
    hessian = statistics.hessian(centered=bias is not None)
    column = None
    if column_scale:
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
def _overwrite(linear: nn.Module, q: Rounded) -> None:
    assert isinstance(linear, nn.Linear)
    # Scales as the format will store them.
    rows = q.weight_scale.bfloat16().float()
    columns = None if q.input_scale is None else q.input_scale.bfloat16().float()
    linear.weight.copy_(dequantize(q.trits, rows, columns))
    if q.bias is not None and linear.bias is not None:
        linear.bias.copy_(q.bias)


def restore_(model: nn.Module, linears: Sequence[str], weight_of: Callable[[str], Tensor]) -> None:
    """Put the original weights back, as latents for distillation; biases stay as compensated."""
    with torch.no_grad():
        for name in linears:
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            linear.weight.copy_(weight_of(name))
