"""Error compensation block after block, each on the inputs that the blocks rounded before it really give.

Knows no model family. The inputs of the current block are kept for all samples; a block runs twice: dense, watched, and
rounded, to give the next block its inputs. One dense block, its statistics and one set of streams are in memory,
whatever the model's depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tritflow.calibration.trajectories import Trajectories
from tritflow.calibration.watching import watched
from tritflow.distillation.block_streams import Streams, first_inputs, sample_bytes
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.shelf import Room, Shelf, spread
from tritflow.quantization.compensate import InputStatistics, bias_correction, compensate
from tritflow.quantization.rounding import Rounded, round_weight
from tritflow.quantization.store import RoundedStore
from tritflow.quantization.ternarize import dequantize

DAMPING = 0.01


def compensate_blocks(
    blocks: Blocks,
    trajectories: Trajectories,
    store: RoundedStore,
    *,
    weight_of: Callable[[str], Tensor],
    samples: int,
    batch_size: int,
    column_scale: bool = False,
    column_of: Callable[[str, Tensor], Tensor] | None = None,
    shelf: Shelf | None = None,
    on_samples: Callable[[Room, Tensor], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Round the linears of all blocks with error compensation.

    Args:
        blocks: the dense model; it is not changed.
        trajectories: inputs are drawn from the training split.
        store: receives a group a block; groups it has already are taken over, so a killed job goes on.
        weight_of: the original weight [N, K] of a linear, any dtype.
        samples: recorded pairs that the statistics come from, at most.
        batch_size: pairs run at once.
        column_scale: also fit a scale per input column, from the weights.
        column_of: gives the column scales [K] of a linear by name and weight instead.
        shelf: where inputs are kept, within which budget.
        on_samples: called once with how many samples there was room for, and which pairs of the split they are.
        on_progress: called as (blocks done, of how many).

    Raises:
        ValueError: a linear or block never ran.
        BudgetError: no sample fits the budget.
        DiskFullError: no space left; the same call resumes.
    """
    shelf = shelf or Shelf()
    dense, order = blocks.dense, blocks.order
    size = trajectories.size("train")
    each = sample_bytes(blocks, trajectories)
    room = shelf.room(min(samples, size), 0, each, 1)
    indices = spread(size // trajectories.steps, trajectories.steps, room.samples, room.limited)
    if on_samples is not None:
        on_samples(room, indices)
    todo = [i for i, name in enumerate(order) if blocks.inside(name) and not store.has_group(name)]
    if todo:
        # Where there is room on the GPU, streams lie beside the model, not under mixed precision: as it runs itself.
        place = shelf.device(each * len(indices), dense.device)
        streams = first_inputs(
            blocks, trajectories, indices, batch_size=batch_size, shelf=shelf, store=place, mixed=False
        )
    for number, block in enumerate(order):
        if number in todo:
            with dense.loaded(block) as module:
                found = input_statistics(blocks, block, module, streams)
                rounded = {
                    name: _round(name, leaf, weight_of(name).to(dense.device), found.pop(name), column_scale, column_of)
                    for name, leaf in blocks.leaves(block, module).items()
                }
            store.write(block, rounded)
        if todo and number < todo[-1]:
            streams = streams.through(_rounded_copy(blocks, block, store), in_place=True)
        if on_progress is not None:
            on_progress(number + 1, len(order))


def _rounded_copy(blocks: Blocks, block: str, store: RoundedStore) -> nn.Module:
    new = blocks.dense.copy(block)
    for name, leaf in blocks.leaves(block, new).items():
        overwrite_(leaf, store[name])
    return new


def input_statistics(blocks: Blocks, block: str, module: nn.Module, streams: Streams) -> dict[str, InputStatistics]:
    """What a block's linears see while `streams` pass it (`module`: the block, loaded); its outputs are dropped.

    Raises:
        ValueError: one of them never ran.
    """
    found: dict[str, InputStatistics] = {}

    def see(name: str, x: Tensor) -> None:
        if name not in found:
            found[name] = InputStatistics.empty(x.shape[-1], x.device)
        found[name].add(x)

    with watched(blocks.leaves(block, module), see):
        for _ in streams.outputs(module):
            pass
    return found


def _round(
    name: str,
    linear: nn.Module,
    weight: Tensor,
    statistics: InputStatistics,
    column_scale: bool,
    column_of: Callable[[str, Tensor], Tensor] | None,
) -> Rounded:
    bias = linear.bias
    # With a bias to take up the mean error, only the covariance of the inputs matters.
    hessian = statistics.hessian(centered=bias is not None)
    column = None if column_of is None else column_of(name, weight)
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
