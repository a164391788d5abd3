"""OWLv2, a detector that looks for whatever it is asked: a substitute for T2I-CompBench's UniDet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.scorers.loading import CLIP_MEAN, CLIP_STD, normalise, resize, to_tensor
from tritflow.evaluation.scorers.weights import identity, load_model, load_tokenizer
from tritflow.evaluation.tasks.compbench_rules import box_iou

DEFAULT = "google/owlv2-base-patch16-ensemble"
STANDS_FOR = "UniDet Unified_learned_OCIM_RS200 and R50 at confidence .5"
CONFIDENCE = 0.2
"""OWLv2's scores are lower than a closed detector's; published uses of it cut between .1 and .3."""
MAX_OVERLAP = 0.5
"""Of two boxes of one label that share more than this (IoU), the better one stays."""


class Owlv2Detector:
    """`source`: folder or hub id of an `Owlv2ForObjectDetection` with its CLIP tokenizer."""

    classes: tuple[str, ...] | None = None

    def __init__(self, source: str = DEFAULT, device: str = "cpu") -> None:
        from transformers import Owlv2ForObjectDetection

        self.model = load_model(Owlv2ForObjectDetection, source, "detector", device)
        self.tokenizer = load_tokenizer(source, "detector")
        self.side = self.model.config.vision_config.image_size
        self.device = device
        self.name = f"transformers OWLv2 {identity(source)}, confidence {CONFIDENCE}, suppression {MAX_OVERLAP}"

    @torch.inference_mode()
    def detect(
        self, pictures: Sequence[NDArray[np.uint8]], wanted: Sequence[Sequence[str]], minimum: float
    ) -> list[list[Detection]]:
        height, width = pictures[0].shape[:2]
        square = max(height, width)
        pixels = to_tensor(pictures, self.device)
        # Grey below and to the right makes it square, so that coordinates are shares of the longer side.
        pixels = pad(pixels, (0, square - width, 0, square - height), value=127.5)
        pixels = normalise(resize(pixels, self.side, self.side), CLIP_MEAN, CLIP_STD)
        names = [list(dict.fromkeys(mine)) for mine in wanted]
        most = max((len(n) for n in names), default=0)
        if not most:
            return [[] for _ in pictures]
        ids, mask = self._queries(names, most)
        out = self.model(input_ids=ids, attention_mask=mask, pixel_values=pixels)
        found: list[list[Detection]] = []
        for i, mine in enumerate(names):
            if not mine:
                found.append([])
                continue
            scores, query = out.logits[i, :, : len(mine)].sigmoid().max(-1)
            likely = scores > minimum
            boxes = out.pred_boxes[i][likely] * square
            found.append(self._suppress(scores[likely], query[likely], boxes, mine, height, width))
        return found

    def _queries(self, names: list[list[str]], most: int) -> tuple[Tensor, Tensor]:
        """Token ids and mask [pictures * most, T]; rows of zeros fill up, which the model leaves out."""
        texts = [f"a photo of a {n}" for mine in names for n in mine]
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids = torch.zeros(len(names), most, length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        at = 0
        for i, mine in enumerate(names):
            ids[i, : len(mine)] = tokens.input_ids[at : at + len(mine)]
            mask[i, : len(mine)] = tokens.attention_mask[at : at + len(mine)]
            at += len(mine)
        return ids.flatten(0, 1).to(self.device), mask.flatten(0, 1).to(self.device)

    @staticmethod
    def _suppress(
        scores: Tensor, query: Tensor, boxes: Tensor, names: list[str], height: int, width: int
    ) -> list[Detection]:
        kept: list[Detection] = []
        for i in torch.argsort(scores, descending=True, stable=True).tolist():
            x, y, w, h = boxes[i].tolist()
            box = (
                max(0.0, x - w / 2),
                max(0.0, y - h / 2),
                min(float(width), x + w / 2),
                min(float(height), y + h / 2),
            )
            if box[2] <= box[0] or box[3] <= box[1]:
                continue
            label = names[int(query[i])]
            if all(o.label != label or box_iou(box, o.box) <= MAX_OVERLAP for o in kept):
                kept.append(Detection(label, float(scores[i]), box))
        return kept
