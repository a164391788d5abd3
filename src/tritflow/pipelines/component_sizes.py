"""What the components of a pipeline weigh, from their configs alone: models are built on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tritflow.config import TernaryConfig
from tritflow.formats.checkpoint import parse_quantization_config
from tritflow.modules import TernaryLinear, swap_linears_
from tritflow.pipelines.defaults import ModelError, hub_file, read_json_file
from tritflow.pipelines.loading import ModelSource

Kind = Literal["text", "transformer", "vae"]


@dataclass(frozen=True)
class Size:
    """Bytes and widths of one component.

    Attributes:
        name: in the pipeline, such as `text_encoder_2`.
        kind: what it does.
        total: bytes of all its tensors.
        leaf: of the largest single layer.
        block: of the largest block.
        outside: of all that lies in no block.
        width: elements alive at the peak of a forward pass: a token, or for a VAE a pixel of the picture.
        heads: attention heads whose scores a text encoder holds in full; 0 elsewhere.
        matrix: elements of the largest weight, which a kernel may expand.
    """

    name: str
    kind: Kind
    total: int
    leaf: int
    block: int
    outside: int
    width: int
    heads: int = 0
    matrix: int = 0


def measure(name: str, kind: Kind, module: nn.Module) -> Size:
    """The size of a module, on any device and also on meta. Tensors that are shared count once."""
    blocks = [block for blocks in _module_lists(module) for block in blocks.children()]  # some lists hold a None
    inside = sum(map(_bytes, blocks))
    linears = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear)}
    total = _bytes(module)
    width, heads = _working_width(kind, module, linears)
    return Size(
        name=name,
        kind=kind,
        total=total,
        leaf=max((_bytes(m, recurse=False) for m in module.modules()), default=0),
        block=max(map(_bytes, blocks), default=0),
        outside=total - inside,
        width=width,
        heads=heads,
        matrix=max((m.in_features * m.out_features for m in linears.values()), default=0),
    )


def _working_width(kind: Kind, module: nn.Module, linears: Mapping[str, nn.Linear]) -> tuple[int, int]:
    """(elements alive a token or pixel, heads whose scores are held).

    A transformer block holds about 12 states of the residual's width beside its widest layer's input and output: for
    FLUX.1-dev that is 20 times 3072, where 18.7 were measured (24.33 GB at the peak, 23.80 GB of them weights, 4608
    tokens). The last stage of a VAE's decoder keeps four maps of its second width at the full resolution; the fifth
    is for the convolution's workspace.
    """
    config: Any = getattr(module, "config", None)
    if kind == "vae":
        channels = list(getattr(config, "decoder_block_out_channels", None) or config.block_out_channels)
        return 5 * channels[min(1, len(channels) - 1)], 0
    if kind == "transformer":
        hidden = config.num_attention_heads * config.attention_head_dim
        # Modulation is as wide, but sees one row a picture.
        widest = max(
            (m.out_features for n, m in linears.items() if "norm" not in n and "modulation" not in n), default=0
        )
        return 12 * hidden + 2 * widest, 0
    config = getattr(config, "text_config", config)
    hidden = getattr(config, "d_model", None) or config.hidden_size
    layers = getattr(config, "num_layers", None) or config.num_hidden_layers
    heads = getattr(config, "num_heads", None) or config.num_attention_heads
    # Encoders may be asked for the states of all layers.
    return (12 + layers) * hidden + 4 * max((m.out_features for m in linears.values()), default=0), heads


def _bytes(module: nn.Module, recurse: bool = True) -> int:
    tensors: Iterable[Tensor] = [*module.parameters(recurse), *module.buffers(recurse)]
    return sum({id(t): t.nbytes for t in tensors}.values())


def _module_lists(module: nn.Module) -> list[nn.ModuleList]:
    """The outermost lists of blocks."""
    if isinstance(module, nn.ModuleList):
        return [module]
    return [found for child in module.children() for found in _module_lists(child)]


def sizes_of(pipe: Any) -> list[Size]:
    """The components of a loaded pipeline, in the order in which they run."""
    modules = {name: m for name, m in pipe.components.items() if isinstance(m, nn.Module)}
    return _in_order(measure(name, _kind(name), m) for name, m in modules.items() if _kind(name))


def read_sizes(source: ModelSource, dtype: torch.dtype) -> list[Size]:
    """The components of a model on disk or on the hub, in the order in which they run; no weight is read.

    Args:
        source: from `resolve_model`.
        dtype: of everything that is not ternary.

    Raises:
        ModelError: a config is missing, or names a class that diffusers and transformers do not have.
    """
    index = _config(source.pipeline, "model_index.json")
    sizes = []
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or not _kind(name) or None in entry:
            continue
        if name == "transformer" and source.transformer is not None:
            config = _config(source.transformer, "config.json")
        else:
            config = _config(source.pipeline, f"{name}/config.json")
        module = meta_model(entry[0], config.get("_class_name") or entry[1], config, dtype)
        sizes.append(measure(name, _kind(name) or "text", module))
    return _in_order(sizes)


def meta_model(library: str, class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model without weights, on the meta device; ternary where its config says so.

    Args:
        library: `diffusers` or `transformers`.
        class_name: of the model.
        config: its config.json.
        dtype: of everything that is not ternary.

    Raises:
        ModelError: the library has no such class.
    """
    import diffusers
    import transformers

    cls: Any = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), class_name, None)
    if cls is None:
        raise ModelError(f"'{library}.{class_name}' is not a class that tritflow can plan for")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    with torch.device("meta"):
        if library == "diffusers":
            model = cls.from_config(plain)
        else:
            model = cls(cls.config_class.from_dict(plain))
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "tritflow":
        _swap(model, parse_quantization_config(dict(quantization))[0])
    return nn.Module.to(model, dtype)


def _swap(model: nn.Module, config: TernaryConfig) -> None:
    def ternary(_: str, linear: nn.Linear) -> TernaryLinear:
        return TernaryLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            column_scale=config.column_scale,
            device="meta",
        )

    swap_linears_(model, lambda name, _: config.matches(name), ternary)


def _kind(name: str) -> Any:
    """Of a component by its name; None for what is no model of the sampler's."""
    if name.startswith("text_encoder"):
        return "text"
    return {"transformer": "transformer", "vae": "vae"}.get(name)


def _in_order(sizes: Iterable[Size]) -> list[Size]:
    return sorted(sizes, key=lambda size: (("text", "transformer", "vae").index(size.kind), size.name))


def _config(place: str | Path, name: str) -> dict[str, Any]:
    path: Path | None = Path(place) / name
    if not Path(place).is_dir():
        path = hub_file(str(place), name)
    if path is None or not path.is_file():
        raise ModelError(f"{place} has no {name}, so its memory cannot be planned; leave --max-memory out")
    return read_json_file(path)
