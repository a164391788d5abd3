"""The registered operations `tritflow::*`: one schema each, with fakes and gradients; a backend computes them.

They are defined through `torch.library.Library` instead of `custom_op`, which costs three times less per call; on
the small FLUX a linear takes 20 microseconds, so that is felt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritflow.formats.packing import packed_width
from tritflow.kernels import reference
from tritflow.kernels.backends import select

_LIB = torch.library.Library("tritflow", "DEF")
_LINEAR = "Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias=None, Tensor? input_scale=None"
_LIB.define(
    "quantize_activation(Tensor x, Tensor? input_scale=None, str dtype='int8') -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(f"w2a16_linear({_LINEAR}, str backend='auto') -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define(
    f"w2a8_linear({_LINEAR}, str activation_dtype='int8', str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)

# A packed parameter shows its logical shape; these two read the bytes' own.
_size = torch.Tensor.size


def _bytes(weight: Tensor) -> Tensor:
    """A plain tensor for GPU kernels; on the CPU the parameter itself, which owns its expanded form (cpu.py)."""
    return weight if weight.device.type == "cpu" else weight.detach()


def _check_activation_dtype(name: str) -> None:
    if name not in reference.QMAX:
        raise ValueError(f"activation dtype '{name}' is not one of {', '.join(reference.QMAX)}")


def _check(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, input_scale: Tensor | None) -> None:
    rows, width = _size(weight)
    features = x.shape[-1] if x.dim() else 0
    if features < 1 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor [..., in_features], not {x.dtype} {list(x.shape)}")
    if weight.dtype != torch.uint8 or width != packed_width(features):
        raise ValueError(
            f"a weight for {features} input features is uint8 [N, {packed_width(features)}] packed two bits a trit, "
            f"not {weight.dtype} [{rows}, {width}]"
        )
    for name, vector, length in (
        ("weight_scale", weight_scale, rows),
        ("bias", bias, rows),
        ("input_scale", input_scale, features),
    ):
        if vector is not None and (vector.dim() != 1 or vector.shape[0] != length):
            raise ValueError(f"{name} must have shape [{length}], not {list(vector.shape)}")


def _quantize_activation(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    _check_activation_dtype(dtype)
    args = (x, input_scale, dtype)
    result: tuple[Tensor, Tensor] = select("quantize_activation", "auto", x.device, args)(*args)
    return result


def _w2a16_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    _check(x, weight, weight_scale, bias, input_scale)
    args = (x, _bytes(weight), weight_scale, bias, input_scale)
    out: Tensor = select("w2a16_linear", backend, x.device, args)(*args)
    return out


def _w2a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
    backend: str = "auto",
) -> Tensor:
    _check(x, weight, weight_scale, bias, input_scale)
    _check_activation_dtype(activation_dtype)
    args = (x, _bytes(weight), weight_scale, bias, input_scale, activation_dtype)
    out: Tensor = select("w2a8_linear", backend, x.device, args)(*args)
    return out


def _quantize_activation_fake(
    x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8"
) -> tuple[Tensor, Tensor]:
    _check_activation_dtype(dtype)
    tokens = x.numel() // x.shape[-1]
    q = x.new_empty((tokens, x.shape[-1]), dtype=reference.QTYPE[dtype])
    return q, x.new_empty((tokens,), dtype=torch.float32)


def _linear_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    *names: str,
) -> Tensor:
    _check(x, weight, weight_scale, bias, input_scale)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    # Arguments that equal their default at the end may be left out.
    x, weight, weight_scale, bias, input_scale = (*inputs, None, None)[:5]
    ctx.save_for_backward(weight, weight_scale, input_scale)
    ctx.features, ctx.count, ctx.has_bias = x.shape[-1], len(inputs), bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of activations and bias; trits and scales are frozen. 8-bit rounding passes straight through."""
    weight, weight_scale, input_scale = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * ctx.count
    if ctx.needs_input_grad[0]:
        dtype = grad.dtype if grad.dtype == torch.float64 else torch.promote_types(grad.dtype, torch.bfloat16)
        dense = reference.dequantize(weight.detach(), ctx.features, weight_scale, input_scale, dtype)
        grads[0] = (grad.to(dtype) @ dense).to(grad.dtype)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grads[3] = grad.reshape(-1, grad.shape[-1]).sum(0)
    return tuple(grads)


for _name, _run, _fake in (
    ("quantize_activation", _quantize_activation, _quantize_activation_fake),
    ("w2a16_linear", _w2a16_linear, _linear_fake),
    ("w2a8_linear", _w2a8_linear, _linear_fake),
):
    _LIB.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritflow::{_name}", _fake, lib=_LIB)
    if _name != "quantize_activation":
        torch.library.register_autograd(f"tritflow::{_name}", _backward, setup_context=_save, lib=_LIB)

_W2A16: Any = torch.ops.tritflow.w2a16_linear.default
_W2A8: Any = torch.ops.tritflow.w2a8_linear.default
_QUANTIZE: Any = torch.ops.tritflow.quantize_activation.default


def _dispatched(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a call has to pass PyTorch's dispatcher: to be traced, transformed, or differentiated.

    If not, the same Python function is called directly; on the small FLUX the detour would cost a fifth of a layer.
    """
    return (
        torch.compiler.is_compiling()
        or (torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
        or x.device.type == "meta"
    )


def quantize_activation(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """Per-token symmetric 8-bit quantization, `x * input_scale ~= q * scale[:, None]`; not differentiable.

    Args:
        x: [..., K], fp32, bf16, fp16 or fp64; leading dimensions are flattened to M (0 is allowed).
        input_scale: [K] or None.
        dtype: `int8` (largest magnitude 127) or `float8_e4m3fn` (448).

    Returns:
        q [M, K] in `dtype`, scale float32 [M].

    Raises:
        ValueError: an unknown dtype.
    """
    result: tuple[Tensor, Tensor] = _QUANTIZE(x, input_scale, dtype)
    return result


def w2a16_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """`y = x @ W^T + bias`, W[n, k] = weight_scale[n] * T[n, k] * input_scale[k]; float32 sums, any strides of `x`.

    Differentiable with respect to `x` and `bias`.

    Args:
        x: [..., K], fp32, bf16 or fp16; the leading sizes may hold a 0.
        weight: uint8 [N, 32 * ceil(K / 128)], `formats.packing.pack_2bit`.
        weight_scale: [N], any float type.
        bias: [N] or None.
        input_scale: [K] or None.
        backend: `auto`, `reference`, `cpu`, `triton` or `hopper`.

    Returns:
        [..., N] in x.dtype.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: the named backend does not exist, cannot run here, or does not take these arguments.
    """
    run = _W2A16 if _dispatched(x, bias) else _w2a16_linear
    out: Tensor = run(x, weight, weight_scale, bias, input_scale, backend)
    return out


def w2a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
    backend: str = "auto",
) -> Tensor:
    """`w2a16_linear` on activations that are quantized to 8 bits per token first (`quantize_activation`).

    With int8 the sums over K are exact integers. The gradient passes straight through the rounding.

    Args:
        activation_dtype: `int8` or `float8_e4m3fn`; the other arguments are those of `w2a16_linear`.

    Returns:
        [..., N] in x.dtype.

    Raises:
        ValueError: shapes that do not fit together, or an unknown activation dtype.
        BackendError: the named backend does not exist, cannot run here, or does not take these arguments.
    """
    run = _W2A8 if _dispatched(x, bias) else _w2a8_linear
    out: Tensor = run(x, weight, weight_scale, bias, input_scale, activation_dtype, backend)
    return out
