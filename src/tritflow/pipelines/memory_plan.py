"""Which component lies where, so that a picture is drawn within so many bytes of GPU memory: arithmetic alone.

A pipeline runs in three stages: text, steps, decoding. What stays on the device counts in all of them; what is
offloaded counts in its own. The plan is the fastest placement whose every stage fits. Estimates are made to err upwards
by some percent; `offloading.keep_plan` then holds PyTorch to the budget, so that a plan is kept or fails loudly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from tritflow.config import MemorySizeError as MemorySizeError
from tritflow.config import parse_bytes as parse_bytes
from tritflow.pipelines.component_sizes import Size

GIB = 1 << 30
MEASURED_OUTSIDE = 696 << 20
"""Bytes outside of PyTorch's allocator after FLUX.1-dev had drawn on an H200: CUDA's context and loaded kernels."""
CONTEXT = MEASURED_OUTSIDE + (72 << 20)
"""What plans keep free for that, with a reserve for other drivers and more kernels. PyTorch's allocator, which also
holds workspaces of cuBLAS and pools of CUDA graphs, may take the rest of the budget and no byte more."""
SLACK = 1.06
"""Allocated blocks are larger than their tensors, and leave gaps."""
_SMALL = 512 << 20


class MemoryPlanError(ValueError):
    """No plan fits the budget, or the device. Says what would fit."""


class Placement(StrEnum):
    """Where a component's weights are."""

    RESIDENT = "on the GPU"
    OFFLOADED = "on the GPU while it runs"
    STREAMED = "streamed to the GPU part by part"
    CPU = "on the CPU, where it runs"


# What a choice costs, in no unit but its order: text is encoded once, the transformer runs at every step.
_TEXT_COST = {Placement.RESIDENT: 0, Placement.OFFLOADED: 1, Placement.STREAMED: 2, Placement.CPU: 8}
_CORE_COST = {Placement.RESIDENT: 0, Placement.OFFLOADED: 1, Placement.STREAMED: 10}
_TILE_COST: dict[int | None, int] = {None: 0, 512: 6, 256: 12}


