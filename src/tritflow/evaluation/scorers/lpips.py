"""LPIPS (Zhang, Isola, Efros, Shechtman, Wang 2018, CVPR), the variant with AlexNet: how different two pictures look.

The network is written out here; its weights come from a safetensors file (nothing pickled is read). The reference
implementation's become one with

    safetensors.torch.save_model(lpips.LPIPS(net="alex"), "lpips-alex.safetensors")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import conv2d, max_pool2d, relu

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.loading import to_tensor

# (place in torchvision's AlexNet, shape, stride, padding, whether 3x3 pooling by 2 comes before)
_LAYERS = (
    (0, (64, 3, 11, 11), 4, 2, False),
    (3, (192, 64, 5, 5), 1, 2, True),
    (6, (384, 192, 3, 3), 1, 1, True),
    (8, (256, 384, 3, 3), 1, 1, False),
    (10, (256, 256, 3, 3), 1, 1, False),
)
# Pictures in -1..1 are brought to the network's input by these.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips:
    """Distances between pictures of one size.

    Args:
        source: a safetensors file, a folder or a hub id with one in it. Keys as the reference implementation has
            them (`net.slice1.0.weight`, `lin0.model.1.weight`) or torchvision's for the convolutions
            (`features.0.weight`).

    Raises `EvaluationError` when there is no such file or a weight is missing or of another shape.
    """

    def __init__(self, source: str | Path, device: str = "cpu") -> None:
        from safetensors.torch import load_file

        path = _file(str(source))
        try:
            weights = load_file(path)
        except Exception as error:
            raise EvaluationError(f"{path}: is not a safetensors file ({error})") from None
        self.convolutions: list[tuple[Tensor, Tensor]] = []
        self.linears: list[Tensor] = []
        for k, (place, shape, *_) in enumerate(_LAYERS):
            names = [f"net.slice{k + 1}.{place}", f"features.{place}"]
            self.convolutions.append(
                (
                    _pick(weights, [f"{n}.weight" for n in names], shape, path).to(device),
                    _pick(weights, [f"{n}.bias" for n in names], shape[:1], path).to(device),
                )
            )
            linear = [f"lin{k}.model.1.weight", f"lins.{k}.model.1.weight"]
            self.linears.append(_pick(weights, linear, (1, shape[0], 1, 1), path).to(device))
        self.device = device
        self.name = f"LPIPS AlexNet, {Path(path).name}"

    @torch.inference_mode()
    def distance(self, first: Sequence[NDArray[np.uint8]], second: Sequence[NDArray[np.uint8]]) -> list[float]:
        """One distance a pair of uint8 [H, W, 3] pictures; 0 for equal ones.

        Raises `EvaluationError` for pictures under 64 pixels a side, of which the network leaves nothing.
        """
        if min(first[0].shape[:2]) < 64:
            raise EvaluationError(f"LPIPS needs pictures of at least 64x64 pixels, not {first[0].shape[:2]}")
        a, b = self._prepared(first), self._prepared(second)
        total = torch.zeros(len(first), device=self.device)
        for (weight, bias), linear, (_, _, stride, padding, pooled) in zip(
            self.convolutions, self.linears, _LAYERS, strict=True
        ):
            a, b = (relu(conv2d(max_pool2d(x, 3, 2) if pooled else x, weight, bias, stride, padding)) for x in (a, b))
            total += conv2d((_unit(a) - _unit(b)) ** 2, linear).mean((1, 2, 3))
        return [float(v) for v in total.tolist()]

    def _prepared(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        shift, scale = (torch.tensor(v, device=self.device).view(1, 3, 1, 1) for v in (_SHIFT, _SCALE))
        return (to_tensor(pictures, self.device) / 127.5 - 1 - shift) / scale


def _unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _pick(weights: dict[str, Tensor], names: list[str], shape: tuple[int, ...], path: str) -> Tensor:
    found = next((weights[n] for n in names if n in weights), None)
    if found is None:
        raise EvaluationError(f"{path}: has no weight '{names[0]}'; it holds no LPIPS with AlexNet")
    if tuple(found.shape) != shape:
        raise EvaluationError(f"{path}: '{names[0]}' is {tuple(found.shape)}, AlexNet's is {shape}")
    return found.float()


def _file(source: str) -> str:
    path = Path(source)
    if path.is_file():
        return source
    folder = path
    if not path.is_dir():
        if path.is_absolute() or source.count("/") != 1:
            raise EvaluationError(f"{source}: there is no such file, folder or hub id with LPIPS weights")
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(source, allow_patterns=["*.safetensors"]))
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise EvaluationError(f"cannot fetch LPIPS weights '{source}': {first[:200]}; give a file") from None
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise EvaluationError(f"{source}: holds {len(files)} safetensors files; name the one with LPIPS weights")
    return str(files[0])
