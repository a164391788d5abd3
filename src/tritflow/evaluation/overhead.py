"""What a suite's run costs beside the model: seeds, batches, files, hashes and manifest around a stand-in pipeline.

The stand-in hands out pictures that were made beforehand, so that all that is left is what a real run pays on top of
its model. Drawing and PNG encoding are timed inside the run and taken off: both belong to any run of the suite.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tritflow.evaluation.api import Progress, Task, TaskOptions, get_task
from tritflow.evaluation.drawing import Encode, Sink, draw_images, write_png
from tritflow.evaluation.images import ImageSet, ModelId, Settings
from tritflow.evaluation.throughput import detailed_pictures
from tritflow.results import provenance

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURES = 8
"""Different pictures that the stand-in hands out in turn."""


class _TimedSink:
    """Hands bytes on and adds up the processor seconds of the calling thread and the wall seconds that this takes."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self.processor = self.wall = 0.0

    def write(self, data: bytes, /) -> int:
        wall, processor = time.perf_counter(), time.thread_time()
        written = self._sink.write(data)
        self.processor += time.thread_time() - processor
        self.wall += time.perf_counter() - wall
        return written


class EncodingMeter:
    """An `Encode` that tells encoding from what its sink does with the bytes.

    Attributes:
        processor, wall: seconds of encoding alone.
        sink_processor: seconds of hashing and writing, which are not encoding.
    """

    def __init__(self, encode: Encode = write_png) -> None:
        self._encode = encode
        self.processor = self.wall = self.sink_processor = 0.0

    def __call__(self, picture: Image, sink: Sink) -> None:
        timed = _TimedSink(sink)
        wall, processor = time.perf_counter(), time.thread_time()
        self._encode(picture, timed)
        self.processor += time.thread_time() - processor - timed.processor
        self.wall += time.perf_counter() - wall - timed.wall
        self.sink_processor += timed.processor


class DrawingMeter:
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
        draw = DrawingMeter(lambda prompts_, seeds: [shown[s % PICTURES] for s in seeds])
        encode = EncodingMeter()
        paces = _Paces(lambda: time.process_time() - draw.processor - encode.processor)

        def report(done: int, total: int) -> None:
            paces.note(done)
            if progress is not None:
                progress(done, total)

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
            progress=report,
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
        "bytes_each": round(size_of / number),
        "milliseconds": {
            "beyond": each(processor - draw.processor - encode.processor),
            "beyond_by_batch": paces.quantiles(),
            "sink": each(encode.sink_processor),
            "encoding": each(encode.processor),
            "drawing": each(draw.processor),
            "all": each(processor),
            "opening": each(opening),
            "wall": each(wall),
            "wall_beyond": each(wall - draw.wall - encode.wall),
        },
        **provenance(),
    }


class _Paces:
    """What each batch added to a clock, a picture: a machine that is busy with something else for a while moves the
    mean, and hardly the median. What comes before the first and after the last batch is in the mean alone."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._seen: list[tuple[int, float]] = []

    def note(self, done: int) -> None:
        if not self._seen or done > self._seen[-1][0]:
            self._seen.append((done, self._clock()))

    def quantiles(self) -> dict[str, float] | None:
        """p20, p50 and p80 in milliseconds; None with fewer than three batches."""
        found = [1e3 * (t - s) / (n - m) for (m, s), (n, t) in pairwise(self._seen)]
        if len(found) < 3:
            return None
        return {f"p{q}": round(float(np.percentile(found, q)), 4) for q in (20, 50, 80)}


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
    spread = ms["beyond_by_batch"]
    by_batch = f", by batch {spread['p20']:.2f} / {spread['p50']:.2f} / {spread['p80']:.2f}" if spread else ""
    return "\n".join(
        [
            f"{run['label']}: {found['files']} files, {found['manifest']} lines, {found['seeds']} seeds "
            f"for {found['expected']} pictures",
            f"beyond drawing and PNG encoding: {ms['beyond']:.2f} ms a picture of processor time{by_batch}",
            f"of it hashing and writing: {ms['sink']:.2f} ms; wall time beyond: {ms['wall_beyond']:.2f} ms",
            f"PNG encoding: {ms['encoding']:.2f} ms a picture",
        ]
    )
