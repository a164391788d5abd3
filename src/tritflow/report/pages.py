"""Generated blocks in markdown pages: `<!-- table:NAME -->` ... `<!-- /table -->`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tritflow.config import nearest
from tritflow.report.sources import ReportError, Run
from tritflow.report.tables import Spec, build, markdown
from tritflow.results import write_atomically

_OPEN = re.compile(r"^<!-- table:(?P<name>[\w-]+) -->[ \t]*$", re.MULTILINE)
_CLOSE = re.compile(r"^<!-- /table -->[ \t]*$", re.MULTILINE)


def render(page: str, specs: Mapping[str, Spec], runs: Mapping[str, Sequence[Run]], where: str = "page") -> str:
    """The page with every block filled anew; text outside the markers is left alone.

    Raises `ReportError`, naming `where`, for a table that is not declared, a block that is not closed, and a
    closing marker without a block.
    """
    parts, position = [], 0
    while opening := _OPEN.search(page, position):
        name = opening["name"]
        if name not in specs:
            raise ReportError(f"{where}: there is no table '{name}'{nearest(name, list(specs))}")
        closing = _CLOSE.search(page, opening.end())
        following = _OPEN.search(page, opening.end())
        if closing is None or (following is not None and following.start() < closing.start()):
            raise ReportError(f"{where}: the block of table '{name}' is not closed by '<!-- /table -->'")
        if _CLOSE.search(page, position, opening.start()):
            raise ReportError(f"{where}: a '<!-- /table -->' before table '{name}' closes nothing")
        spec = specs[name]
        body = markdown(build(spec, runs.get(spec.topic, ())))
        parts += [page[position : opening.end()], "\n", body, "\n", closing[0]]
        position = closing.end()
    if _CLOSE.search(page, position):
        raise ReportError(f"{where}: the last '<!-- /table -->' closes nothing")
    return "".join([*parts, page[position:]])


def stale_pages(pages: Sequence[Path], specs: Mapping[str, Spec], runs: Mapping[str, Sequence[Run]]) -> dict[Path, str]:
    """What each page ought to say, for those that say something else."""
    stale = {}
    for page in dict.fromkeys(pages):
        text = page.read_text(encoding="utf-8")
        wanted = render(text, specs, runs, str(page))
        if wanted != text:
            stale[page] = wanted
    return stale


def update(pages: Sequence[Path], specs: Mapping[str, Spec], runs: Mapping[str, Sequence[Run]]) -> list[Path]:
    """Fill the blocks of `pages`; all are rendered before the first is written. Returns those that changed."""
    stale = stale_pages(pages, specs, runs)
    for page, text in stale.items():
        write_atomically(page, text.encode())
    return list(stale)
