"""Sizes that are measured, and FLUX.1-dev's computed from its config alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_ternary import CONFIG, tiny_tensors, write_tiny

from tritflow.config import TernaryConfig
from tritflow.formats.accounting import account, storage_estimate
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.formats.checkpoint import CheckpointError


def test_flux_dev_fits_the_promised_sizes() -> None:
    """At most 3.11 GB with two bits and 2.55 GB in base 3, headers and checksums counted generously."""
    shapes = flux1_shapes(FLUX1_DEV)
    two, three = storage_estimate(shapes, "2bit"), storage_estimate(shapes, "base3")
    assert two.linears == three.linears == 494
    assert two.bf16 == 23_802_816_640
    headers = 300 * 4 * len(shapes)
    assert two.total + headers <= 3.11e9
    assert three.total + headers <= 2.55e9
    with_columns = storage_estimate(shapes, "2bit", TernaryConfig(column_scale=True))
    assert with_columns.scales > two.scales
    assert with_columns.total + headers <= 3.11e9


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("column_scale", [False, True])
def test_the_estimate_equals_what_is_written(tmp_path: Path, packing: str, column_scale: bool) -> None:
    ternary = TernaryConfig(packing=packing, column_scale=column_scale)
    write_tiny(tmp_path / "m", ternary)
    (component,) = account(tmp_path / "m")
    summary = component.summary()
    estimate = storage_estimate(flux1_shapes(CONFIG), packing, ternary)
    assert summary["tensor_bytes"] == estimate.total
    assert summary["bf16_bytes"] == estimate.bf16
    assert summary["ternary_layers"] == estimate.linears
    assert summary["file_bytes"] == sum(p.stat().st_size for p in (tmp_path / "m").iterdir())


def test_trits_are_counted_exactly(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    linears, _ = tiny_tensors(TernaryConfig())
    (component,) = account(tmp_path / "m")
    for layer in component.ternary:
        trits = linears[layer.name]["trits"]
        assert layer.trits == tuple(int((trits == v).sum()) for v in (-1, 0, 1))
        assert layer.shape == tuple(trits.shape)
    assert sum(component.summary()["trits"].values()) == pytest.approx(1)
    assert account(tmp_path / "m", read_data=False)[0].ternary[0].trits is None


def test_damage_is_found_while_accounting(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m")
    file = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        account(tmp_path / "m")


def test_dense_pipelines_and_single_files(tmp_path: Path) -> None:
    from tritflow.testing import tiny_flux_folder

    tiny_flux_folder(tmp_path / "flux")
    components = {c.name: c for c in account(tmp_path / "flux")}
    assert next(iter(components)) == "transformer"
    assert {"transformer", "vae", "text_encoder", "text_encoder_2"} <= set(components)
    transformer = components["transformer"]
    assert transformer.summary()["ternary_layers"] == 0
    assert {layer.kind for layer in transformer.layers} <= {"bf16", "f32"}
    assert [c.name for c in account(tmp_path / "flux" / "transformer")] == ["transformer"]
    single = next((tmp_path / "flux" / "transformer").glob("*.safetensors"))
    assert account(single)[0].parameters == transformer.parameters


def test_bits_of_a_large_layer_are_two(tmp_path: Path) -> None:
    from tritflow.formats.checkpoint import TransformerWriter

    writer = TransformerWriter(tmp_path / "m", TernaryConfig())
    writer.add_linear("transformer_blocks.0.a", torch.zeros(512, 3072, dtype=torch.int8), torch.ones(512))
    writer.finish({"_class_name": "AnotherTransformer"})
    (component,) = account(tmp_path / "m")
    assert component.summary()["bits_per_ternary_weight"] == 2
    assert component.layers[0].bits == pytest.approx(2 + 16 / 3072)
