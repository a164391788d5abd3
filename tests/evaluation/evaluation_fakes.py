"""Stand-ins shared by this room's tests: a suite without a detector and pipelines without weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tritflow.evaluation.api import Judgement, Progress, PromptRecord, Task
from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import ImageSet, ModelId, Settings
from tritflow.evaluation.ledger import Ledger

SIZE = 16
SETTINGS = Settings(SIZE, SIZE, 4, 3.5, {"mode": "w2a16"})
MODEL = ModelId("fake", "aaaa")


class ToyTask(Task):
    """A picture passes when its mean is above a bound: enough to run everything around a suite."""

    name = "toy"
    tags = ("light", "dark", "odd")
    overall_tags = ("light", "dark")
    scorers = {"mean": "toy"}  # noqa: RUF012

    def prompts(
        self, split: str = "test", per_tag: int | None = None, seed: int = 0, tags: Sequence[str] | None = None
    ) -> list[PromptRecord]:
        return [
            PromptRecord(f"{tag}-{i}", tag, f"a {tag} picture, number {i}", {"bound": 110 + i})
            for tag in self.check_tags(tags)
            for i in range(per_tag or 5)
        ]

    def score(
        self, images: ImageSet, progress: Progress | None = None, ledger: Ledger | None = None
    ) -> list[Judgement]:
        bounds = {r.id: r.metadata["bound"] for r in images.records}
        found = []
        for e, pixels in images.pixels():
            ok = pixels.mean() > bounds[e["prompt_id"]]
            found.append(
                Judgement(e["prompt_id"], e["tag"], e["sample"], e["seed"], float(ok), "" if ok else "too dark")
            )
        return found


def noise_picture(seed: int, size: int = SIZE, shift: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    level = rng.integers(60, 180)
    pixels = rng.integers(level - 40, level + 40, (size, size, 3)) + shift
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    # The batch leaves a trace in its pictures, as it may on a GPU: resuming must form the same batches.
    return [noise_picture(s, shift=sum(seeds) % 5) for s in seeds]


def draw_set(folder, draw=draw, model=MODEL, settings=SETTINGS, per_tag=3, **kwargs) -> ImageSet | None:  # type: ignore[no-untyped-def]
    task = ToyTask()
    options = {"samples": 2, "batch_size": 4, **kwargs}
    return draw_images(folder, task, task.prompts(per_tag=per_tag), draw, model, settings, **options)


def folder_bytes(folder) -> dict[str, bytes]:  # type: ignore[no-untyped-def]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
