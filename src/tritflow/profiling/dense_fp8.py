"""The strongest dense 8-bit rival of a ternary layer: e4m3 weights and activations through `torch._scaled_mm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DenseFp8Linear(nn.Module):
    """A linear layer of e4m3 weights with one scale a row, activations quantized per token as they come.

    Plain PyTorch, so that `torch.compile` fuses the quantization with what precedes it.

    Args:
        in_features: K.
        out_features: N.
        device: of all tensors.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor

    def __init__(self, in_features: int, out_features: int, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer(
            "weight", torch.empty((out_features, in_features), dtype=torch.float8_e4m3fn, device=device)
        )
        self.register_buffer("weight_scale", torch.empty((1, out_features), dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(out_features, dtype=torch.bfloat16, device=device))

    def fill_random_(self) -> None:
        """Gaussian weights of standard deviation K ** -0.5, each row using e4m3's whole range."""
        dense = torch.randn(self.out_features, self.in_features, device=self.weight.device)
        scale = dense.abs().amax(1) / 448.0
        self.weight.copy_((dense / scale[:, None]).to(torch.float8_e4m3fn))
        self.weight_scale.copy_((scale * self.in_features**-0.5)[None])
        self.bias.normal_(0, 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] bf16 to [..., N] bf16."""
        rows = x.reshape(-1, self.in_features)
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-12) / 448.0
        q = (rows.float() / scale).to(torch.float8_e4m3fn)
        out = torch._scaled_mm(
            q, self.weight.t(), scale, self.weight_scale, self.bias, out_dtype=torch.bfloat16, use_fast_accum=True
        )
        return out.view(*x.shape[:-1], self.out_features)
