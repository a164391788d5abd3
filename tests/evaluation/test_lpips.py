"""LPIPS written out: against the same network put together from torch's modules, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.lpips import Lpips

PLACES, CHANNELS, KERNELS = (0, 3, 6, 8, 10), (3, 64, 192, 384, 256, 256), (11, 5, 3, 3, 3)


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the reference implementation's names."""
    g = torch.Generator().manual_seed(seed)
    found = {"scaling_layer.shift": torch.zeros(1)}
    for k, place in enumerate(PLACES):
        a, b, n = CHANNELS[k], CHANNELS[k + 1], KERNELS[k]
        found[f"net.slice{k + 1}.{place}.weight"] = torch.randn(b, a, n, n, generator=g) * (2 / (a * n * n)) ** 0.5
        found[f"net.slice{k + 1}.{place}.bias"] = torch.randn(b, generator=g) * 0.1
        found[f"lin{k}.model.1.weight"] = torch.rand(1, b, 1, 1, generator=g)
    return found


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lpips") / "lpips-alex.safetensors"
    save_file(weights(), path)
    return path


def pictures(n: int, seed: int = 0) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 256, (n, 70, 90, 3), dtype=np.uint8))


def reference(w: dict[str, torch.Tensor], a: np.ndarray, b: np.ndarray) -> float:
    nn = torch.nn
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ).eval()
    layers.load_state_dict(
        {
            f"{place}.{kind}": w[f"net.slice{k + 1}.{place}.{kind}"]
            for k, place in enumerate(PLACES)
            for kind in ("weight", "bias")
        }
    )
    total = 0.0
    shown = []
    for p in (a, b):
        x = torch.from_numpy(p).permute(2, 0, 1)[None].double() / 255 * 2 - 1
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            1, 3, 1, 1
        )
        shown.append(x)
    layers.double()
    for i, layer in enumerate(layers):
        shown = [layer(x) for x in shown]
        if isinstance(layer, nn.ReLU):
            k = PLACES.index(i - 1)
            unit = [x / x.norm(dim=1, keepdim=True).clamp_min(1e-10) for x in shown]
            squares = (unit[0] - unit[1]) ** 2
            total += float((squares * w[f"lin{k}.model.1.weight"].double()).sum(1).mean())
    return total


def test_equals_the_network_from_modules(file: Path) -> None:
    lpips = Lpips(file)
    a, b = pictures(3), pictures(3, 1)
    with torch.no_grad():
        expected = [reference(weights(), x, y) for x, y in zip(a, b, strict=True)]
    assert lpips.distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert lpips.distance(b, a) == pytest.approx(expected, rel=1e-4)
    assert lpips.distance(a, a) == [0, 0, 0]
    assert lpips.name == "LPIPS AlexNet, lpips-alex.safetensors"


def test_closer_pictures_are_closer(file: Path) -> None:
    lpips = Lpips(file)
    a, noise = pictures(1)[0], pictures(1, 2)[0]
    mixed = [(a * (1 - t) + noise * t).astype(np.uint8) for t in (0.1, 0.4, 0.9)]
    found = lpips.distance([a] * 3, mixed)
    assert found == sorted(found)
    assert found[0] > 0


def test_torchvisions_names_and_a_folder_do_as_well(file: Path, tmp_path: Path) -> None:
    renamed = {}
    for name, tensor in weights().items():
        parts = name.split(".")
        renamed[f"features.{parts[2]}.{parts[3]}" if parts[0] == "net" else name.replace("lin", "lins.", 1)] = tensor
    save_file(renamed, tmp_path / "x.safetensors")
    a, b = pictures(1), pictures(1, 1)
    assert Lpips(tmp_path).distance(a, b) == Lpips(file).distance(a, b)


def test_what_is_no_lpips(file: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="there is no such file"):
        Lpips(tmp_path / "nowhere.safetensors")
    with pytest.raises(EvaluationError, match="holds 0 safetensors files"):
        Lpips(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(EvaluationError, match=r"has no weight 'net.slice1.0.weight'"):
        Lpips(tmp_path / "a.safetensors")
    wrong = {**weights(), "lin0.model.1.weight": torch.zeros(1, 3, 1, 1)}
    save_file(wrong, tmp_path / "b.safetensors")
    with pytest.raises(EvaluationError, match=r"'lin0.model.1.weight' is \(1, 3, 1, 1\)"):
        Lpips(tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").write_bytes(b"pickle")
    with pytest.raises(EvaluationError, match="is not a safetensors file"):
        Lpips(tmp_path / "c.safetensors")
    small = [np.zeros((32, 32, 3), np.uint8)]
    with pytest.raises(EvaluationError, match="at least 64x64"):
        Lpips(file).distance(small, small)
