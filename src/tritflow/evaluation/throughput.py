"""How fast scorers look at pictures: the real architectures at their real sizes with random weights.

Random weights change no time of a dense network, and nothing has to be fetched. What a scorer does around its network
is timed with it: decoding PNGs, scaling, masks, crops.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tritflow.config import nearest
from tritflow.evaluation.api import EvaluationError, PromptRecord
from tritflow.evaluation.drawing import encode_png
from tritflow.evaluation.images import ImageSet
from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.scorers.loading import WORKERS, Pixels, batches
from tritflow.pipelines.loading import quiet
from tritflow.results import provenance

INSTANCES = 20
"""Objects that the detector turns into masks of full size on each picture."""


def _clip_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from tritflow.assets import teacher_path

    return AutoTokenizer.from_pretrained(teacher_path() / "tokenizer")


def _bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "red", "cat", "?"]
    return BertTokenizer(vocab={p: i for i, p in enumerate(pieces)})


def _mask2former() -> tuple[Any, Any]:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    small: dict[str, Any] = {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    small["out_features"] = ["stage1", "stage2", "stage3", "stage4"]
    swin = SwinConfig(**small)
    config: Any = Mask2FormerConfig(backbone_config=swin)
    config.num_labels = 80
    return Mask2FormerForUniversalSegmentation(config), None


def _clip() -> tuple[Any, Any]:
    from transformers import CLIPConfig, CLIPModel

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = CLIPConfig(
        text_config={**text, "projection_dim": 768},
        vision_config={**vision, "patch_size": 14, "image_size": 224, "projection_dim": 768},
        projection_dim=768,
    )
    return CLIPModel(config), _clip_tokenizer()


def _blip() -> tuple[Any, Any]:
    from transformers import BlipConfig, BlipForQuestionAnswering

    return BlipForQuestionAnswering(BlipConfig(text_config={"num_attention_heads": 12})), _bert_tokenizer()


def _owlv2() -> tuple[Any, Any]:
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    config = Owlv2Config(vision_config={"image_size": 960, "patch_size": 16}, projection_dim=512)
    return Owlv2ForObjectDetection(config), _clip_tokenizer()


def _dpt() -> tuple[Any, Any]:
    from transformers import DPTConfig, DPTForDepthEstimation

    hybrid: dict[str, Any] = {
        "is_hybrid": True,
        "backbone_out_indices": [2, 5, 8, 11],
        "neck_hidden_sizes": [256, 512, 768, 768],
        "neck_ignore_stages": [0, 1],
        "reassemble_factors": [1, 1, 1, 0.5],
        "readout_type": "project",
    }
    return DPTForDepthEstimation(DPTConfig(**hybrid)), None


def _judge_tokenizer() -> Any:
    """A word a token, so that questions are about as long as with the judge's own tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<image>", "1", "2", "3", "4", "5"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _llava() -> tuple[Any, Any]:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    config = LlavaConfig(
        vision_config={
            **vision,
            "model_type": "clip_vision_model",
            "patch_size": 14,
            "image_size": 336,
            "projection_dim": 768,
        },
        text_config={"model_type": "llama", "vocab_size": 32064, "max_position_embeddings": 4096},
        image_token_index=3,
    )
    return LlavaForConditionalGeneration(config), _judge_tokenizer()


MAKE: dict[str, Callable[[], tuple[Any, Any]]] = {
    "mask2former": _mask2former,
    "clip colors": _clip,
    "blip-vqa": _blip,
    "owlv2": _owlv2,
    "dpt": _dpt,
    "llava judge": _llava,
}
"""Model and tokenizer of each scorer, at the size of its default weights."""

SIXTEEN_BITS = ("llava judge",)
"""Made in 16 bits on the device itself: 7 billion weights."""

Look = Callable[[Sequence[Pixels]], Any]


