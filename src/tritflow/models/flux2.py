"""FLUX.2 (dev, klein and their finetunes): FLUX.1's two kinds of block, with fused linears and shared modulation.

A single block has two linears: `to_qkv_mlp_proj` makes query, key, value and both halves of the gated MLP at once,
`to_out` takes attention and MLP side by side. Modulation belongs to the model, not to its blocks, so it stays dense
under the default targets: three linears, 3.7 % of klein-4B's weights. No linear has a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tritflow.formats.architecture import Shape, register_shapes
from tritflow.formats.errors import CheckpointError
from tritflow.models.shaped import ShapedFamily

FLUX2_DEV: dict[str, Any] = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "guidance_embeds": True,
}
"""FLUX.2-dev's config, which is also diffusers' default: 32 G parameters."""

FLUX2_KLEIN_4B: dict[str, Any] = FLUX2_DEV | {
    "num_layers": 5,
    "num_single_layers": 20,
    "num_attention_heads": 24,
    "joint_attention_dim": 7680,
    "guidance_embeds": False,
}
"""FLUX.2-klein-4B's config (sizes from Black Forest Labs' flux2 repository)."""

FLUX2_KLEIN_9B: dict[str, Any] = FLUX2_DEV | {
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
"""FLUX.2-klein-9B's config (sizes from Black Forest Labs' flux2 repository)."""


class Flux2(ShapedFamily):
    """`Flux2Transformer2DModel`. 12 linears a double block, 2 a single block: 100 in klein-4B, 192 in dev."""

    name: ClassVar[str] = "flux2"
    transformer_class: ClassVar[str] = FLUX2_DEV["_class_name"]
    targets: ClassVar[tuple[str, ...]] = ("transformer_blocks.*", "single_transformer_blocks.*")

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `ShapedFamily.shapes`."""
        c = _values(config)
        head, hidden = c["attention_head_dim"], c["attention_head_dim"] * c["num_attention_heads"]
        mlp = int(hidden * c["mlp_ratio"])
        shapes: dict[str, Shape] = {}

        def linear(name: str, out_features: int, in_features: int) -> None:
            shapes[f"{name}.weight"] = (out_features, in_features)

        def norms(attention: str, *names: str) -> None:
            shapes.update({f"{attention}.{name}.weight": (head,) for name in names})

        for embedder in ["timestep_embedder", "guidance_embedder"][: 2 if c["guidance_embeds"] else 1]:
            linear(f"time_guidance_embed.{embedder}.linear_1", hidden, c["timestep_guidance_channels"])
            linear(f"time_guidance_embed.{embedder}.linear_2", hidden, hidden)
        for stream, sets in (("double_stream_modulation_img", 2), ("double_stream_modulation_txt", 2)):
            linear(f"{stream}.linear", 3 * sets * hidden, hidden)
        linear("single_stream_modulation.linear", 3 * hidden, hidden)
        linear("x_embedder", hidden, c["in_channels"])
        linear("context_embedder", hidden, c["joint_attention_dim"])
        for i in range(c["num_layers"]):
            attention = f"transformer_blocks.{i}.attn"
            for part in ("to_q", "to_k", "to_v"):
                linear(f"{attention}.{part}", hidden, hidden)
            norms(attention, "norm_q", "norm_k")
            linear(f"{attention}.to_out.0", hidden, hidden)
            norms(attention, "norm_added_q", "norm_added_k")
            for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                linear(f"{attention}.{part}", hidden, hidden)
            for feed_forward in ("ff", "ff_context"):
                linear(f"transformer_blocks.{i}.{feed_forward}.linear_in", 2 * mlp, hidden)
                linear(f"transformer_blocks.{i}.{feed_forward}.linear_out", hidden, mlp)
        for i in range(c["num_single_layers"]):
            attention = f"single_transformer_blocks.{i}.attn"
            linear(f"{attention}.to_qkv_mlp_proj", 3 * hidden + 2 * mlp, hidden)
            norms(attention, "norm_q", "norm_k")
            linear(f"{attention}.to_out", hidden, hidden + mlp)
        linear("norm_out.linear", 2 * hidden, hidden)
        linear("proj_out", c["patch_size"] ** 2 * (c["out_channels"] or c["in_channels"]), hidden)
        return shapes


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {key: config.get(key, default) for key, default in FLUX2_DEV.items() if not key.startswith("_")}
    for key, value in values.items():
        least = 0 if key in ("num_layers", "num_single_layers") else 1
        if key == "guidance_embeds":
            good = isinstance(value, bool)
        elif key == "axes_dims_rope":
            good = isinstance(value, list | tuple) and all(type(v) is int and v > 0 and v % 2 == 0 for v in value)
            good = good and 1 <= len(value) <= 8
        elif key == "mlp_ratio":
            good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1 << 10
        else:
            good = (key == "out_channels" and value is None) or (type(value) is int and least <= value < 1 << 20)
        if not good or (key.startswith("num_") and value > 10_000):
            raise CheckpointError(f"config.json: '{key}' is {str(value)[:60]}, which no FLUX.2 transformer has")
    if sum(values["axes_dims_rope"]) != values["attention_head_dim"]:
        raise CheckpointError(
            f"config.json: axes_dims_rope {list(values['axes_dims_rope'])} must add up to attention_head_dim "
            f"{values['attention_head_dim']}"
        )
    return values


FLUX2 = Flux2()
register_shapes(FLUX2.transformer_class, FLUX2.shapes)
