"""Every FLUX.1 pipeline of diffusers draws with a ternary transformer what it draws with the dequantized one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxPipeline, FluxPriorReduxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image

import tritflow
from tritflow import TernaryLinear, TritflowConfig
from tritflow.pipelines.loading import load_pipeline
from tritflow.testing import assert_close, dense_twin, rope_axes, tiny_flux_folder, tiny_flux_transformer

SAME = 1e-4
SIZE = 32
LATENT = 16
"""Packed latent channels of the tiny VAE."""


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask() -> Image.Image:
    pixels = np.zeros((SIZE, SIZE), dtype=np.uint8)
    pixels[:, SIZE // 2 :] = 255
    return Image.fromarray(pixels)


def controlnet() -> FluxControlNetModel:
    """With weights: its output layers start at zero, which would leave the picture alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = FluxControlNetModel(
            in_channels=LATENT,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=rope_axes(16),
            guidance_embeds=True,
        )
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


# Class -> (extra transformer channels, extra components, arguments of the call). Fill's input is noise, masked
# picture and an 8x8 mask of every latent pixel, four of which are one token; Control's is noise and picture.
CALLS: dict[str, tuple[int, dict[str, Callable[[], Any]], dict[str, Any]]] = {
    "FluxPipeline": (0, {}, {}),
    "FluxImg2ImgPipeline": (0, {}, {"image": picture(0), "strength": 0.8}),
    "FluxInpaintPipeline": (0, {}, {"image": picture(0), "mask_image": mask(), "strength": 0.9}),
    "FluxKontextPipeline": (0, {}, {"image": picture(0), "max_area": SIZE * SIZE, "_auto_resize": False}),
    "FluxKontextInpaintPipeline": (
        0,
        {},
        {
            "image": picture(0),
            "mask_image": mask(),
            "image_reference": picture(1),
            "max_area": SIZE * SIZE,
            "_auto_resize": False,
        },
    ),
    "FluxFillPipeline": (LATENT + 4 * 64, {}, {"image": picture(0), "mask_image": mask()}),
    "FluxControlPipeline": (LATENT, {}, {"control_image": picture(1)}),
    "FluxControlImg2ImgPipeline": (LATENT, {}, {"control_image": picture(1), "image": picture(0)}),
    "FluxControlInpaintPipeline": (
        LATENT,
        {},
        {"control_image": picture(1), "image": picture(0), "mask_image": mask()},
    ),
    "FluxControlNetPipeline": (0, {"controlnet": controlnet}, {"control_image": picture(1)}),
    "FluxControlNetImg2ImgPipeline": (
        0,
        {"controlnet": controlnet},
        {"control_image": picture(1), "image": picture(0)},
    ),
    "FluxControlNetInpaintPipeline": (
        0,
        {"controlnet": controlnet},
        {"control_image": picture(1), "image": picture(0), "mask_image": mask()},
    ),
}


def draw(pipe: Any, **kwargs: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"height": SIZE, "width": SIZE, "num_inference_steps": 3, "output_type": "pt"}
    generator = torch.Generator().manual_seed(0)
    pictures = pipe(generator=generator, max_sequence_length=32, **{"prompt": "a star"} | settings | kwargs).images
    assert torch.isfinite(pictures).all()
    return pictures


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Any]:
    """Ternary transformers, by how many channels they read beside the noise."""
    made: dict[int, Any] = {}

    def transformer(extra: int) -> Any:
        if extra not in made:
            folder = tmp_path_factory.mktemp("transformer")
            dense = tiny_flux_transformer(in_channels=LATENT + extra, out_channels=LATENT, seed=extra)
            dense.save_pretrained(folder)
            made[extra] = FluxTransformer2DModel.from_pretrained(folder, quantization_config=TritflowConfig())
        return made[extra]

    return transformer


@pytest.fixture(scope="module")
def parts(tiny_flux: Path) -> dict[str, Any]:
    """All that the pipelines share."""
    pipe = FluxPipeline.from_pretrained(tiny_flux)
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    return {name: pipe.components[name] for name in names}


@pytest.mark.parametrize("name", CALLS)
def test_equals_the_dense_transformer(
    name: str, transformers: Callable[[int], Any], parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    extra, components, call = CALLS[name]
    transformer = transformers(extra)
    more = {key: make() for key, make in components.items()}
    build = getattr(diffusers, name)
    found = draw(build(**parts, **more, transformer=transformer), **call)
    assert found.shape == (1, 3, SIZE, SIZE)
    assert_close(found, draw(build(**parts, **more, transformer=dense_twin(transformer)), **call), SAME)
    # And the ternary layers are what drew it.
    with monkeypatch.context() as patch:
        patch.setattr(TernaryLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
        assert not torch.equal(draw(build(**parts, **more, transformer=transformer), **call), found)


def test_redux_pictures_prompt_a_ternary_transformer(transformers: Callable[[int], Any], parts: dict[str, Any]) -> None:
    from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        config = SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=16,
        )
        prior = FluxPriorReduxPipeline(
            image_encoder=SiglipVisionModel(config).eval(),
            feature_extractor=SiglipImageProcessor(size={"height": SIZE, "width": SIZE}),
            image_embedder=ReduxImageEncoder(redux_dim=32, txt_in_features=32).eval(),
            text_encoder=parts["text_encoder"],
            tokenizer=parts["tokenizer"],
            text_encoder_2=parts["text_encoder_2"],
            tokenizer_2=parts["tokenizer_2"],
        )
    transformer = transformers(0)
    drawn = []
    for seed in (0, 1):
        with torch.no_grad():
            call = {"prompt": None, **prior(picture(seed), prompt="a star")}
        drawn.append(draw(FluxPipeline(**parts, transformer=transformer), **call))
        assert_close(drawn[-1], draw(FluxPipeline(**parts, transformer=dense_twin(transformer)), **call), SAME)
    assert not torch.equal(*drawn)


def test_schnell_has_no_embedded_guidance(tmp_path: Path) -> None:
    flux = tiny_flux_folder(tmp_path / "flux", guidance=False)
    tritflow.quantize(flux, tmp_path / "ternary", "absmean", device="cpu")
    pipe = load_pipeline(tmp_path / "ternary", device="cpu")
    assert not pipe.transformer.config.guidance_embeds
    assert sum(isinstance(m, TernaryLinear) for m in pipe.transformer.modules()) == 20
    one, two = (draw(pipe, guidance_scale=scale) for scale in (0.0, 3.5))
    assert torch.equal(one, two)
    twin = FluxPipeline(**{**pipe.components, "transformer": dense_twin(pipe.transformer)})
    assert_close(one, draw(twin, guidance_scale=0.0), SAME)
    assert tritflow.generate(pipe, "a red star", num_inference_steps=2)[0].size == (SIZE, SIZE)
