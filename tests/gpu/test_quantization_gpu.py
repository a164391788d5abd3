"""Every stage of quantizing block by block, on blocks whose attention is large enough for any of PyTorch's kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritflow.formats.architecture import FLUX1_DEV
from tritflow.profiling.quantization import measure

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = {**FLUX1_DEV, "num_attention_heads": 4, "joint_attention_dim": 256, "pooled_projection_dim": 64}


def test_no_backward_pass_uses_cudnn_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    backward, seen = torch.Tensor.backward, []

    def watched(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())
        backward(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    run = measure(CONFIG, device="cuda", pixels=512, text_tokens=128, samples=4, batch_size=2, steps=2)
    assert len(seen) > 2
    assert not any(seen)
    assert torch.backends.cuda.cudnn_sdp_enabled()  # as it was
    assert all(found["train_sample"] >= 0 for found in run["seconds"].values())
    assert set(run["peak_bytes"]) == {"pass", "round", "compensate", "importance", "reconstruct"}
