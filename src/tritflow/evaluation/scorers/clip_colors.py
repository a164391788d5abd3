"""Which of GenEval's ten colours an object has: CLIP ViT-L/14, zero-shot, on the object cut out of its picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.scorers.loading import CLIP_MEAN, CLIP_STD, normalise
from tritflow.evaluation.scorers.weights import identity, load_model, load_tokenizer
from tritflow.evaluation.tasks.geneval_rules import COLORS

DEFAULT = "openai/clip-vit-large-patch14"
STANDS_FOR = "open_clip ViT-L-14 openai"
BACKGROUND = (153, 153, 153)
"""What hides everything outside an object's mask: #999."""
# The suite's three templates; the mean of their embeddings is a colour's classifier for that class.
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


def cut_out(picture: NDArray[np.uint8], d: Detection) -> Image.Image:
    """The object on a grey ground, cropped to its box. A box thinner than a pixel is widened to one."""
    shown = picture
    if d.mask is not None:
        shown = np.where(d.mask[..., None], picture, np.array(BACKGROUND, np.uint8))
    x0, y0, x1, y1 = (round(v) for v in d.box)
    return Image.fromarray(shown).crop((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))


class ClipColors:
    """Zero-shot colours. `source`: folder or hub id of a `CLIPModel` with its tokenizer."""

    def __init__(self, source: str = DEFAULT, device: str = "cpu") -> None:
        from transformers import CLIPModel

        self.model = load_model(CLIPModel, source, "colors", device)
        self.tokenizer = load_tokenizer(source, "colors")
        self.side = self.model.config.vision_config.image_size
        self.device = device
        self.name = f"transformers CLIP {identity(source)}"
        self._classifiers: dict[str, Tensor] = {}

    def _classifier(self, name: str) -> Tensor:
        """[10, D]: one unit vector a colour for objects of class `name`."""
        if name not in self._classifiers:
            texts = [t.format(color=c, name=name) for c in COLORS for t in _TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            out = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            features = _unit(_features(out)).view(len(COLORS), len(_TEMPLATES), -1)
            self._classifiers[name] = _unit(features.mean(1))
        return self._classifiers[name]

    @torch.inference_mode()
    def classify(self, objects: Sequence[tuple[NDArray[np.uint8], Detection]], batch_size: int = 64) -> list[str]:
        """The colour of each (picture, detection in it)."""
        found: list[str] = []
        for start in range(0, len(objects), batch_size):
            part = objects[start : start + batch_size]
            crops = np.stack([self._pixels(cut_out(picture, d)) for picture, d in part])
            pixels = torch.from_numpy(crops).to(self.device).permute(0, 3, 1, 2).float()
            out = self.model.get_image_features(pixel_values=normalise(pixels, CLIP_MEAN, CLIP_STD))
            classifiers = torch.stack([self._classifier(d.label) for _, d in part])
            scores = torch.einsum("nd,ncd->nc", _unit(_features(out)), classifiers)
            found += [COLORS[i] for i in scores.argmax(1).tolist()]
        return found

    def _pixels(self, crop: Image.Image) -> NDArray[np.uint8]:
        """CLIP's own preparation: the shorter side to the model's, bicubic, then the middle."""
        w, h = crop.size
        scale = self.side / min(w, h)
        size = (self.side if w <= h else int(w * scale), self.side if h <= w else int(h * scale))
        resized = crop.resize(size, Image.Resampling.BICUBIC)
        left, top = round((size[0] - self.side) / 2), round((size[1] - self.side) / 2)
        return np.asarray(resized.crop((left, top, left + self.side, top + self.side)))


def _features(out: object) -> Tensor:
    # transformers 5 wraps what earlier versions return bare.
    found = out if isinstance(out, Tensor) else out.pooler_output  # type: ignore[attr-defined]
    return found


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
