"""Names and shapes of a transformer's tensors, from its config alone.

With it a folder can be checked, and its size computed, without building the network. Verified against diffusers'
own class in the tests. FLUX.1 is known here; other families register themselves when `tritflow.models` is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tritflow.formats.errors import CheckpointError

FLUX1 = "FluxTransformer2DModel"

FLUX1_DEV: dict[str, Any] = {
    "_class_name": FLUX1,
    "attention_head_dim": 128,
    "axes_dims_rope": [16, 56, 56],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "out_channels": None,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
"""FLUX.1-dev's config; each value but `guidance_embeds` (False) is also diffusers' default."""

Shape = tuple[int, ...]


Shapes = Callable[[Mapping[str, Any]], dict[str, Shape]]
"""From a config to every tensor's name and shape, in the model's order; raises `CheckpointError`."""

_SHAPES: dict[str, Shapes] = {}


def register_shapes(class_name: str, shapes: Shapes) -> None:
    """Make a diffusers transformer class known to the readers and writers of checkpoints."""
    _SHAPES[class_name] = shapes


def known_classes() -> tuple[str, ...]:
    """The diffusers transformer classes that can be quantized."""
    return tuple(_SHAPES)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether `shapes_of` covers this config's class."""
    return config.get("_class_name") in _SHAPES


def shapes_of(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor of the model that `config` describes, in the model's own order.

    Raises:
        CheckpointError: another class of model, or a value that no model of the class has.
    """
    if not is_known(config):
        raise CheckpointError(
            f"config.json: '{str(config.get('_class_name'))[:80]}' is none of {', '.join(known_classes())}"
        )
    return _SHAPES[config["_class_name"]](config)


def flux1_shapes(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Every tensor of `FluxTransformer2DModel(**config)`, in the model's own order.

    Args:
        config: as in config.json; missing keys take diffusers' defaults.

    Returns:
        Name -> shape; linear weights are [out_features, in_features].

    Raises:
        CheckpointError: a value of the wrong type or out of range, or rope axes that do not fill a head.
    """
    c = _values(config)
    head, hidden = c["attention_head_dim"], c["attention_head_dim"] * c["num_attention_heads"]
    mlp = 4 * hidden
    shapes: dict[str, Shape] = {}

    def linear(name: str, out_features: int, in_features: int) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        shapes[f"{name}.bias"] = (out_features,)

    embedders = ["timestep_embedder", "guidance_embedder"][: 2 if c["guidance_embeds"] else 1]
    for name, width in [*((e, 256) for e in embedders), ("text_embedder", c["pooled_projection_dim"])]:
        linear(f"time_text_embed.{name}.linear_1", hidden, width)
        linear(f"time_text_embed.{name}.linear_2", hidden, hidden)
    linear("context_embedder", hidden, c["joint_attention_dim"])
    linear("x_embedder", hidden, c["in_channels"])
    for i in range(c["num_layers"]):
        block = f"transformer_blocks.{i}"
        linear(f"{block}.norm1.linear", 6 * hidden, hidden)
        linear(f"{block}.norm1_context.linear", 6 * hidden, hidden)
        for norm in ("norm_q", "norm_k"):
            shapes[f"{block}.attn.{norm}.weight"] = (head,)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            linear(f"{block}.attn.{part}", hidden, hidden)
        for norm in ("norm_added_q", "norm_added_k"):
            shapes[f"{block}.attn.{norm}.weight"] = (head,)
        for part in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            linear(f"{block}.attn.{part}", hidden, hidden)
        for feed_forward in ("ff", "ff_context"):
            linear(f"{block}.{feed_forward}.net.0.proj", mlp, hidden)
            linear(f"{block}.{feed_forward}.net.2", hidden, mlp)
    for i in range(c["num_single_layers"]):
        block = f"single_transformer_blocks.{i}"
        linear(f"{block}.norm.linear", 3 * hidden, hidden)
        linear(f"{block}.proj_mlp", mlp, hidden)
        linear(f"{block}.proj_out", hidden, hidden + mlp)
        for norm in ("norm_q", "norm_k"):
            shapes[f"{block}.attn.{norm}.weight"] = (head,)
        for part in ("to_q", "to_k", "to_v"):
            linear(f"{block}.attn.{part}", hidden, hidden)
    linear("norm_out.linear", 2 * hidden, hidden)
    out_channels = c["out_channels"] or c["in_channels"]
    linear("proj_out", c["patch_size"] ** 2 * out_channels, hidden)
    return shapes


def _values(config: Mapping[str, Any]) -> dict[str, Any]:
    values = {k: config.get(k, v) for k, v in FLUX1_DEV.items() if not k.startswith("_")}
    values["guidance_embeds"] = config.get("guidance_embeds", False)
    for key, value in values.items():
        least = 0 if key in ("num_layers", "num_single_layers") else 1
        if key == "guidance_embeds":
            good = isinstance(value, bool)
        elif key == "axes_dims_rope":
            good = isinstance(value, list | tuple) and all(type(v) is int and v > 0 for v in value)
            good = good and len(value) == 3 and all(v % 2 == 0 for v in value)
        else:
            good = (key == "out_channels" and value is None) or (type(value) is int and least <= value < 1 << 20)
        if not good or (key.startswith("num_") and value > 10_000):
            raise CheckpointError(f"config.json: '{key}' is {str(value)[:60]}, which no FLUX.1 transformer has")
    if sum(values["axes_dims_rope"]) != values["attention_head_dim"]:
        raise CheckpointError(
            f"config.json: axes_dims_rope {list(values['axes_dims_rope'])} must add up to attention_head_dim "
            f"{values['attention_head_dim']}"
        )
    return values


def check_shapes(config: Mapping[str, Any], shapes: Mapping[str, Shape], where: str) -> None:
    """Compare a checkpoint's tensors with what its config asks for.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown or of another shape.
    """
    expected = shapes_of(config)
    for name, shape in expected.items():
        if name not in shapes:
            raise CheckpointError(f"{where}: tensor '{name}' is missing; the config asks for it")
        if tuple(shapes[name]) != shape:
            raise CheckpointError(
                f"{where}: '{name}' has shape {list(shapes[name])}, the config asks for {list(shape)}"
            )
    for name in shapes:
        if name not in expected:
            raise CheckpointError(f"{where}: tensor '{name[:120]}' is unknown to this config's transformer")


register_shapes(FLUX1, flux1_shapes)
