"""The linear layer that runs: packed trits, scales, and one registered operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from tritflow.config import ActivationDtype, Backend, Mode, TernaryConfig
from tritflow.formats.packing import check_2bit, pack_2bit, packed_width, repack, unpack_2bit
from tritflow.kernels import w2a8_linear, w2a16_linear
from tritflow.modules.packed_weight import PackedWeight


class TernaryLinear(nn.Linear):
    """`y = x @ W^T + bias` with W[n, k] = weight_scale[n] * T[n, k] * input_scale[k], T in {-1, 0, 1}.

    It is an `nn.Linear` to whoever asks (LoRA injects into those), but its `weight` is a `PackedWeight`: two bits
    a trit, shown with the logical shape [out_features, in_features]. Weights and scales are frozen; gradients
    flow to activations. `mode`, `activation_dtype` and `backend` may be set at any time; nothing stored changes.

    State dict: `weight` uint8 [N, 32 * ceil(K / 128)] (five-trits-a-byte weights are accepted and expanded),
    `weight_scale` bf16 [N], `input_scale` bf16 [K] only with `column_scale`, `bias` [N]. Scales are data of the
    format: they stay bf16 through `.to(dtype)`; the bias follows it.

    Memory: packed bytes, plus on the CPU the expanded form that `tritflow.kernels.cpu` describes, owned by `weight`
    and dropped when the module moves; `keep_expanded=False` trades it for time. `expanded_bytes` tells its size.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        column_scale: whether there is an `input_scale`.
        mode: `w2a16` or `w2a8`.
        activation_dtype: of `w2a8`: `int8` or `float8_e4m3fn`.
        backend: which kernels; see `tritflow.kernels`.
        keep_expanded: whether CPU kernels may keep an expanded copy of the weight.
        device: of all tensors.
        dtype: of the bias.

    Raises:
        ConfigError: `mode`, `activation_dtype` or `backend` is not a known one.
    """

    weight: PackedWeight
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        column_scale: bool = False,
        mode: Mode = "w2a16",
        activation_dtype: ActivationDtype = "int8",
        backend: Backend = "auto",
        keep_expanded: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        TernaryConfig(mode=mode, activation_dtype=activation_dtype, backend=backend)  # refuses unknown names
        self.in_features, self.out_features = in_features, out_features
        self.mode, self.activation_dtype, self.backend = mode, activation_dtype, backend
        self.keep_expanded = keep_expanded
        data = torch.zeros((out_features, packed_width(in_features)), dtype=torch.uint8, device=device)
        self.weight = PackedWeight(data, False, in_features, keep_expanded)
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.bfloat16, device=device))
        columns = torch.ones(in_features, dtype=torch.bfloat16, device=device) if column_scale else None
        self.register_buffer("input_scale", columns)
        offset = torch.zeros(out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if offset is None else nn.Parameter(offset, requires_grad=False))

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        trits: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        **kwargs: Any,
    ) -> Self:
        """A ternary layer in the place of `linear`, whose bias is copied.

        Args:
            linear: gives the bias.
            trits: int8 [N, K].
            weight_scale: [N]; rounded to bf16.
            input_scale: [K] or None; rounded to bf16.
            **kwargs: `mode`, `activation_dtype`, `backend`, `keep_expanded`.

        Raises:
            ValueError: shapes that do not fit, or trits outside -1..1.
        """
        rows, columns = trits.shape
        if weight_scale.shape != (rows,) or (input_scale is not None and input_scale.shape != (columns,)):
            raise ValueError(
                f"trits [{rows}, {columns}] need a weight_scale [{rows}] and an input_scale [{columns}] or None, "
                f"not {list(weight_scale.shape)} and {None if input_scale is None else list(input_scale.shape)}"
            )
        self = cls(columns, rows, bias=False, column_scale=input_scale is not None, device="meta", **kwargs)
        self.set_packed_(pack_2bit(trits))
        self.weight_scale = weight_scale.detach().to(torch.bfloat16, copy=True)
        if input_scale is not None:
            self.input_scale = input_scale.detach().to(torch.bfloat16, copy=True)
        if linear.bias is not None:
            self.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
        return self

    @property
    def column_scale(self) -> bool:
        """Whether there is an `input_scale`."""
        return self.input_scale is not None

    @property
    def packed(self) -> Tensor:
        """The bytes, uint8 [N, 32 * ceil(K / 128)], as a plain tensor that shares their memory."""
        return self.weight.detach()

    @property
    def expanded_bytes(self) -> int:
        """Bytes that CPU kernels keep beside the packed ones at the moment."""
        return self.weight.expansion.bytes if self.weight.expansion is not None else 0

    def set_packed_(self, packed: Tensor) -> None:
        """Take `packed` (two bits a trit, uint8 [N, 32 * ceil(K / 128)]) as the weight, without a copy.

        Raises:
            ValueError: wrong dtype or shape.
        """
        if packed.dim() != 2 or packed.shape[0] != self.out_features:
            raise ValueError(f"packed must have {self.out_features} rows, not shape {list(packed.shape)}")
        self.weight = PackedWeight(packed, False, self.in_features, self.keep_expanded)

    def trits(self) -> Tensor:
        """int8 [N, K]."""
        return unpack_2bit(self.packed, self.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The dense weight [N, K]; exact in bf16 and fp32 without `input_scale`."""
        dense = self.trits() * self.weight_scale.float()[:, None]
        if self.input_scale is not None:
            dense = dense * self.input_scale.float()
        return dense.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] in x.dtype."""
        # Straight from the dictionaries: five attribute look-ups of nn.Module take 3 microseconds.
        parameters: dict[str, Any] = self._parameters
        buffers: dict[str, Any] = self._buffers
        args = x, parameters["weight"], buffers["weight_scale"], parameters["bias"], buffers["input_scale"]
        if self.mode == "w2a8":
            return w2a8_linear(*args, self.activation_dtype, self.backend)
        return w2a16_linear(*args, self.backend)

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        if name == "weight" and value.in_features != self.in_features:
            # accelerate's hooks rebuild the parameter from its bytes, which do not tell where padding begins.
            value.in_features = self.in_features
        return value

    def reset_parameters(self) -> None:
        """Nothing is random here; there because `nn.Linear` has it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The weight goes through `fn` as plain bytes: some functions, and meta tensors, would trust its logical shape.
        weight = self._parameters.pop("weight")
        assert isinstance(weight, PackedWeight)
        before = {name: b for name, b in self._buffers.items() if b is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        data = fn(weight.detach())
        if torch._has_compatible_shallow_copy_type(weight, data):
            weight.data = data  # the same object, as nn.Module does it
            if weight.expansion is not None:
                weight.expansion.drop()
        else:
            weight = PackedWeight(data, False, self.in_features, self.keep_expanded)
        self._parameters = {"weight": weight, **self._parameters}
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # nn.Module would compare the bytes' shape with the logical one.
        key = prefix + "weight"
        mine = {k: v for k, v in state_dict.items() if k.startswith(prefix) and k != key}
        weight = self._parameters.pop("weight")
        try:
            super()._load_from_state_dict(
                mine, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        finally:
            self._parameters = {"weight": weight, **self._parameters}
        if key not in state_dict:
            if strict:
                missing_keys.append(key)
            return
        try:
            self._load_weight(state_dict[key], assign=bool(local_metadata.get("assign_to_params_buffers", False)))
        except ValueError as error:
            error_msgs.append(f"{key}: {error}")

    def _load_weight(self, raw: Tensor, assign: bool) -> None:
        raw = raw.detach()
        if raw.dtype == torch.uint8 and raw.shape == (
            self.out_features,
            packed_width(self.in_features, "base3"),
        ):
            raw = repack(raw, self.in_features, "base3", "2bit")
        elif raw.device.type == "cpu":
            check_2bit(raw, self.in_features)  # elsewhere this would synchronise a GPU
        if assign or self.weight.is_meta:
            self.set_packed_(raw)
            return
        if raw.shape != self.packed.shape or raw.dtype != torch.uint8:
            raise ValueError(f"expected uint8 {list(self.packed.shape)}, found {raw.dtype} {list(raw.shape)}")
        self.packed.copy_(raw)

    def extra_repr(self) -> str:
        columns = ", column_scale" if self.column_scale else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
            f"{columns}, mode={self.mode}, backend={self.backend}"
        )
