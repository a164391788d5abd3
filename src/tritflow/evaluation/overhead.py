"""What a suite's run costs beside the model: seeds, batches, files, hashes and manifest around a stand-in pipeline.

The stand-in hands out pictures that were made beforehand, so that all that is left is what a real run pays on top of
its model. Drawing and PNG encoding are timed inside the run and taken off: both belong to any run of the suite.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from tritflow.evaluation.api import Progress, Task, TaskOptions, get_task
from tritflow.evaluation.drawing import draw_images, encode_png
from tritflow.evaluation.images import ImageSet, ModelId, Settings
from tritflow.evaluation.throughput import detailed_pictures
from tritflow.results import provenance

PICTURES = 8
"""Different pictures that the stand-in hands out in turn."""


class _Meter:
    """Calls a function and adds up its seconds of processor time (of the calling thread) and of wall time."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.processor = self.wall = 0.0

    def __call__(self, *arguments: Any) -> Any:
        wall, processor = time.perf_counter(), time.thread_time()
        try:
            return self._function(*arguments)
        finally:
            self.processor += time.thread_time() - processor
            self.wall += time.perf_counter() - wall


def measure(
    suite: str = "geneval",
    *,
    prompts: Path | None = None,
    size: int = 1024,
    samples: int | None = None,
    batch_size: int = 16,
    workdir: Path | None = None,
    task: Task | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw a whole suite with a stand-in pipeline, as a run of the topic "suites".

    Args:
        suite: its name in `TASKS`.
        prompts: folder of the suite's prompt files.
        size: of the pictures, in pixels.
        samples: pictures a prompt; the suite's own number by default.
        workdir: where the pictures lie meanwhile; a temporary folder by default. Removed in the end.
        task: instead of `suite`, for tests.

    Returns plain JSON: how many pictures were accounted for, and seconds a picture for drawing, encoding and all the
    rest; processor time of all threads, and wall time of the two threads that share the work.
    """
    task = task or get_task(suite, TaskOptions(prompts=prompts))
    records = task.prompts(task.splits[0])
    samples = samples or task.default_samples
    shown = detailed_pictures(PICTURES, size)
    settings = Settings(size, size, 1, 0.0)
    place = Path(tempfile.mkdtemp(prefix="tritflow-suites-", dir=workdir))
    try:
        draw = _Meter(lambda prompts_, seeds: [shown[s % PICTURES] for s in seeds])
        encode = _Meter(encode_png)
        wall, processor = time.perf_counter(), time.process_time()
        images = draw_images(
            place / "out",
            task,
            records,
            draw,
            ModelId("stand-in", "0" * 16),
            settings,
            samples=samples,
            batch_size=batch_size,
            encode=encode,
            progress=progress,
        )
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        assert images is not None
        started = time.process_time()
        again = ImageSet.open(place / "out", task)
        opening = time.process_time() - started
        size_of = sum(int(e["bytes"]) for e in again.entries)
        accounted = _accounted(again, len(records), samples)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    number = len(images.entries)

    def each(seconds: float) -> float:
        return round(1e3 * seconds / number, 4)

    return {
        "label": f"{task.name}, {len(records)} x {samples}, {size}x{size}",
        "suite": task.name,
        "prompts": {"count": len(records), "samples": samples},
        "size": size,
        "batch_size": batch_size,
        "pictures": number,
        "accounted": accounted,
        "bytes": size_of,
        "milliseconds": {
            "beyond": each(processor - draw.processor - encode.processor),
            "encoding": each(encode.processor),
            "drawing": each(draw.processor),
            "all": each(processor),
            "opening": each(opening),
            "wall": each(wall),
            "wall_beyond": each(wall - draw.wall - encode.wall),
        },
        **provenance(),
    }


def _accounted(images: ImageSet, prompts: int, samples: int) -> dict[str, int]:
    """What an exact account has to agree in: manifest lines, files, and different paths, seeds, (prompt, sample)s."""
    entries = images.entries
    return {
        "expected": prompts * samples,
        "manifest": len(entries),
        "files": sum(1 for _ in images.folder.rglob("*.png")),
        "paths": len({e["path"] for e in entries}),
        "pairs": len({(e["prompt_id"], e["sample"]) for e in entries}),
        "seeds": len({e["seed"] for e in entries}),
    }


def table(run: dict[str, Any]) -> str:
    """The run as lines of text."""
    ms, found = run["milliseconds"], run["accounted"]
    return "\n".join(
        [
            f"{run['label']}: {found['files']} files, {found['manifest']} lines, {found['seeds']} seeds "
            f"for {found['expected']} pictures",
            f"beyond drawing and PNG encoding: {ms['beyond']:.2f} ms a picture of processor time "
            f"({ms['wall_beyond']:.2f} ms of wall time)",
            f"PNG encoding: {ms['encoding']:.2f} ms a picture",
        ]
    )
