"""Rivals computed by their own libraries, which are imported when they are used.

Each function quantizes linears in place as its library's documents do and returns the bytes of the tensors that the
quantized layers hold, biases left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.pipelines.rivals.registry import RivalError


def bitsandbytes_nf4(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype) -> int:
    """NF4 with nested quantization of the block maxima, computing in the model's dtype."""
    import bitsandbytes as bnb

    def make(linear: nn.Linear) -> nn.Module:
        new = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype,
            compress_statistics=True, quant_type="nf4",
        )  # fmt: skip
        new.weight = bnb.nn.Params4bit(
            linear.weight.detach().cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        new.bias = linear.bias
        return new.to(device)  # quantizes

    layers = _replace(model, names, make)

    def size(layer: Any) -> int:
        state = layer.weight.quant_state
        inner = state.state2
        # The code books are the same 16 and 256 numbers for every layer.
        tensors = [layer.weight, state.absmax] + ([inner.absmax, state.offset] if inner is not None else [])
        return sum(t.nbytes for t in tensors)

    return sum(map(size, layers))


def quanto(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype, weights: str) -> int:
    """`quantize`, then `freeze`."""
    from optimum import quanto as library

    library.quantize(model, weights=getattr(library, weights), include=names)
    layers = [model.get_submodule(name) for name in names]
    for layer in layers:
        if not isinstance(layer, library.QModuleMixin):
            raise RivalError(f"quanto left a {type(layer).__name__} dense")
        layer.freeze()
    return sum(_inner_bytes(layer.weight) for layer in layers)


def torchao_int4(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype) -> int:
    """`Int4WeightOnlyConfig` in the layout of PyTorch's own CUDA kernel."""
    from torchao.quantization import Int4WeightOnlyConfig, quantize_
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    wanted = set(names)
    config = Int4WeightOnlyConfig(group_size=128, int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D)
    quantize_(model, config, filter_fn=lambda module, name: name in wanted)
    weights = [model.get_submodule(name).weight for name in names]
    for name, weight in zip(names, weights, strict=True):
        if not hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "tensor_data_names"):
            raise RivalError(f"torchao left '{name}' dense: its {weight.shape[-1]} inputs are no multiple of 128")
    return sum(_inner_bytes(weight) for weight in weights)


def sdnq(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype, weights_dtype: str) -> int:
    """`sdnq_post_load_quant` with its own group sizes; layers of any size."""
    from sdnq.quantizer import sdnq_post_load_quant

    def make(linear: nn.Linear) -> nn.Module:
        # One by one in a wrapper: the library's lists of exceptions would leave out layers by parts of their names.
        holder = nn.Sequential(linear)
        sdnq_post_load_quant(
            holder, weights_dtype=weights_dtype, add_skip_keys=False, minimum_allowed_numel=0, torch_dtype=dtype,
            minimum_allowed_channel_size=0, quantization_device=device, return_device=device,
        )  # fmt: skip
        return holder[0]

    layers = _replace(model, names, make)
    for layer in layers:
        if layer.weight.dtype.is_floating_point:
            raise RivalError(f"SDNQ left a linear {list(layer.weight.shape)} dense")
    return sum(_state_bytes(layer) for layer in layers)


def hqq(
    model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype, nbits: int, group_size: int
) -> int:
    """`HQQLinear` with its PyTorch backend."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    def make(linear: nn.Linear) -> nn.Module:
        config = BaseQuantizeConfig(nbits=nbits, group_size=group_size, axis=1)
        return HQQLinear(linear, config, compute_dtype=dtype, device=str(device))

    layers = _replace(model, names, make)
    return sum(l.W_q.nbytes + sum(t.nbytes for t in l.meta.values() if isinstance(t, Tensor)) for l in layers)


def gguf_tq2_0(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype) -> int:
    """The format's own quantizer (blocks of 256, scale = largest magnitude), read back by its own dequantizer."""
    import gguf

    kind = gguf.GGMLQuantizationType.TQ2_0
    total = 0
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.in_features % 256:
            raise RivalError(f"TQ2_0 has blocks of 256, and '{name}' has {linear.in_features} inputs")
        data = gguf.quants.quantize(linear.weight.detach().float().cpu().numpy(), kind)
        total += data.nbytes
        linear.weight.copy_(torch.from_numpy(gguf.quants.dequantize(data, kind)))
    return total


def _replace(model: nn.Module, names: list[str], make: Callable[[nn.Linear], nn.Module]) -> list[Any]:
    layers = []
    for name in names:
        parent, _, leaf = name.rpartition(".")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        layer = make(linear)
        setattr(model.get_submodule(parent), leaf, layer)
        layers.append(layer)
    return layers


def _inner_bytes(tensor: Any) -> int:
    """Bytes of the plain tensors inside a tensor subclass."""
    names = getattr(tensor, "tensor_data_names", None)
    if names is None and hasattr(tensor, "__tensor_flatten__"):
        names = tensor.__tensor_flatten__()[0]
    if names is None:
        return int(tensor.nbytes)
    optional = [n for n in getattr(tensor, "optional_tensor_data_names", []) if getattr(tensor, n) is not None]
    return sum(_inner_bytes(getattr(tensor, n)) for n in (*names, *optional))


def _state_bytes(layer: nn.Module) -> int:
    tensors = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    return sum(t.nbytes for name, t in tensors.items() if name != "bias")
