"""A page that lays a student's pictures over its teacher's: static, offline, nothing loaded from anywhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tritflow.evaluation.api import Judgement
from tritflow.evaluation.images import ImageSet
from tritflow.evaluation.tasks import fidelity
from tritflow.results import slug, write_atomically

Mask = Callable[[Any], Any]
Verdicts = Mapping[tuple[str, int], Judgement]

# Beyond this a page gets slow; the pictures that differ most are kept.
LIMIT = 400


@dataclass(frozen=True)
class Card:
    """One pair of pictures as the page shows it; `psnr` over object pixels where there are any."""

    tag: str
    prompt: str
    seed: int
    teacher: str
    student: str
    psnr: float
    teacher_passed: bool | None
    student_passed: bool | None
    reason: str

    @property
    def changed(self) -> str:
        """`lost`, `gained`, `same`, or nothing when there are no verdicts."""
        if self.teacher_passed is None or self.student_passed is None:
            return ""
        if self.teacher_passed == self.student_passed:
            return "same"
        return "lost" if self.teacher_passed else "gained"


def verdicts(judgements: Sequence[Judgement]) -> dict[tuple[str, int], Judgement]:
    """Judgements by (prompt id, sample)."""
    return {(j.prompt_id, j.sample): j for j in judgements}


def write_gallery(
    folder: str | Path,
    teacher: ImageSet,
    student: ImageSet,
    *,
    teacher_verdicts: Verdicts | None = None,
    student_verdicts: Verdicts | None = None,
    mask: Mask | None = None,
    title: str = "Teacher and student from the same noise",
    limit: int = LIMIT,
) -> Path:
    """Write `folder/index.html` and copies of its pictures; returns the page's path.

    The pictures that differ most (PSNR over object pixels, or the whole picture) come first and are kept when
    there are more than `limit`. Raises `ImageSetError` when the sets were not drawn from the same noise.
    """
    folder = Path(folder)
    cards = []
    for mine, theirs in student.pairs(teacher):
        a = student.pixels_of(student.folder, mine)
        b = teacher.pixels_of(teacher.folder, theirs)
        psnr = fidelity.psnr(a, b, mask(b)) if mask is not None else None
        key = mine["prompt_id"], mine["sample"]
        ours, other = (student_verdicts or {}).get(key), (teacher_verdicts or {}).get(key)
        name = f"{slug(mine['prompt_id'])}-{mine['sample']:04d}.png"
        card = Card(
            tag=mine["tag"],
            prompt=mine["prompt"],
            seed=mine["seed"],
            teacher=f"images/teacher/{name}",
            student=f"images/student/{name}",
            psnr=round(psnr if psnr is not None else fidelity.psnr(a, b) or 0.0, 2),
            teacher_passed=other.passed if other else None,
            student_passed=ours.passed if ours else None,
            reason=ours.reason if ours else "",
        )
        cards.append((card, student.folder / mine["path"], teacher.folder / theirs["path"]))
    cards.sort(key=lambda c: c[0].psnr)
    total, cards = len(cards), cards[:limit]
    shutil.rmtree(folder / "images", ignore_errors=True)
    for card, mine_path, theirs_path in cards:
        for source, target in ((mine_path, card.student), (theirs_path, card.teacher)):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / target)
    page = folder / "index.html"
    write_atomically(page, _render(title, teacher, student, [c[0] for c in cards], total, mask).encode())
    return page


def _render(
    title: str, teacher: ImageSet, student: ImageSet, cards: Sequence[Card], total: int, mask: Mask | None
) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = files("tritflow.report").joinpath("templates", "gallery.html").read_text(encoding="utf-8")
    settings = student.meta["settings"]
    return environment.from_string(source).render(
        title=title,
        teacher=teacher.model,
        student=student.model,
        suite=student.meta["suite"]["name"],
        settings=settings,
        device=student.meta["device"],
        versions=student.meta["versions"],
        cards=cards,
        total=total,
        tags=list(dict.fromkeys(r.tag for r in student.records)),
        where="object pixels" if mask is not None else "the whole picture",
        judged=any(c.changed for c in cards),
    )