@dataclass(frozen=True)
class Workload:
    """What is to be drawn.

    Attributes:
        height, width: pixels.
        batch: pictures at once.
        text_tokens: that the transformer reads.
        itemsize: bytes of a dense element.
    """

    height: int
    width: int
    batch: int = 1
    text_tokens: int = 512
    itemsize: int = 2

    @property
    def tokens(self) -> int:
        """Rows that the transformer's blocks see, a picture."""
        return (self.height // 16) * (self.width // 16) + self.text_tokens


@dataclass(frozen=True)
class MemoryPlan:
    """A placement and what it takes.

    Attributes:
        sizes: the components, in the order in which they run.
        placements: by component.
        tile: side of the VAE's tiles in pixels, None to decode whole pictures.
        peaks: bytes at the peak of each stage (`text`, `steps`, `decode`), CUDA's own included.
        budget: what was asked for.
    """

    sizes: tuple[Size, ...]
    placements: Mapping[str, Placement]
    tile: int | None
    peaks: Mapping[str, int]
    budget: int

    @property
    def peak(self) -> int:
        """Bytes at the highest of the peaks."""
        return max(self.peaks.values())

    @property
    def fits(self) -> bool:
        """Whether every stage stays within the budget."""
        return self.peak <= self.budget

    def lines(self) -> list[str]:
        """The plan for people, a line a component."""
        width = max(len(size.name) for size in self.sizes)
        lines = [f"plan for {gib(self.budget)}:"]
        for size in self.sizes:
            tiles = f", decoding tiles of {self.tile} pixels" if size.kind == "vae" and self.tile else ""
            lines.append(f"  {size.name:<{width}}  {gib(size.total):>9}  {self.placements[size.name]}{tiles}")
        peaks = ", ".join(f"{stage} {gib(peak)}" for stage, peak in self.peaks.items())
        lines.append(f"  estimated peaks: {peaks}; {gib(CONTEXT)} of each for CUDA itself")
        return lines

    def to_dict(self) -> dict[str, object]:
        """As plain JSON."""
        return {
            "budget": self.budget,
            "components": {s.name: {"bytes": s.total, "placement": str(self.placements[s.name])} for s in self.sizes},
            "vae_tile": self.tile,
            "estimated_peaks": dict(self.peaks),
        }


def gib(size: int) -> str:
    """Bytes for people: GiB with two decimals."""
    return f"{size / GIB:.2f} GiB"


def working_bytes(size: Size, work: Workload, tile: int | None = None) -> int:
    """What a component's forward pass holds beside its weights.

    Text encoders and transformer: `tokens * width` elements a picture, one weight expanded by a kernel, and for text
    encoders scores and softmax in float32. A VAE decodes picture by picture, or tile by tile.
    """
    if size.kind == "vae":
        pixels = work.height * work.width
        seen = min(pixels, tile * tile) if tile else pixels
        # The finished pictures, float32 on their way to a file.
        return seen * size.width * work.itemsize + 2 * 4 * 3 * pixels * work.batch
    if size.kind == "text":
        scores = 8 * size.heads * work.text_tokens**2
        return work.batch * (work.text_tokens * size.width * work.itemsize + scores)
    return work.batch * work.tokens * size.width * work.itemsize + size.matrix * work.itemsize


def on_device(size: Size, placement: Placement) -> int:
    """The most of a component's weights that lie on the device while it runs."""
    if placement is Placement.CPU:
        return 0
    if placement is not Placement.STREAMED:
        return size.total
    if size.kind == "text":  # layer by layer, without prefetching
        return size.leaf
    return min(size.total, size.outside + 2 * size.block)  # this block, and the next one on its way


def evaluate(
    sizes: Sequence[Size], work: Workload, placements: Mapping[str, Placement], tile: int | None, budget: int
) -> MemoryPlan:
    """The peaks of one placement."""
    peaks = {}
    for stage, kind in (("text", "text"), ("steps", "transformer"), ("decode", "vae")):
        most = 0
        for i, size in enumerate(sizes):
            if size.kind == kind:
                where = placements[size.name]
                own = 0 if where is Placement.CPU else working_bytes(size, work, tile)
                most = max(most, _beside(i, sizes, placements) + on_device(size, where) + own)
        peaks[stage] = CONTEXT + round(SLACK * most)
    return MemoryPlan(tuple(sizes), dict(placements), tile, peaks, budget)


def _beside(running: int, sizes: Sequence[Size], placements: Mapping[str, Placement]) -> int:
    """Bytes of other components on the device while one runs.

    An offloaded component stays until the next offloaded one wants its place, also into the next batch.
    """
    where = [placements[size.name] for size in sizes]
    total = sum(s.total for i, s in enumerate(sizes) if i != running and where[i] is Placement.RESIDENT)
    if where[running] is not Placement.OFFLOADED:
        before = [(running - i) % len(sizes) for i in range(1, len(sizes))]
        total += next((sizes[i].total for i in before if where[i] is Placement.OFFLOADED), 0)
    return total


def plans(sizes: Sequence[Size], work: Workload, budget: int) -> Iterator[MemoryPlan]:
    """All placements worth trying, the fastest first. Tiles change a picture a little, so they come late."""
    choices = itertools.product(_TEXT_COST, _CORE_COST, _TILE_COST)
    for text, core, tile in sorted(choices, key=lambda c: _TEXT_COST[c[0]] + _CORE_COST[c[1]] + _TILE_COST[c[2]]):
        placements = {}
        for size in sizes:
            if size.kind == "text":
                small = text is Placement.STREAMED and size.total <= _SMALL
                placements[size.name] = Placement.OFFLOADED if small else text
            elif size.kind == "vae" and core is Placement.STREAMED:
                placements[size.name] = Placement.OFFLOADED
            else:
                placements[size.name] = core
        yield evaluate(sizes, work, placements, tile, budget)


def choose_plan(sizes: Sequence[Size], work: Workload, budget: int) -> MemoryPlan:
    """The fastest plan that fits `budget` bytes.

    Raises:
        MemoryPlanError: none does; names the least that would, and what else would help.
    """
    tried = list(plans(sizes, work, budget))
    for plan in tried:
        if plan.fits:
            return plan
    least = min(tried, key=lambda plan: plan.peak)
    help_: list[str] = []
    if work.batch > 1 and any(p.fits for p in plans(sizes, replace(work, batch=1), budget)):
        help_.append("--batch-size 1")
    for side in (1024, 768, 512, 256):
        smaller = replace(work, height=side, width=side, batch=1)
        if side * side < work.height * work.width and any(p.fits for p in plans(sizes, smaller, budget)):
            help_.append(f"--height {side} --width {side}")
            break
    hint = f"; {' or '.join(help_)} would fit" if help_ else ""
    raise MemoryPlanError(
        f"nothing fits {gib(budget)} at {work.width}x{work.height}, {work.batch} at once: the least is "
        f"{gib(least.peak)} (--max-memory {_round_up(least.peak)}){hint}"
    )


def _round_up(size: int) -> str:
    """As an option's value, in tenths of a GiB."""
    tenths = -(-size * 10 // GIB)
    return f"{tenths / 10:g}GiB"
