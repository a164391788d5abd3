import json
import shutil

import pytest
import torch

from tritflow.config import ConfigError
from tritflow.formats.checkpoint import TernaryFolder, verify_folder
from tritflow.formats.errors import CheckpointError
from tritflow.pipelines import quantize as module
from tritflow.pipelines.quantize import QuantizeError, quantize
from tritflow.quantization.ternarize import absmean, mse_optimal

LINEARS = 20  # one double block and one single block


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_rounding_streams_to_a_whole_pipeline_folder(tiny_flux, tmp_path):
    seen = []
    report = quantize(tiny_flux, tmp_path / "out", "fast", on_progress=lambda *a: seen.append(a))
    assert report.linears == LINEARS
    assert report.components
    assert not report.resumed
    folder = TernaryFolder(tmp_path / "out" / "transformer")
    verify_folder(tmp_path / "out" / "transformer")
    from safetensors.torch import load_file

    dense = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "transformer_blocks.0.attn.to_q"
    trits, scale = mse_optimal(dense[f"{name}.weight"])
    stored = folder.linear(name)
    from tritflow.formats.packing import pack_2bit

    assert torch.equal(stored.packed, pack_2bit(trits))
    assert torch.equal(stored.weight_scale, scale.bfloat16())
    assert torch.equal(stored.bias, dense[f"{name}.bias"])
    assert torch.equal(folder.tensor("x_embedder.weight"), dense["x_embedder.weight"])
    assert seen[0][0] == "round"
    assert seen[-1][0] == "copy"
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["complete"]
    assert meta["recipe"]["name"] == "fast"
    assert meta["digest"] == report.digest
    assert not (tmp_path / "out" / ".work").exists()
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert quantize(tiny_flux, tmp_path / "out", "fast").resumed


def test_overrides_end_up_in_the_config(tiny_flux, tmp_path):
    report = quantize(
        tiny_flux,
        tmp_path / "out",
        "absmean",
        mode="w2a8",
        packing="base3",
        skip=["*.norm1.linear", "*.norm1_context.linear"],
    )
    assert (report.linears, report.skipped) == (LINEARS - 2, 2)
    config = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert config["mode"] == "w2a8"
    assert config["packing"] == "base3"
    assert config["skip"] == ["*.norm1.linear", "*.norm1_context.linear"]
    folder = TernaryFolder(tmp_path / "out" / "transformer")
    from safetensors.torch import load_file

    dense = load_file(tiny_flux / "transformer" / "diffusion_pytorch_model.safetensors")
    name = "single_transformer_blocks.0.proj_out"
    assert torch.equal(folder.linear(name).weight_scale, absmean(dense[f"{name}.weight"])[1].bfloat16())
    assert "transformer_blocks.0.norm1.linear.weight" in folder


def test_column_scales(tiny_flux, tmp_path):
    quantize(tiny_flux, tmp_path / "out", "fast", column_scale=True)
    stored = TernaryFolder(tmp_path / "out" / "transformer").linear("transformer_blocks.0.ff.net.2")
    assert stored.input_scale is not None
    assert stored.input_scale.shape == (stored.in_features,)


@pytest.mark.parametrize("after", [0, 3, 17, 40])
def test_killed_anywhere_it_resumes_to_the_same_bytes(tiny_flux, tmp_path, after):
    quantize(tiny_flux, tmp_path / "whole", "fast")

    def kill(stage, done, total):
        if stage == "round" and done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_flux, tmp_path / "cut", "fast", on_progress=kill)
    assert not json.loads((tmp_path / "cut" / "meta.json").read_text())["complete"]
    quantize(tiny_flux, tmp_path / "cut", "fast")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_another_job_is_not_mixed_in(tiny_flux, tmp_path):
    out = tmp_path / "out"
    first = quantize(tiny_flux, out, "fast")
    with pytest.raises(QuantizeError, match="--overwrite"):
        quantize(tiny_flux, out, "absmean")
    second = quantize(tiny_flux, out, "absmean", overwrite=True)
    assert second.digest != first.digest
    dense = tmp_path / "dense"
    shutil.copytree(tiny_flux, dense)
    with pytest.raises(QuantizeError, match="did not write"):
        quantize(tiny_flux, dense, "fast", overwrite=True)
    with pytest.raises(QuantizeError, match="where the source lies"):
        quantize(dense, dense, "fast")


def test_large_components_stay_where_they_are(tiny_flux, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "COMPONENTS_LIMIT", 1000)
    report = quantize(tiny_flux, tmp_path / "out", "fast")
    assert not report.components
    assert not (tmp_path / "out" / "model_index.json").exists()
    assert json.loads((tmp_path / "out" / "meta.json").read_text())["base"] == str(tiny_flux.resolve())
    assert quantize(tiny_flux, tmp_path / "full", "fast", full=True).components


def test_bad_requests_are_one_line(tiny_flux, tmp_path):
    quantize(tiny_flux, tmp_path / "out", "fast")
    cases = [
        (lambda: quantize(tmp_path / "out", tmp_path / "again"), CheckpointError, "quantized already"),
        (lambda: quantize(tmp_path / "nowhere", tmp_path / "x"), CheckpointError, "does not exist"),
        (lambda: quantize(tiny_flux, tmp_path / "x", "fsat"), ConfigError, "did you mean 'fast'"),
        (lambda: quantize(tiny_flux, tmp_path / "x", mode="w2a4"), ConfigError, "w2a4"),
        (lambda: quantize(tiny_flux, tmp_path / "x", skip=["nothing.*"]), QuantizeError, "matches none"),
        (lambda: quantize(tiny_flux, tmp_path / "x", skip=["*"]), QuantizeError, "nothing to quantize"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()


def test_memory_is_one_tensor_at_a_time(tiny_flux, tmp_path, monkeypatch):
    """No more than one source tensor beside its bias is alive while the next is read."""
    import weakref

    from tritflow.formats.source import FolderSource

    read = FolderSource.tensor
    alive: list = []
    most = 0

    def counted(self, name):
        nonlocal most
        tensor = read(self, name)
        alive[:] = [r for r in alive if r() is not None]
        alive.append(weakref.ref(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(FolderSource, "tensor", counted)
    quantize(tiny_flux, tmp_path / "out", "fast")
    assert most <= 3
