import pytest
import torch

from tritflow.config import TernaryConfig
from tritflow.models import FLUX2, FamilyError, family_of
from tritflow.models.flux2 import FLUX2_DEV, FLUX2_KLEIN_4B, FLUX2_KLEIN_9B
from tritflow.testing import tiny_flux2_transformer


def linears_of(model):
    return {n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


@pytest.mark.parametrize(
    ("config", "linears", "parameters"),
    [
        (FLUX2_KLEIN_4B, 100, 3_875_544_576),
        (FLUX2_KLEIN_9B, 144, 9_078_581_248),
        (FLUX2_DEV, 192, 32_223_281_152),
    ],
    ids=["klein-4B", "klein-9B", "dev"],
)
def test_shapes_are_those_of_the_class(config, linears, parameters):
    from diffusers import Flux2Transformer2DModel

    with torch.device("meta"):
        model = Flux2Transformer2DModel.from_config(config)
    assert FLUX2.shapes(config) == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert list(FLUX2.shapes(config)) == list(model.state_dict())
    real = {n: s for n, s in linears_of(model).items() if n.startswith(("transformer_", "single_transformer_"))}
    assert FLUX2.block_linears(config) == real
    assert len(real) == linears
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert FLUX2.block_order(config) == [
        n for n, _ in model.named_modules() if n.count(".") == 1 and n.split(".")[0].endswith("transformer_blocks")
    ]


def test_targets_are_the_block_linears_and_nothing_else():
    model = tiny_flux2_transformer()
    config = {"_class_name": "Flux2Transformer2DModel", **model.config}
    assert TernaryConfig().targets == FLUX2.targets
    matched = {n for n in linears_of(model) if TernaryConfig().matches(n)}
    assert matched == set(FLUX2.block_linears(config))
    assert {"x_embedder", "proj_out", "single_stream_modulation.linear"}.isdisjoint(matched)
    FLUX2.check_tensors(config, {n: tuple(t.shape) for n, t in model.state_dict().items()})


def test_family_of():
    assert family_of(FLUX2_DEV) is FLUX2
    for key, value in (
        ("num_layers", -1),
        ("mlp_ratio", 0),
        ("guidance_embeds", 1),
        ("axes_dims_rope", [31, 33, 32, 32]),
        ("in_channels", "128"),
    ):
        with pytest.raises(FamilyError, match=f"'{key}' is .*, which no FLUX.2"):
            family_of(FLUX2_DEV | {key: value})
    with pytest.raises(FamilyError, match="add up"):
        family_of(FLUX2_DEV | {"axes_dims_rope": [32, 32, 32]})
