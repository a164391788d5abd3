"""Relative depth of a picture with DPT (MiDaS): greater is nearer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from tritflow.evaluation.scorers.loading import normalise, resize, to_tensor
from tritflow.evaluation.scorers.weights import identity, load_model

DEFAULT = "Intel/dpt-hybrid-midas"
STANDS_FOR = "dpt_hybrid-midas-501f0c75"
SIDE = 480


class DptDepth:
    """`source`: folder or hub id of a `DPTForDepthEstimation`."""

    def __init__(self, source: str = DEFAULT, device: str = "cpu") -> None:
        from transformers import DPTForDepthEstimation

        self.model = load_model(DPTForDepthEstimation, source, "depth", device)
        # transformers' hybrid takes its own size only; the suite feeds it `SIDE`.
        self.side = self.model.config.image_size if self.model.config.is_hybrid else SIDE
        self.device = device
        self.name = f"transformers DPT {identity(source)} at {self.side} pixels"

    @torch.inference_mode()
    def depth(self, pictures: Sequence[NDArray[np.uint8]], height: int, width: int) -> list[NDArray[np.float32]]:
        """float32 [height, width] in 0..1 of each picture, stretched to its own range, in 256 levels."""
        pixels = resize(to_tensor(pictures, self.device), self.side, self.side)
        predicted = self.model(pixel_values=normalise(pixels, (0.5,) * 3, (0.5,) * 3)).predicted_depth
        size = pictures[0].shape[:2]
        found = []
        for one in predicted.float():
            low, high = one.min(), one.max()
            flat = (one - low) / (high - low) if high > low else torch.zeros_like(one)
            # The suite keeps the map as an 8-bit picture of the image's size and scales that.
            large = interpolate(flat[None, None], size, mode="bilinear", align_corners=True)[0, 0]
            levels = Image.fromarray((large * 255).cpu().numpy().astype(np.uint8))
            scaled = levels.resize((width, height), Image.Resampling.BILINEAR)
            found.append(np.asarray(scaled, dtype=np.float32) / np.float32(255))
        return found
