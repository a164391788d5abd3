"""FLUX.1 (dev, schnell and their finetunes): double blocks of two streams, then single blocks of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tritflow.models.family import Family, FamilyError

# FLUX.1-dev's own transformer/config.json; diffusers' defaults are FLUX.1-schnell's.
FLUX1_DEV_CONFIG: dict[str, Any] = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}

_REQUIRED = ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
_MLP_RATIO = 4


class Flux1(Family):
    """`FluxTransformer2DModel`. 14 linears a double block, 6 a single block: 494 in FLUX.1-dev."""

    name: ClassVar[str] = "flux1"
    transformer_class: ClassVar[str] = "FluxTransformer2DModel"
    targets: ClassVar[tuple[str, ...]] = ("transformer_blocks.*", "single_transformer_blocks.*")

    def check_config(self, config: Mapping[str, Any]) -> None:
        """See `Family.check_config`."""
        if config.get("_class_name") != self.transformer_class:
            raise FamilyError(f"'{config.get('_class_name')}' is not {self.transformer_class}")
        for key in _REQUIRED:
            value = config.get(key)
            if type(value) is not int or value < (0 if key.startswith("num_") and "layers" in key else 1):
                raise FamilyError(f"{self.transformer_class}: config has {key} = {value!r}, a number is needed")
        axes = config.get("axes_dims_rope")
        if axes is not None and sum(axes) != config["attention_head_dim"]:
            raise FamilyError(
                f"{self.transformer_class}: axes_dims_rope {list(axes)} must add up to attention_head_dim "
                f"{config['attention_head_dim']}"
            )

    def block_order(self, config: Mapping[str, Any]) -> list[str]:
        """See `Family.block_order`."""
        return [f"transformer_blocks.{i}" for i in range(config["num_layers"])] + [
            f"single_transformer_blocks.{i}" for i in range(config["num_single_layers"])
        ]

    def block_linears(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """See `Family.block_linears`."""
        d = config["num_attention_heads"] * config["attention_head_dim"]
        wide = _MLP_RATIO * d
        # In the order in which a block runs them.
        double: dict[str, tuple[int, int]] = {"norm1.linear": (6 * d, d), "norm1_context.linear": (6 * d, d)}
        double |= {f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")}
        double |= {f"attn.{name}": (d, d) for name in ("add_q_proj", "add_k_proj", "add_v_proj")}
        double |= {"attn.to_out.0": (d, d), "attn.to_add_out": (d, d)}
        double |= {"ff.net.0.proj": (wide, d), "ff.net.2": (d, wide)}
        double |= {"ff_context.net.0.proj": (wide, d), "ff_context.net.2": (d, wide)}
        single: dict[str, tuple[int, int]] = {"norm.linear": (3 * d, d), "proj_mlp": (wide, d)}
        single |= {f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")}
        single |= {"proj_out": (d, d + wide)}
        inside = {"transformer_blocks": double, "single_transformer_blocks": single}
        return {
            f"{block}.{name}": shape
            for block in self.block_order(config)
            for name, shape in inside[block.split(".")[0]].items()
        }


FLUX1 = Flux1()
