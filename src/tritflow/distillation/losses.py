"""What a velocity's error weighs: its square; more where detail is, or where layout is decided, if asked for.

The square of a picture's error is nearly all at low frequencies, and so is what a student learns first. Weighing its
spectrum costs a Fourier transform of the error and nothing at inference. And a velocity's error is carried on by all
steps that follow, so that the earliest ones decide what is drawn where. All weights have mean 1, so that rates keep
their meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from tritflow.config import DistillationConfig

Measure = Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]
"""`measure(predicted, target, kwargs)`: a scalar from two velocities [B, T, C] and the batch's keyword arguments."""

PATCH = 2
# Power of the timestep by which early steps weigh more: what falls to a tenth within the first quarter.
EARLY = 8


def plain(predicted: Tensor, target: Tensor, kwargs: Mapping[str, Tensor]) -> Tensor:
    """Mean square error."""
    return mse_loss(predicted.float(), target)


def measure_of(config: DistillationConfig, grid: tuple[int, int]) -> Measure:
    """The loss that a config asks for, of packed latents.

    Args:
        config: `detail_weight` and `early_weight`.
        grid: rows and columns of tokens; T is their product.
    """
    if not config.detail_weight and not config.early_weight:
        return plain

    def measure(predicted: Tensor, target: Tensor, kwargs: Mapping[str, Tensor]) -> Tensor:
        error = predicted.float() - target
        squares = spectrum(error, grid, config.detail_weight) if config.detail_weight else error.square().mean((1, 2))
        if config.early_weight:
            squares = squares * early(kwargs["timestep"].float(), config.early_weight)
        return squares.mean()

    return measure


def spectrum(error: Tensor, grid: tuple[int, int], weight: float) -> Tensor:
    """Weighed mean square [B] of packed latents [B, T, C] over the frequencies of the unpacked picture.

    A frequency f (along both axes of the latent) weighs 1 + weight |f| / max |f|, over their mean. With weight 0 it
    is the plain mean square (Parseval).
    """
    rows, columns = grid
    x = error.view(len(error), rows, columns, -1, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(len(error), -1, PATCH * rows, PATCH * columns)
    powers = torch.view_as_real(torch.fft.fft2(x, norm="ortho")).square().sum(-1)
    return (powers * frequency_weights(x.shape[-2], x.shape[-1], weight, x.device)).mean((1, 2, 3))


def frequency_weights(height: int, width: int, weight: float, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [H, W] in the order of `fft2`, mean 1."""
    down, across = torch.fft.fftfreq(height, device=device), torch.fft.fftfreq(width, device=device)
    radius = (down[:, None].square() + across.square()).sqrt()
    weights = 1 + weight * radius / radius.max().clamp_min(1e-9)
    return weights / weights.mean()


def early(timestep: Tensor, weight: float) -> Tensor:
    """[B]: 1 + weight t^8, over its mean for uniform t; t is 1 at noise, 0 at the picture."""
    return (1 + weight * timestep**EARLY) / (1 + weight / (EARLY + 1))