def _looker(name: str, source: str, device: str) -> tuple[Look, Any]:
    """What a scorer does to a batch of pictures in a suite, and the scorer."""
    from tritflow.evaluation.scorers import blip_vqa, clip_colors, dpt_depth, llava_judge, mask2former, owlv2

    if name == "mask2former":
        detector = mask2former.Mask2FormerDetector(source, device)

        def detect(pictures: Sequence[Pixels]) -> Any:
            # Random weights are sure of nothing, so the bound is put where `INSTANCES` come through.
            return detector.detect(pictures, [()] * len(pictures), detect_from[0])

        detect_from = [0.0]
        probe = detector.detect([np.zeros((256, 256, 3), np.uint8)], [()], 0.0)[0]
        if len(probe) > INSTANCES:
            detect_from[0] = probe[INSTANCES].score
        return detect, detector
    if name == "clip colors":
        colors = clip_colors.ClipColors(source, device)

        def classify(pictures: Sequence[Pixels]) -> Any:
            h, w = pictures[0].shape[:2]
            mask = np.ones((h, w), bool)
            boxes = ((0, 0, w // 2, h // 2), (w // 4, h // 4, w, h))
            return colors.classify([(p, Detection("cup", 0.9, b, mask)) for p in pictures for b in boxes])

        return classify, colors
    if name == "blip-vqa":
        vqa = blip_vqa.BlipVqa(source, device)
        return lambda pictures: vqa.ask(pictures, [["a red cat", "a red cat"]] * len(pictures)), vqa
    if name == "owlv2":
        open_detector = owlv2.Owlv2Detector(source, device)
        return lambda pictures: open_detector.detect(pictures, [["cat", "dog"]] * len(pictures), 0.9999), open_detector
    if name == "llava judge":
        judge = llava_judge.LlavaJudge(source, device)
        return lambda pictures: judge.grade(pictures, ["a red cat beside a dog"] * len(pictures), "complex"), judge
    depth = dpt_depth.DptDepth(source, device)
    return lambda pictures: depth.depth(pictures, 479, 479), depth


def measure(
    names: Sequence[str] = (),
    *,
    device: str = "cpu",
    pictures: int = 256,
    size: int = 1024,
    batch_size: int = 8,
    make: dict[str, Callable[[], tuple[Any, Any]]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Pictures a second of each scorer and of reading alone: a run of the topic "scorers" for each, as it is measured.

    Args:
        names: which of `MAKE`; all by default.
        pictures: how many 1-picture prompts, each `size` pixels square; one batch more warms up.
        make: model and tokenizer by name, instead of `MAKE`.

    Raises `EvaluationError` for an unknown name.
    """
    make = make or MAKE
    for name in names:
        if name not in make:
            raise EvaluationError(f"there is no scorer '{name}'{nearest(name, list(make))} (known: {', '.join(make)})")
    with tempfile.TemporaryDirectory(prefix="tritflow-scorers-") as place:
        images = _pictures(Path(place), pictures, size)
        started = time.perf_counter()
        for _ in batches(images, images.entries, batch_size):
            pass
        reading = pictures / (time.perf_counter() - started)
        for name in names or list(make):
            source = Path(place) / name.replace(" ", "-")
            look, parameters, dtype = _prepared(name, make[name], source, device)
            rates = _rates(look, images, batch_size, device)
            del look
            if device.startswith("cuda"):
                torch.cuda.empty_cache()
            shutil.rmtree(source)
            yield {
                "label": name,
                "parameters": parameters,
                "dtype": dtype,
                "batch_size": batch_size,
                "pictures": pictures,
                "size": size,
                "reading_workers": WORKERS,
                "per_second": {**rates, "reading_alone": round(reading, 2)},
                **provenance(device),
            }


def _prepared(name: str, make: Callable[[], tuple[Any, Any]], source: Path, device: str) -> tuple[Look, int, str]:
    """A scorer whose seeded weights went through files as real ones do; its number of weights and their type."""
    model, tokenizer = _made(make, device if name in SIXTEEN_BITS else "cpu")
    with quiet():
        model.save_pretrained(source)
    if tokenizer is not None:
        tokenizer.save_pretrained(source)
    parameters = sum(p.numel() for p in model.parameters())
    del model
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    look, scorer = _looker(name, str(source), device)
    return look, parameters, str(next(scorer.model.parameters()).dtype).removeprefix("torch.")


def _made(make: Callable[[], tuple[Any, Any]], device: str) -> tuple[Any, Any]:
    """Model and tokenizer with seeded weights; in 16 bits when made on a GPU."""
    before = torch.get_default_dtype()
    try:
        if device.startswith("cuda"):
            torch.set_default_dtype(torch.float16)
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            return make()
    finally:
        torch.set_default_dtype(before)


def _rates(look: Look, images: ImageSet, batch_size: int, device: str) -> dict[str, float]:
    """Pictures a second with PNGs read meanwhile, and of a batch that is in memory already."""
    warm = next(iter(batches(images, images.entries[:batch_size], batch_size)))[1]
    look(warm)

    def everything() -> None:
        for _, shown in batches(images, images.entries, batch_size):
            look(shown)

    alone = _seconds(lambda: look(warm), device) / len(warm)
    return {
        "overlapped": round(len(images.entries) / _seconds(everything, device), 2),
        "without_reading": round(1 / alone, 2),
    }


def _seconds(what: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    what()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def detailed_pictures(number: int, size: int) -> list[Image.Image]:
    """Different pictures with detail at all scales, since PNGs cost what they hold."""
    rng = np.random.default_rng(0)
    different = []
    for _ in range(number):
        total = np.zeros((size, size, 3))
        for k in (8, 32, 128, size):
            coarse = Image.fromarray(rng.integers(0, 256, (min(k, size),) * 2 + (3,), dtype=np.uint8))
            total += np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float64) / k**0.5
        total = (total - total.min()) / (total.max() - total.min()) * 255
        different.append(Image.fromarray(total.astype(np.uint8)))
    return different


def _pictures(folder: Path, number: int, size: int) -> ImageSet:
    """A folder of pictures; eight different ones."""
    different = [encode_png(picture) for picture in detailed_pictures(8, size)]
    entries = []
    for i in range(number):
        data = different[i % 8]
        (folder / f"{i}.png").write_bytes(data)
        entries.append(
            {
                "path": f"{i}.png",
                "prompt_id": str(i),
                "sample": 0,
                "seed": i,
                "height": size,
                "width": size,
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
    return ImageSet(folder, {}, [PromptRecord(str(i), "", "") for i in range(number)], entries)


def line(run: dict[str, Any]) -> str:
    """A run in one line of text."""
    rate = run["per_second"]
    return (
        f"{run['label']:12} {rate['overlapped']:8.1f} pictures a second while PNGs are read, "
        f"{rate['without_reading']:.1f} without reading; reading alone {rate['reading_alone']:.1f}"
    )
