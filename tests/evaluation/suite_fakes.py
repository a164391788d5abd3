"""Small prompt folders in the suites' own formats, drawing stand-ins and scorers without weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tritflow.calibration import prompt_sources
from tritflow.evaluation.api import TaskOptions
from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import ImageSet, ModelId, Settings
from tritflow.evaluation.scorers.detection import Detection
from tritflow.evaluation.tasks import geneval
from tritflow.evaluation.tasks.geneval import GenEvalTask
from tritflow.evaluation.tasks.t2i_compbench import CompBenchTask

SIZE = 16
SETTINGS = Settings(SIZE, SIZE, 2, 3.5)
MODEL = ModelId("fake", "aaaa")

GENEVAL_ROWS: list[dict[str, Any]] = [
    {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"},
    {
        "tag": "two_object",
        "include": [{"class": "cow", "count": 1}, {"class": "bench", "count": 1}],
        "prompt": "a photo of a cow and a bench",
    },
    {
        "tag": "counting",
        "include": [{"class": "cow", "count": 2}],
        "exclude": [{"class": "cow", "count": 3}],
        "prompt": "a photo of two cows",
    },
    {
        "tag": "colors",
        "include": [{"class": "cow", "count": 1, "color": "red"}],
        "prompt": "a photo of a red cow",
    },
    {
        "tag": "position",
        "include": [{"class": "cow", "count": 1}, {"class": "bench", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a bench left of a cow",
    },
    {
        "tag": "color_attr",
        "include": [{"class": "cow", "count": 1, "color": "red"}, {"class": "bench", "count": 1, "color": "blue"}],
        "prompt": "a photo of a red cow and a blue bench",
    },
]

COMPBENCH_LINES = {
    "color": ["a green bench and a red car", "a red bench and a green car"],
    "shape": ["a round cup and a square box"],
    "texture": ["a wooden desk and a metallic car"],
    "spatial": ["a cat on the left of a dog", "a dog near a cup"],
    "3d_spatial": ["a cat in front of a dog"],
    "numeracy": ["two cats and one dog"],
    "non_spatial": ["A man is reading a book."],
    "complex": ["The red hat was on top of the brown rack."],
}


def _pinned(name: str, data: bytes, prompts: int) -> prompt_sources.SourceFile:
    original = next(f for f in prompt_sources.FILES if f.name == name)
    return dataclasses.replace(original, sha256=hashlib.sha256(data).hexdigest(), prompts=prompts)


def small_suites(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a few prompts in each suite's format and pin them in place of the real files."""
    files = []
    for name, lines in [
        ("evaluation_metadata.jsonl", [json.dumps(r) for r in GENEVAL_ROWS]),
        *((f"{category}_val.txt", lines) for category, lines in COMPBENCH_LINES.items()),
    ]:
        data = ("\n".join(lines) + "\n").encode()
        file = _pinned(name, data, len(lines))
        file.at(folder).parent.mkdir(parents=True, exist_ok=True)
        file.at(folder).write_bytes(data)
        files.append(file)
    monkeypatch.setattr(geneval, "_PROMPTS", files[0])
    monkeypatch.setattr("tritflow.evaluation.tasks.t2i_compbench.FILES", tuple(files))
    return folder


def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    found = []
    for seed in seeds:
        pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        pixels[0, 0] = sum(seeds) % 251  # as on a GPU, the batch leaves a trace
        found.append(Image.fromarray(pixels))
    return found


def draw_suite(folder: Path, task: Any, samples: int = 2, **kwargs: Any) -> ImageSet | None:
    return draw_images(
        folder, task, task.prompts(), draw, MODEL, SETTINGS, **{"samples": samples, "batch_size": 4, **kwargs}
    )


def options(prompts: Path, **kwargs: Any) -> TaskOptions:
    return TaskOptions(prompts=prompts, batch_size=3, **kwargs)


class ScriptedDetector:
    """Finds, for every picture, what a function of its first pixel and the wanted classes says."""

    name, classes = "scripted", None

    def __init__(self, script: Any) -> None:
        self.script = script
        self.batches: list[int] = []

    def detect(self, pictures: Sequence[Any], wanted: Sequence[Sequence[str]], minimum: float) -> list[list[Detection]]:
        self.batches.append(len(pictures))
        return [
            [d for d in self.script(p, list(w)) if d.score > minimum] for p, w in zip(pictures, wanted, strict=True)
        ]


class ScriptedColors:
    """Answers with a colour by class, and remembers how much it was asked."""

    name = "scripted colors"

    def __init__(self, colors: dict[str, str]) -> None:
        self.colors, self.asked = colors, 0

    def classify(self, objects: Sequence[tuple[Any, Detection]]) -> list[str]:
        self.asked += len(objects)
        return [self.colors[d.label] for _, d in objects]


__all__ = [
    "CompBenchTask",
    "GenEvalTask",
    "ScriptedColors",
    "ScriptedDetector",
    "draw",
    "draw_suite",
    "options",
    "small_suites",
]
