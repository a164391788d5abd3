"""transformers' Mask2Former on COCO as a detector: the architecture and data of GenEval's, other weights.

The suite runs mmdet's Mask2Former Swin-S (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco); what that detector does
around its network (scale, choice of instances, scores, boxes) is done here the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.scorers.loading import IMAGENET_MEAN, IMAGENET_STD, normalise, resize, to_tensor
from tritflow.evaluation.scorers.weights import identity, load_model

DEFAULT = "facebook/mask2former-swin-small-coco-instance"
STANDS_FOR = "mmdet mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"

# COCO's 80 classes in the order of their ids, under the names that GenEval's prompts use (object_names.txt).
_NAMES = """
    person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,
    bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,
    skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,
    cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,
    potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,computer keyboard,cell phone,microwave,
    oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush
"""
CLASSES = tuple(name.strip() for name in _NAMES.split(","))

SHORT_SIDE, LONG_SIDE, MULTIPLE = 800, 1333, 32
MAX_INSTANCES = 100


class Mask2FormerDetector:
    """Instances of COCO's classes with masks.

    Args:
        source: folder or hub id of a `Mask2FormerForUniversalSegmentation` with 80 classes in COCO's order.
        device: where it runs.

    Raises `EvaluationError` when it cannot be loaded or has other classes.
    """

    classes: tuple[str, ...] | None = CLASSES

    def __init__(self, source: str = DEFAULT, device: str = "cpu") -> None:
        from transformers import Mask2FormerForUniversalSegmentation

        self.model = load_model(Mask2FormerForUniversalSegmentation, source, "detector", device)
        labels = self.model.config.num_labels
        if labels != len(CLASSES):
            raise EvaluationError(f"the detector '{source}' knows {labels} classes, COCO has {len(CLASSES)}")
        self.device = device
        self.name = f"transformers Mask2Former {identity(source)}"

    @torch.inference_mode()
    def detect(
        self, pictures: Sequence[NDArray[np.uint8]], wanted: Sequence[Sequence[str]], minimum: float
    ) -> list[list[Detection]]:
        height, width = pictures[0].shape[:2]
        scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
        h, w = int(height * scale + 0.5), int(width * scale + 0.5)
        pixels = normalise(resize(to_tensor(pictures, self.device), h, w), IMAGENET_MEAN, IMAGENET_STD)
        padded = pad(pixels, (0, -w % MULTIPLE, 0, -h % MULTIPLE))
        seen = torch.zeros(len(pictures), *padded.shape[-2:], dtype=torch.long, device=self.device)
        seen[:, :h, :w] = 1
        out = self.model(pixel_values=padded, pixel_mask=seen)
        found = []
        for logits, masks in zip(out.class_queries_logits, out.masks_queries_logits, strict=True):
            found.append(
                instances(logits, masks, tuple(padded.shape[-2:]), (h, w), (height, width), minimum)  # type: ignore[arg-type]
            )
        return found


def instances(
    logits: Tensor,
    masks: Tensor,
    padded: tuple[int, int],
    shown: tuple[int, int],
    size: tuple[int, int],
    minimum: float,
) -> list[Detection]:
    """What one picture's queries find.

    The `MAX_INSTANCES` best (query, class) pairs are instances; a score is the class's probability times the mask's
    mean probability inside itself, a box runs from the mask's first to one past its last pixel.

    Args:
        logits: [Q, classes + 1], the last one "nothing".
        masks: [Q, h, w] logits at the network's resolution.
        padded: height and width that the network saw, of which `shown` is the picture.
        size: height and width of the picture itself, in which boxes and masks are given.
        minimum: pairs that cannot score more are left out before masks are scaled up.
    """
    probabilities = logits.softmax(-1)[:, :-1]
    classes = probabilities.shape[1]
    best, index = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    likely = best > minimum  # the mask's share only lowers it
    best, index = best[likely], index[likely]
    if not len(best):
        return []
    chosen = masks[index // classes][None]
    chosen = interpolate(chosen, padded, mode="bilinear", align_corners=False)[..., : shown[0], : shown[1]]
    chosen = interpolate(chosen, size, mode="bilinear", align_corners=False)[0]
    inside = chosen > 0
    area = inside.flatten(1).sum(1)
    scores = best * ((chosen.sigmoid() * inside).flatten(1).sum(1) / (area + 1e-6))
    found = []
    for i in torch.argsort(scores, descending=True, stable=True).tolist():
        if scores[i] <= minimum or not area[i]:
            continue
        rows, columns = inside[i].any(1).nonzero()[:, 0], inside[i].any(0).nonzero()[:, 0]
        box = (float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1)
        label = CLASSES[int(index[i]) % classes]
        found.append(Detection(label, float(scores[i]), box, inside[i].cpu().numpy()))
    return found
