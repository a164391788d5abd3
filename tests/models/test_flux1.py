import pytest
import torch

from tritflow.formats.architecture import FLUX1_DEV
from tritflow.models import FLUX1, FamilyError, family_of
from tritflow.testing import tiny_flux_transformer


def linears_of(model):
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


def test_flux1_dev_has_494_block_linears_of_11_8_billion_weights():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config({**FLUX1_DEV, "guidance_embeds": True})
    real = {n: s for n, s in linears_of(model).items() if n.startswith(("transformer_", "single_transformer_"))}
    said = FLUX1.block_linears(FLUX1_DEV)
    assert said == real
    assert len(said) == 494
    assert sum(n * k for n, k in said.values()) == 11_834_228_736
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    assert [n for n, _ in model.named_modules() if n in FLUX1.block_order(FLUX1_DEV)] == (FLUX1.block_order(FLUX1_DEV))


def test_targets_are_the_block_linears_and_nothing_else():
    from tritflow.config import TernaryConfig

    model = tiny_flux_transformer()
    config = {"_class_name": "FluxTransformer2DModel", **model.config}
    assert TernaryConfig().targets == FLUX1.targets
    matched = {n for n in linears_of(model) if TernaryConfig().matches(n)}
    assert matched == set(FLUX1.block_linears(config))
    assert {"x_embedder", "context_embedder", "proj_out"}.isdisjoint(matched)


def test_family_of():
    model = tiny_flux_transformer()
    assert family_of({"_class_name": "FluxTransformer2DModel", **model.config}) is FLUX1
    with pytest.raises(FamilyError, match="'UNet2DConditionModel' is not a transformer"):
        family_of({"_class_name": "UNet2DConditionModel"})
    with pytest.raises(FamilyError, match="'num_layers' is -1"):
        family_of({**FLUX1_DEV, "num_layers": -1})
    with pytest.raises(FamilyError, match="add up"):
        family_of({**FLUX1_DEV, "axes_dims_rope": [16, 16, 16]})


def test_tensors_are_checked_by_name_and_shape():
    model = tiny_flux_transformer()
    config = {"_class_name": "FluxTransformer2DModel", **model.config}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    FLUX1.check_tensors(config, shapes)
    name = "single_transformer_blocks.0.proj_out.weight"
    with pytest.raises(FamilyError, match=f"'{name}' is missing"):
        FLUX1.check_tensors(config, {n: s for n, s in shapes.items() if n != name})
    with pytest.raises(FamilyError, match=r"has shape \[1, 2\]"):
        FLUX1.check_tensors(config, shapes | {name: (1, 2)})
