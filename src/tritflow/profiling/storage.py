"""Bytes on disk, measured on files: the small FLUX as it ships, and FLUX.1-dev's config at its real size.

The real-size proof needs no FLUX.1-dev: it streams random trits, scales and bf16 tensors of the very shapes through
the writer that quantization uses, one module at a time, and measures the folder. It proves sizes, memory and that
the files are sound; it says nothing about pictures.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tritflow import results
from tritflow.assets import asset_path
from tritflow.config import Packing, TernaryConfig
from tritflow.formats.accounting import account, storage_estimate, ternary_bytes
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.formats.checkpoint import TransformerWriter, verify_folder
from tritflow.formats.errors import CheckpointError
from tritflow.formats.repacking import convert_folder
from tritflow.profiling.room import SLACK, check_room

BARS: dict[Packing, int] = {"2bit": 3_110_000_000, "base3": 2_550_000_000}
"""At most so many bytes for the transformer folder at FLUX.1-dev's config."""
_PACKINGS: tuple[tuple[Packing, str], ...] = (("2bit", "2-bit"), ("base3", "base-3"))

Progress = Callable[[str, int, int], None]


def measure(folder: str | Path, label: str, reference: int | None = None) -> dict[str, Any]:
    """Take a transformer folder's size from its files.

    Args:
        folder: a dense or ternary transformer folder.
        label: the row's name in tables.
        reference: bytes that `ratio` divides by these; None: what the same parameters take in bf16.

    Returns:
        `bytes` of all files in the folder; `ratio`; and for a ternary one `bits_per_weight` (trits with the row and
        column scales, without the bias), `packed_bits_per_weight` (trits alone), its packing and digest.
    """
    component = account(folder, read_data=False)[0]
    summary = component.summary()
    row: dict[str, Any] = {
        "label": label,
        "measured": True,
        "bytes": component.file_bytes,
        "tensor_bytes": summary["tensor_bytes"],
        "parameters": component.parameters,
        "ratio": (component.bf16_bytes if reference is None else reference) / component.file_bytes,
    }
    ternary = component.ternary
    if ternary:
        settings = component.settings
        shapes = [layer.shape for layer in ternary]
        weights, size = ternary_bytes(shapes, settings["packing"], bool(settings.get("column_scale")))
        row |= {
            "packing": settings["packing"],
            "ternary_layers": len(ternary),
            "ternary_weights": weights,
            "bits_per_weight": 8 * size / weights,
            "packed_bits_per_weight": float(summary["bits_per_ternary_weight"]),
            "digest": component.digest,
        }
    return row


def small_flux(progress: Progress | None = None) -> list[dict[str, Any]]:
    """The built-in teacher's transformer as it ships (bf16), and its student's in both packings.

    Returns:
        Runs for `tritflow.results`, topic `storage`.

    Raises:
        AssetError: the built-in model is not installed.
    """
    dense = measure(asset_path("small") / "transformer", "small FLUX, bf16")
    rows = [dense]
    with tempfile.TemporaryDirectory(prefix="tritflow-storage-") as temporary:
        for packing, name in _PACKINGS:
            folder = Path(temporary) / packing
            convert_folder(
                asset_path("small-student") / "transformer", folder, packing, progress=_named(progress, name)
            )
            rows.append(measure(folder, f"small FLUX, {name}", reference=dense["bytes"]))
    source = results.provenance("cpu")
    return [{**source, **row} for row in rows]


