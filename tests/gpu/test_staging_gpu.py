"""Tensors read to a GPU through pinned buffers are those of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tritflow.formats.safetensors_file import SafetensorsFile

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_tensors_longer_than_both_buffers_arrive_whole(tmp_path: Path) -> None:
    tensors = {
        "long": torch.randint(0, 256, (150 << 20,), dtype=torch.uint8),  # of 32 MiB five parts, the last one short
        "rows": torch.randn(7, 33).bfloat16(),
        "none": torch.zeros(0, 4),
    }
    save_file(tensors, tmp_path / "file.safetensors")
    file = SafetensorsFile(tmp_path / "file.safetensors")
    for _ in range(3):  # one right behind the other: buffers are filled again while copies are under way
        found = {name: file.tensor(name, device="cuda") for name in tensors}
        for name, tensor in tensors.items():
            assert found[name].is_cuda
            assert torch.equal(found[name].cpu(), tensor), name
    assert torch.equal(file.tensor("rows", slice(2, 5), "cuda").cpu(), tensors["rows"][2:5])
