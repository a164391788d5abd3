"""Sizes are those of the files, whatever made them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tritflow import results
from tritflow.assets import asset_path
from tritflow.formats.accounting import storage_estimate
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.formats.checkpoint import verify_folder
from tritflow.formats.errors import CheckpointError, DiskFullError
from tritflow.profiling import storage

TINY: dict[str, Any] = {
    **FLUX1_DEV,
    "attention_head_dim": 32,
    "axes_dims_rope": [8, 12, 12],
    "joint_attention_dim": 64,
    "num_attention_heads": 4,
    "num_layers": 1,
    "num_single_layers": 2,
    "pooled_projection_dim": 48,
}


def test_the_small_flux_is_measured_as_it_lies_on_disk() -> None:
    dense, two_bit, base3 = storage.small_flux()
    folder = asset_path("small") / "transformer"
    assert dense["bytes"] == sum(p.stat().st_size for p in folder.iterdir())
    assert "bits_per_weight" not in dense
    assert two_bit["packed_bits_per_weight"] >= 2 > base3["packed_bits_per_weight"] >= 1.6
    for row in (two_bit, base3):
        assert row["bits_per_weight"] > row["packed_bits_per_weight"]
        assert row["ratio"] == dense["bytes"] / row["bytes"]
        assert row["parameters"] == dense["parameters"]


def test_a_proof_writes_verifies_measures_and_leaves_nothing(tmp_path: Path) -> None:
    stages: dict[str, tuple[int, int]] = {}
    rows = storage.full_size(
        tmp_path, config=TINY, model="tiny", progress=lambda stage, *count: stages.update({stage: count})
    )
    assert list(tmp_path.iterdir()) == []
    assert all(done == total for done, total in stages.values())
    bf16, two_bit, base3 = rows
    shapes = flux1_shapes(TINY)
    assert bf16["bytes"] == 2 * sum(torch.Size(s).numel() for s in shapes.values())
    assert not bf16["measured"]
    for row, packing in ((two_bit, "2bit"), (base3, "base3")):
        assert row["tensor_bytes"] == storage_estimate(shapes, packing).total
        assert row["bytes"] == sum(row["files"].values()) > row["tensor_bytes"]
        assert row["ratio"] == bf16["bytes"] / row["bytes"]
        assert row["ternary_layers"] == 14 + 2 * 6
        assert row["random"]
        assert row["peak_rss_bytes"] > 1e7
        assert "within_bar" not in row  # bars are FLUX.1-dev's
        results.append(tmp_path / "storage.json", "storage", row)
    assert "tiny, base-3" in storage.table(rows)


def test_random_content_depends_on_the_seed_alone(tmp_path: Path) -> None:
    first = storage.write_random(tmp_path / "a", TINY)
    assert storage.write_random(tmp_path / "b", TINY) == first
    assert storage.write_random(tmp_path / "c", TINY, seed=1) != first
    folder = verify_folder(tmp_path / "a")
    trits = folder.linear("single_transformer_blocks.0.proj_mlp")
    assert trits.packed.unique().numel() == 3**4  # every byte that four trits can make


def test_flux1_devs_bars_hold_by_the_shapes_too() -> None:
    shapes = flux1_shapes(FLUX1_DEV)
    for packing, bar in storage.BARS.items():
        assert storage_estimate(shapes, packing).total < bar


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**9, 10**9))
    with pytest.raises(DiskFullError, match=r"1\.0 GB free.*--workdir"):
        storage.full_size(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="not a folder"):
        storage.full_size(tmp_path / "none")