def full_size(
    workdir: str | Path | None = None,
    *,
    config: Mapping[str, Any] = FLUX1_DEV,
    model: str = "FLUX.1-dev",
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Write a transformer of `config`'s real size with random content, in both packings, and measure the files.

    The 2-bit folder is written module by module, verified byte by byte, and repacked to base-3, which is verified
    too. Everything is deleted again. FLUX.1-dev takes some minutes and about 9 GB of disk at its peak.

    Args:
        workdir: where to make the temporary folder; None: the system's own.
        config: a `FluxTransformer2DModel` config.
        model: its name in labels.
        seed: of the random content.
        progress: called with (stage, done, total).

    Returns:
        Runs for `tritflow.results`, topic `storage`: bf16 (computed from the shapes: nothing is written in bf16), then
        2-bit and base-3 with `seconds` and `peak_rss_bytes` of the stage, `random` true and, at FLUX.1-dev's config,
        `bar_bytes` and `within_bar`.

    Raises:
        DiskFullError: not enough room, said before anything is written.
    """
    parent = Path(workdir) if workdir is not None else Path(tempfile.gettempdir())
    if not parent.is_dir():
        raise CheckpointError(f"{parent} is not a folder; give one with room for the files")
    shapes = flux1_shapes(config)
    sizes = {packing: storage_estimate(shapes, packing).total for packing, _ in _PACKINGS}
    most = max(2 * sizes["2bit"], sizes["2bit"] + 2 * sizes["base3"])
    check_room(parent, most + SLACK, "the files of real size")
    bf16 = storage_estimate(shapes).bf16
    note = f"random trits, scales and bf16 tensors of {model}'s shapes (seed {seed}): a proof of size, not of quality"
    rows: list[dict[str, Any]] = [
        {
            "label": f"{model}, bf16 (computed)",
            "measured": False,
            "bytes": bf16,
            "parameters": bf16 // 2,
            "ratio": 1.0,
        }
    ]
    with tempfile.TemporaryDirectory(prefix="tritflow-storage-", dir=parent) as temporary:
        two_bit, base3 = Path(temporary) / "2bit", Path(temporary) / "base3"
        stages: list[tuple[Packing, str, Path, Callable[[], object]]] = [
            (
                "2bit",
                "2-bit",
                two_bit,
                lambda: write_random(two_bit, config, seed, _named(progress, "writing 2-bit")),
            ),
            (
                "base3",
                "base-3",
                base3,
                lambda: convert_folder(two_bit, base3, "base3", progress=_named(progress, "repacking to base-3")),
            ),
        ]
        for packing, name, folder, write in stages:
            with peak_memory() as peak:
                start = time.perf_counter()
                write()
                seconds = time.perf_counter() - start
            start = time.perf_counter()
            verify_folder(folder)
            row = measure(folder, f"{model}, {name}") | {
                "random": True,
                "note": note,
                "seconds": round(seconds, 1),
                "verify_seconds": round(time.perf_counter() - start, 1),
                "peak_rss_bytes": peak(),
                "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir())},
            }
            if config == FLUX1_DEV:
                row |= {"bar_bytes": BARS[packing], "within_bar": row["bytes"] <= BARS[packing]}
            rows.append(row)
    source = results.provenance("cpu")
    return [{**source, **row} for row in rows]


def write_random(
    out: str | Path,
    config: Mapping[str, Any],
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> str:
    """Write a ternary transformer folder (2-bit) of random content, one module in memory at a time.

    Each tensor is drawn from the seed and its own name, so the same call after a kill goes on to the same bytes.

    Args:
        out: the folder.
        config: a `FluxTransformer2DModel` config.
        seed: of the content.
        progress: called with (modules done, modules in all).

    Returns:
        The digest.
    """
    ternary = TernaryConfig(packing="2bit")
    shapes = flux1_shapes(config)
    writer = TransformerWriter(out, ternary, job=f"random {seed}")
    linears = [
        n.removesuffix(".weight")
        for n, s in shapes.items()
        if n.endswith(".weight") and len(s) == 2 and ternary.matches(n.removesuffix(".weight"))
    ]
    biases = {f"{name}.bias" for name in linears}
    weights = {f"{name}.weight" for name in linears}
    dense = [name for name in shapes if name not in biases | weights]
    total = len(linears) + len(dense)
    for done, name in enumerate(linears, 1):
        if name not in writer:
            rows, columns = shapes[f"{name}.weight"]
            generator = _generator(seed, name)
            writer.add_linear(
                name,
                torch.randint(-1, 2, (rows, columns), dtype=torch.int8, generator=generator),
                torch.rand(rows, generator=generator) * 0.02 + 0.01,
                bias=torch.zeros(rows, dtype=torch.bfloat16) if f"{name}.bias" in shapes else None,
            )
        if progress:
            progress(done, total)
    for done, name in enumerate(dense, 1 + len(linears)):
        if name not in writer:
            tensor = torch.empty(shapes[name], dtype=torch.bfloat16)
            writer.add_dense(name, tensor.normal_(std=0.02, generator=_generator(seed, name)))
        if progress:
            progress(done, total)
    return writer.finish(dict(config))


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


def _named(progress: Progress | None, stage: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(stage, done, total)


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yields a function that gives the process's peak resident bytes within this block.

    Linux can reset the peak; elsewhere it is that of the whole process.
    """
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    found: list[int] = []
    yield lambda: found[0]
    found.append(_peak_rss())


def _peak_rss() -> int:
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text()
        match = re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE)
        if match:
            return int(match.group(1)) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def table(rows: list[dict[str, Any]]) -> str:
    """The runs in plain text: bytes, ratio to bf16, bits a ternary weight."""
    width = max(len(row["label"]) for row in rows)
    lines = []
    for row in rows:
        line = f"{row['label']:<{width}}  {row['bytes']:>14,} bytes  {row['ratio']:6.2f}x"
        if "bits_per_weight" in row:
            line += f"  {row['bits_per_weight']:.3f} bits a ternary weight"
        if "seconds" in row:
            line += f"  {row['seconds']:.0f} s, peak {row['peak_rss_bytes'] / 1e9:.2f} GB of memory"
        if "within_bar" in row:
            line += f"  ({'within' if row['within_bar'] else 'ABOVE'} {row['bar_bytes'] / 1e9:.2f} GB)"
        lines.append(line)
    return "\n".join(lines)
