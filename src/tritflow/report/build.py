"""A whole report folder: tables, figures, a picture grid and a gallery, from the results and pictures at hand."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tritflow.evaluation.api import TASKS, get_task
from tritflow.evaluation.images import ImageSet, read_verdicts
from tritflow.report import figures
from tritflow.report.gallery import verdicts, write_gallery
from tritflow.report.sources import ReportError, Run, Sources
from tritflow.report.tables import Spec, build, current_runs, foremost_each, load_specs, lookup, markdown
from tritflow.results import slug, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Sequence[Run]], "Figure"]

GRID_ROWS = 6
# Topics whose runs make one figure, and its title.
_MEASURED: dict[str, tuple[Draw, str]] = {
    "scaling": (figures.scaling, "What is kept against size and steps"),
    "exposure": (figures.exposure, "Error on the teacher's states and on the student's own"),
    "sensitivity": (figures.sensitivity, "Error of each linear alone"),
}


def write_report(sources: Sources, out: str | Path) -> list[Path]:
    """Write `out/report.md` with every table that has results, figures, and for pictures `grid.png` and a gallery
    for each pair of teacher and student; returns what was written.

    Which set is the teacher's follows from the runs (`against`); without one, the first set is.
    Raises `ReportError` when there is nothing to report.
    """
    out = Path(out)
    written: list[Path] = []
    parts = ["# Report"]
    for spec, body in tables_with_results(sources):
        parts += [f"## {spec.title or spec.name}", body]
    drawn: list[tuple[str, Draw, Sequence[Run], str]] = []
    for topic, runs in sources.runs.items():
        newest, compared = (foremost_each(current_runs(runs, of), ["label"]) for of in (True, "others"))
        drawn += [
            (f"{slug(topic)}-scores", figures.tag_scores, newest, f"{topic}: scores"),
            (f"{slug(topic)}-bands", figures.band_detail, newest, f"{topic}: bands"),
            (f"{slug(topic)}-rivals", figures.rivals, compared, f"{topic}: rivals"),
        ]
    drawn += [(topic, draw, sources.runs.get(topic, ()), title) for topic, (draw, title) in _MEASURED.items()]
    for name, draw, these, title in drawn:
        try:
            figure = draw(these)
        except ReportError:
            continue
        path = out / f"{name}.svg"
        write_atomically(path, figures.encode(figure))
        written.append(path)
        parts.append(f"![{title}]({path.name})")
    if sources.runs.get("training"):
        path = write_curve(sources, out / "training-curve.svg")
        written.append(path)
        parts.append(f"![Score while the small FLUX was trained]({path.name})")
    groups = [sets for sets in _comparable(sources) if len(sets) > 1]
    for sets in groups:
        suite = str(sets[0].meta["suite"]["name"])
        path = out / ("grid.png" if len(groups) == 1 else f"grid-{slug(suite)}.png")
        write_atomically(path, grid_png(sets))
        written.append(path)
        parts += [f"## Pictures of {suite}", f"![The same prompts from the same noise]({path.name})"]
        for student in sets[1:]:
            page = _gallery(out, sets[0], student, len(groups) == 1)
            written.append(page)
            parts.append(f"[{_name(student)} over {_name(sets[0])}]({page.relative_to(out).as_posix()})")
    if len(parts) == 1:
        raise ReportError("there is nothing to report: no results of a known topic, and fewer than two picture sets")
    page = out / "report.md"
    write_atomically(page, ("\n\n".join(parts) + "\n").encode())
    return [page, *written]


def write_curve(sources: Sources, path: Path) -> Path:
    """Draw the score while the small FLUX was trained, as SVG or PNG by the name's ending. Raises `ReportError` for
    another ending or when no training run was given."""
    kind = path.suffix.removeprefix(".").lower()
    if kind not in ("svg", "png"):
        raise ReportError(f"{path}: the curve can be drawn as .svg or .png")
    legs = figures.training_legs(sources.runs.get("training", ()))
    if not legs:
        raise ReportError(
            "no results of the topic 'training' were given; `python -m tritflow.training.watch` makes them"
        )
    write_atomically(path, figures.encode(figures.training_curve(legs), kind))
    return path


def tables_with_results(sources: Sources) -> list[tuple[Spec, str]]:
    """Every declared table that has rows, as markdown."""
    found = []
    for spec in load_specs().values():
        table = build(spec, sources.runs.get(spec.topic, ()))
        if table.cells:
            found.append((spec, markdown(table)))
    return found


def grid_png(sets: Sequence[ImageSet], rows: int = GRID_ROWS) -> bytes:
    """One picture: a column a model, a row a prompt (spread over the tags), each with its prompt."""
    from PIL import Image

    from tritflow.pipelines.compare import draw_grid

    first = [e for e in sets[0].entries if e["sample"] == 0]
    chosen = [first[i * len(first) // min(rows, len(first))] for i in range(min(rows, len(first)))]
    keys = [(e["prompt_id"], 0) for e in chosen]
    columns = []
    for images in sets:
        by_key = {(e["prompt_id"], e["sample"]): e for e in images.entries}
        missing = next((k for k in keys if k not in by_key), None)
        if missing is not None:
            raise ReportError(f"{images.folder}: has no picture of '{missing[0]}'; draw all sets with the same prompts")
        columns.append([Image.fromarray(images.pixels_of(images.folder, by_key[k])) for k in keys])
    picture = draw_grid([_name(s) for s in sets], [f"{e['prompt']} (seed {e['seed']})" for e in chosen], columns)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _comparable(sources: Sources) -> list[list[ImageSet]]:
    """The picture sets in groups of the same prompts and noise, the teacher's first in each."""
    runs: list[Run] = [r for found in sources.runs.values() for r in found]
    # A timing is "against" something as well, but drew no pictures.
    teachers = {lookup(r, "against.pictures.folder") for r in runs if isinstance(r.get("against"), dict)}
    groups: dict[str, list[ImageSet]] = {}
    for images in sorted(sources.image_sets(), key=lambda s: s.folder.name not in teachers):
        alike = [images.meta[k] for k in ("suite", "prompts_hash", "samples", "base_seed")]
        groups.setdefault(repr(alike), []).append(images)
    return list(groups.values())


def _gallery(out: Path, teacher: ImageSet, student: ImageSet, plain: bool) -> Path:
    judged = []
    for images in (teacher, student):
        path = images.folder.with_name(f"{images.folder.name}.scores.jsonl")
        judged.append(verdicts(read_verdicts(path)) if path.exists() else None)
    suite = student.meta["suite"]["name"]
    return write_gallery(
        out / "gallery" / slug(f"{'' if plain else suite} {student.folder.name}"),
        teacher,
        student,
        teacher_verdicts=judged[0],
        student_verdicts=judged[1],
        mask=get_task(suite).object_mask() if suite in TASKS else None,
        title=f"{_name(student)} over {_name(teacher)}",
    )


def _name(images: ImageSet) -> str:
    """The model, and the backend where one was named: kernels on and off are drawn by the same model."""
    backend = images.meta["settings"].get("extra", {}).get("backend")
    return f"{images.model.name} ({backend})" if backend else images.model.name
