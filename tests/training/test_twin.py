import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel

from tritflow.pipelines.loading import load_pipeline
from tritflow.testing import relative_error, transformer_inputs
from tritflow.training.twin import main, make_twin


def velocity(folder):
    model = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    with torch.no_grad():
        return model(**transformer_inputs(model, batch=2))[0]


def test_the_twin_of_a_folder_is_a_pipeline_that_computes_the_same(tiny_flux, tmp_path):
    meta = make_twin(tiny_flux, tmp_path / "twin", dtype=torch.float32)
    assert meta == json.loads((tmp_path / "twin" / "meta.json").read_text())
    assert meta["groups"] == 5 + 2
    assert relative_error(velocity(tmp_path / "twin"), velocity(tiny_flux)) < 2e-5
    assert load_pipeline(tmp_path / "twin", device="cpu").transformer is not None
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "twin" / weights).read_bytes() != (tiny_flux / weights).read_bytes()
    make_twin(tiny_flux, tmp_path / "twin", dtype=torch.float32, seed=1)  # a twin may be made again


def test_stored_in_bfloat16_it_is_off_by_that_rounding(tiny_flux, tmp_path):
    make_twin(tiny_flux, tmp_path / "plain", low=1, high=1, dtype=torch.bfloat16)
    make_twin(tmp_path / "plain", tmp_path / "twin")
    make_twin(tmp_path / "plain", tmp_path / "exact", low=64, high=64)
    source = velocity(tmp_path / "plain")
    assert relative_error(velocity(tmp_path / "twin"), source) < 0.01
    assert relative_error(velocity(tmp_path / "exact"), source) < 0.01


def test_the_command(tiny_flux, tmp_path, capsys):
    main([str(tiny_flux), str(tmp_path / "twin"), "--channels", "2"])
    assert "2 outlier channels in each of 7 groups" in capsys.readouterr().out
    bare = shutil.copytree(tiny_flux / "transformer", tmp_path / "bare")
    for arguments, message in (
        ([str(tiny_flux), str(tiny_flux)], "no finished twin"),
        ([str(tiny_flux), str(tmp_path / "x"), "--low", "0"], "low <= high"),
        ([str(bare), str(tmp_path / "x")], "bare transformer"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
