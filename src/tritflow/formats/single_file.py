"""Black Forest Labs' own tensor names and fusions, as single-file finetunes are shipped, beside diffusers' names.

A fused tensor is its parts stacked along rows, in the order of the table; `final_layer.adaLN_modulation.1` holds
(shift, scale) where diffusers' `norm_out.linear` holds (scale, shift). Checked in the tests against diffusers' own
converter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tritflow.formats.architecture import FLUX1, FLUX1_DEV, Shape, flux1_shapes
from tritflow.formats.errors import CheckpointError

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_SWAPPED = ("final_layer.adaLN_modulation.1", "norm_out.linear")
_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
"""What may stand before every transformer tensor in a file."""
_OTHER_MODELS = (
    "vae.",
    "text_encoder",
    "first_stage_model.",
    "cond_stage_model.",
    "conditioner.",
    "model_ema.",
)


@dataclass(frozen=True)
class Piece:
    """Where a diffusers tensor lies in a single file: rows start:stop of `source`, halves exchanged if `swapped`."""

    source: str
    start: int
    stop: int
    swapped: bool = False


def bfl_pieces(config: Mapping[str, Any]) -> dict[str, Piece]:
    """For every tensor of the diffusers model: its place under Black Forest Labs' names.

    Args:
        config: the diffusers config.

    Returns:
        diffusers tensor name -> `Piece`, in the model's order.
    """
    shapes = flux1_shapes(config)
    pieces: dict[str, Piece] = {}

    def fused(source: str, parts: Iterable[str], swapped: bool = False) -> None:
        for kind in ("weight", "bias"):
            row = 0
            for part in parts:
                rows = shapes[f"{part}.{kind}"][0]
                pieces[f"{part}.{kind}"] = Piece(f"{source}.{kind}", row, row + rows, swapped)
                row += rows

    def norm(source: str, part: str) -> None:
        pieces[f"{part}.weight"] = Piece(f"{source}.scale", 0, shapes[f"{part}.weight"][0])

    for source, part in _TOP.items():
        if f"{part}.weight" in shapes:
            fused(source, (part,))
    fused(_SWAPPED[0], (_SWAPPED[1],), swapped=True)
    for count, theirs, ours, table, norms in (
        ("num_layers", "double_blocks", "transformer_blocks", _DOUBLE, _DOUBLE_NORMS),
        ("num_single_layers", "single_blocks", "single_transformer_blocks", _SINGLE, _SINGLE_NORMS),
    ):
        for i in range(config[count]):
            for source, parts in table.items():
                fused(f"{theirs}.{i}.{source}", [f"{ours}.{i}.{part}" for part in parts])
            for source, part in norms.items():
                norm(f"{theirs}.{i}.{source}", f"{ours}.{i}.{part}")
    return {name: pieces[name] for name in shapes}


def to_bfl(config: Mapping[str, Any], tensor: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """A whole model under Black Forest Labs' names, fused.

    Args:
        config: the diffusers config.
        tensor: gives a diffusers tensor by name.
    """
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name, piece in bfl_pieces(config).items():
        value = tensor(name)
        parts.setdefault(piece.source, []).append((piece.start, swap_halves(value) if piece.swapped else value))
    return {name: torch.cat([t for _, t in sorted(p, key=lambda item: item[0])]) for name, p in parts.items()}


def swap_halves(tensor: Tensor) -> Tensor:
    """(shift, scale) stacked along rows becomes (scale, shift), and back."""
    first, second = tensor.chunk(2, dim=0)
    return torch.cat([second, first])


def strip_prefix(names: Iterable[str], where: str) -> dict[str, str]:
    """Find the transformer's tensors among everything a file may bundle.

    Returns:
        Name without prefix -> name in the file; text encoders and VAEs that are bundled along are left out.

    Raises:
        CheckpointError: a LoRA, or a transformer whose tensors bear different prefixes.
    """
    names = list(names)
    if any(".lora_" in n or n.startswith("lora_") or ".lora." in n for n in names):
        raise CheckpointError(f"{where} is a LoRA, not a whole model; quantize the model and load the LoRA on top")
    names = [n for n in names if not n.startswith(_OTHER_MODELS)]
    for prefix in PREFIXES:
        inside = [n for n in names if n.startswith(prefix)]
        if inside:
            outside = next((n for n in names if not n.startswith(prefix)), None)
            if outside is not None and outside.rpartition(".")[2] != "scaled_fp8" and outside != "scaled_fp8":
                raise CheckpointError(f"{where}: '{outside[:120]}' lacks the prefix '{prefix}' of the other tensors")
            return {n.removeprefix(prefix): n for n in inside}
    return {n: n for n in names}


def infer_config(shapes: Mapping[str, Shape], where: str, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The diffusers config of a single file, from its tensors' names and shapes.

    Args:
        shapes: name (without prefix; Black Forest Labs' or diffusers') -> shape.
        where: the file, for messages.
        config: a config that is known already; then nothing is inferred.

    Raises:
        CheckpointError: not a FLUX.1 transformer, or heads that are not 128 wide and no `config` to say how their
            rotary axes are split (no tensor shows it).
    """
    if config is not None:
        return {**FLUX1_DEV, "guidance_embeds": False, **config, "_class_name": FLUX1}
    ours = "x_embedder.weight" in shapes
    double, single = ("transformer_blocks", "single_transformer_blocks") if ours else ("double_blocks", "single_blocks")
    keys = (
        (
            "x_embedder.weight",
            "context_embedder.weight",
            "time_text_embed.text_embedder.linear_1.weight",
            f"{double}.0.attn.norm_q.weight",
            "proj_out.weight",
            f"{double}.0.norm1.linear.weight",
        )
        if ours
        else (
            "img_in.weight",
            "txt_in.weight",
            "vector_in.in_layer.weight",
            f"{double}.0.img_attn.norm.query_norm.scale",
            "final_layer.linear.weight",
            f"{double}.0.img_mod.lin.weight",
        )
    )
    missing = [k for k in keys if k not in shapes]
    if any("double_stream_modulation_img" in name for name in shapes):
        raise CheckpointError(f"{where} is a FLUX.2 transformer in one file; give its diffusers folder or hub id")
    if missing:
        raise CheckpointError(
            f"{where} is not a FLUX.1 transformer: it has no '{missing[0]}' "
            f"(its first tensor is '{next(iter(shapes), 'none')[:80]}')"
        )
    if any(len(shapes[k]) != (1 if "norm_q" in k or "query_norm" in k else 2) for k in keys):
        raise CheckpointError(f"{where} is not a FLUX.1 transformer: an embedder has the wrong number of dimensions")
    hidden, in_channels = shapes[keys[0]]
    head, out_channels = shapes[keys[3]][0], shapes[keys[4]][0]
    if head != 128:
        raise CheckpointError(
            f"{where}: heads are {head} wide, not FLUX.1's 128, and no tensor shows how their rotary axes are split; "
            "put the model's config.json beside it as a diffusers folder"
        )
    if hidden % head:
        raise CheckpointError(f"{where}: hidden size {hidden} is no multiple of the head size {head}")
    return {
        "_class_name": FLUX1,
        "attention_head_dim": head,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": any(n.startswith(("guidance_in.", "time_text_embed.guidance_embedder.")) for n in shapes),
        "in_channels": in_channels,
        "joint_attention_dim": shapes[keys[1]][1],
        "num_attention_heads": hidden // head,
        "num_layers": _blocks(shapes, double),
        "num_single_layers": _blocks(shapes, single),
        "out_channels": None if out_channels == in_channels else out_channels,
        "patch_size": 1,
        "pooled_projection_dim": shapes[keys[2]][1],
    }


def _blocks(shapes: Iterable[str], kind: str) -> int:
    numbers = {n.split(".")[1] for n in shapes if n.startswith(f"{kind}.")}
    return 1 + max((int(n) for n in numbers if n.isascii() and n.isdigit() and len(n) < 5), default=-1)
