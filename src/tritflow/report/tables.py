"""Tables declared by a small spec and filled from results; none is written by hand or by its own code.

A spec lives in `tables.toml`:

    [quality]
    like = "scores"                               # optional: all that is not said here is as in that table
    title = "..."
    topic = "scenes"                              # which results files
    where = { "task.name" = "scenes" }            # optional: only runs with these values
    has = "quantizer"                             # optional: only runs that have this
    current = true                                # optional: only runs of the suite's newest version and of one
                                                  # teacher, that of the newest run labelled "teacher"; "others": the
                                                  # newest one that other quantizers were measured against;
                                                  # "teacher": the teacher's own runs;
                                                  # "student": what was measured against its newest run labelled "best";
                                                  # "suite": the newest version's, whatever the teacher
    rows = [{ label = "absmean" }, ...]           # a row each: the newest run with these values; or
    each = ["label"]                              # a row for each different value, its newest run; or neither of
                                                  # the two: the newest run alone. Of those of the newest one's model,
                                                  # teacher and settings the one of most pictures stands for it
    order = ["parameters", "steps"]               # optional, with `each`: rows in increasing order of these values
    teachers = true                               # optional: a row for each teacher that runs were measured against
                                                  # and that has no run of its own, above its first student's row
    entries = "scores.tags"                       # optional: a row for each item of this list or dict of the run; or
                                                  # ["paired.overall", "paired.tags.*"]: of these values, or their items
    columns = [{ name = "overall", value = "scores.overall", format = "score" }, ...]
    reference = [["FLUX (paper)", 0.66], ...]      # optional: rows published elsewhere, a value a column ("" for none),
                                                  # above the runs' rows; shown only when there are any
    note = "..."                                  # optional sentence below

A value is a dotted path into the run (`^` first: into the run from inside an entry; `key`: an entry's own key in a
dict; `{at}`: where an entry of such a list lies below its first key, so that "^scores.{at}" is that tag's score).
Formats are those of `formats.FORMATS`. Every table says its devices, versions, numbers of prompts and pictures, and
how its intervals came about.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

from tritflow.config import nearest
from tritflow.report.formats import FORMATS, MISSING, WORDS, text
from tritflow.report.sources import ReportError, Run

_SHOWN_VERSIONS = ("tritflow", "torch", "diffusers", "transformers", "triton")


@dataclass(frozen=True)
class Column:
    """One column: its heading, the dotted path of its value, and a format's name."""

    name: str
    value: str
    format: str = "text"


@dataclass(frozen=True)
class Spec:
    """A table's declaration; see the module's text."""

    name: str
    topic: str
    columns: tuple[Column, ...]
    title: str = ""
    where: dict[str, Any] = field(default_factory=dict)
    has: str = ""
    current: bool | str = False
    rows: tuple[dict[str, Any], ...] = ()
    each: tuple[str, ...] = ()
    order: tuple[str, ...] = ()
    teachers: bool = False
    entries: str | tuple[str, ...] | None = None
    reference: tuple[tuple[Any, ...], ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A filled table: cells as text, `numeric` for right alignment, and the notes below it."""

    spec: Spec
    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    numeric: tuple[bool, ...]
    notes: tuple[str, ...]


def load_specs(source: str | None = None) -> dict[str, Spec]:
    """The package's tables, or those in a TOML text. Raises `ReportError` on an unknown key or format."""
    if source is None:
        source = files("tritflow.report").joinpath("tables.toml").read_text(encoding="utf-8")
    specs = {}
    known = ["like", *(f.name for f in fields(Spec) if f.name != "name")]
    whole: dict[str, dict[str, Any]] = {}
    for name, said in tomllib.loads(source).items():
        for key in said:
            if key not in known:
                raise ReportError(f"table '{name}' has an unknown key '{key}'{nearest(key, known)}")
        like = said.get("like")
        if like is not None and like not in whole:
            raise ReportError(
                f"table '{name}' is like '{like}', which no table above it is{nearest(like, list(whole))}"
            )
        data = whole[name] = {**whole.get(like, {}), **said}
        if "topic" not in data or not data.get("columns"):
            raise ReportError(f"table '{name}' needs a topic and columns")
        columns = tuple(Column(**c) for c in data["columns"])
        for column in columns:
            if column.format not in FORMATS:
                raise ReportError(
                    f"table '{name}', column '{column.name}': no format '{column.format}'"
                    f"{nearest(column.format, list(FORMATS))}"
                )
        rest = {k: data[k] for k in ("title", "where", "has", "current", "teachers", "entries", "note") if k in data}
        if isinstance(data.get("entries"), list):
            rest["entries"] = tuple(data["entries"])
        rows, each, order = (tuple(data.get(key, ())) for key in ("rows", "each", "order"))
        reference = tuple(tuple(r) for r in data.get("reference", ()))
        if any(len(r) != len(columns) for r in reference):
            raise ReportError(f"table '{name}': a reference row needs a value for each of the {len(columns)} columns")
        specs[name] = Spec(name, data["topic"], columns, rows=rows, each=each, order=order, reference=reference, **rest)
    return specs


def lookup(data: Any, path: str) -> Any:
    """The value at a dotted path (list items by number; "." is `data` itself), or None where the path ends early."""
    if path in ("", "."):
        return data
    for key in path.split("."):
        if isinstance(data, dict):
            data = data.get(key)
        elif isinstance(data, list) and key.lstrip("-").isdigit() and -len(data) <= int(key) < len(data):
            data = data[int(key)]
        else:
            return None
    return data


def _matches(run: Run, wanted: dict[str, Any]) -> bool:
    return all(lookup(run, path) == value for path, value in wanted.items())


def current_runs(runs: Sequence[Run], of: bool | str = True) -> list[Run]:
    """Those (oldest first) that compare with each other: of the suite's newest version, and of one teacher.

    Prompts change with a suite's version, and scores kept are a teacher's. The teacher is the model of the newest run
    labelled "teacher", or, where there is none, the one that the newest run was measured against; `of` "others", the
    one that the newest run of another quantizer was measured against, if any was. Where others were measured against
    it, its own runs on prompts that none of them had are left out; `of` "teacher", its own are all that is left. `of`
    "student", those measured against the teacher's newest student, labelled "best"; `of` "suite", those of all
    teachers, for what is measured on twins.
    """
    newest = max((lookup(r, "task.version") or 0 for r in runs), default=0)
    runs = [r for r in runs if (lookup(r, "task.version") or 0) == newest]
    if of == "suite":
        return runs
    own = [lookup(r, "model.hash") for r in runs if r.get("label") == "teacher"]
    named = [lookup(r, "against.model.hash") for r in runs if r.get("against")]
    if not own and not named:
        return runs
    foreign = [lookup(r, "against.model.hash") for r in runs if lookup(r, "quantizer.name") not in (None, "tritflow")]
    teacher = foreign[-1] if of == "others" and foreign else (own or named)[-1]
    every = runs
    runs = [r for r in runs if teacher in (lookup(r, "against.model.hash"), lookup(r, "model.hash"))]
    if of == "student":
        student = [lookup(r, "model.hash") for r in runs if r.get("label") == "best"][-1:]
        return [r for r in every if lookup(r, "against.model.hash") in student]
    if of == "teacher":
        return [r for r in runs if r.get("label") == "teacher"]
    shown = [_drawn(r) for r in runs if r.get("against")]
    return [r for r in runs if not shown or r.get("against") or _drawn(r) in shown]


def _drawn(run: Run) -> list[Any]:
    return [lookup(run, f"prompts.{key}") for key in ("hash", "samples", "base_seed")]


def _chosen(spec: Spec, runs: Sequence[Run]) -> list[Run]:
    runs = [r for r in runs if _matches(r, spec.where)]
    if isinstance(spec.entries, str):
        runs = [r for r in runs if lookup(r, spec.entries)]  # one that measured other parts has no say here
    if spec.current:
        runs = current_runs(runs, of=spec.current)
    if spec.has:
        runs = [r for r in runs if lookup(r, spec.has) is not None]
    if spec.each:
        found = foremost_each(runs, spec.each)
        return sorted(found, key=lambda r: [(v is None, v) for v in (lookup(r, path) for path in spec.order)])
    matching = [[r for r in runs if _matches(r, row)] for row in spec.rows] if spec.rows else [runs]
    return [_foremost(some) for some in matching if some]


def foremost_each(runs: Sequence[Run], paths: Sequence[str]) -> list[Run]:
    """For each different value at `paths` its newest run, or one of more pictures that is of the same."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(repr([lookup(run, path) for path in paths]), []).append(run)
    return [_foremost(same) for same in groups.values()]


def _foremost(runs: Sequence[Run]) -> Run:
    """Of runs (oldest first) the newest, or one of the same model, teacher and settings with more pictures."""

    def of(run: Run) -> list[Any]:
        return [lookup(run, path) for path in ("model.hash", "against.model.hash", "settings")]

    known = lookup(runs[-1], "model.hash") is not None
    same = [r for r in runs if known and of(r) == of(runs[-1])] or runs[-1:]
    most = max(lookup(r, "prompts.pictures") or 0 for r in same)
    return next(r for r in reversed(same) if (lookup(r, "prompts.pictures") or 0) == most)


def _with_teachers(runs: Sequence[Run]) -> list[Run]:
    """The runs, and above its first student's a row for each teacher that has no run of its own here."""

    def drew(run: Run, model: str, scores: str) -> str:
        judged = [lookup(run, f"task.{key}") for key in ("version", "scored_by")]
        return repr([lookup(run, model), lookup(run, scores), *judged, *_drawn(run)])

    known = {drew(r, "model.hash", "scores.overall.value") for r in runs}
    found: list[Run] = []
    for run in runs:
        theirs = run.get("against")
        if theirs:
            key = drew(run, "against.model.hash", "against.scores.overall.value")
            if key not in known:
                known.add(key)
                shared: Run = {k: run[k] for k in ("task", "prompts", "device", "versions", "time") if k in run}
                found.append({**shared, **theirs, "label": f"{lookup(theirs, 'model.name')} (teacher)"})
        found.append(run)
    return found


def _entries(spec: Spec, run: Run) -> list[Any]:
    if spec.entries is None:
        return [run]
    if isinstance(spec.entries, str):
        found = lookup(run, spec.entries)
        if isinstance(found, dict):
            return [{"key": k, **(v if isinstance(v, dict) else {"value": v})} for k, v in found.items()]
        return list(found or [])
    listed = []
    for path in spec.entries:
        inside, _, last = path.rpartition(".")
        found = lookup(run, inside) or {}
        for key in found if last == "*" else [last]:
            if found.get(key) is not None:
                at = ".".join([*inside.split(".")[1:], key])
                listed.append({"key": key, "at": at, **found[key]})
    return listed


def _value(run: Run, entry: Any, path: str) -> Any:
    if isinstance(entry, dict) and "at" in entry:
        path = path.replace("{at}", entry["at"])
    return lookup(run, path[1:].lstrip(".")) if path.startswith("^") else lookup(entry, path)


def build(spec: Spec, runs: Sequence[Run]) -> Table:
    """Fill a table from its topic's runs (oldest first). A table without any run has no rows and says so."""
    chosen = _with_teachers(_chosen(spec, runs)) if spec.teachers else _chosen(spec, runs)
    cells, raw, used = [], [], []
    for run in chosen:
        for entry in _entries(spec, run):
            values = [_value(run, entry, c.value) for c in spec.columns]
            row = tuple(FORMATS[c.format](v) for c, v in zip(spec.columns, values, strict=True))
            # A run that measured none of the numbers has no place in this table.
            if all(c.format in WORDS or cell == MISSING for c, cell in zip(spec.columns, row, strict=True)):
                continue
            raw += [v for v, cell in zip(values, row, strict=True) if "[" in cell]
            cells.append(row)
            used.append(run)
    notes = (*([spec.note] if spec.note else []), *_provenance(list({id(r): r for r in used}.values()), raw, cells))
    published = [
        tuple(MISSING if v == "" else FORMATS[c.format](v) for c, v in zip(spec.columns, row, strict=True))
        for row in spec.reference
    ]
    return Table(
        spec,
        tuple(c.name for c in spec.columns),
        (*published, *cells) if cells else (),
        tuple(c.format not in WORDS for c in spec.columns),
        notes if cells else ("No results yet.",),
    )


def _provenance(runs: Sequence[Run], values: Iterable[Any], cells: Sequence[tuple[str, ...]]) -> list[str]:
    """Device, versions, how many prompts and pictures, intervals, dates: what makes a number believable."""
    notes = []
    devices = list(dict.fromkeys(str(r["device"]) for r in runs if r.get("device")))
    if devices:
        predicted = all(run.get("measured") is False for run in runs)
        notes.append(f"{'Computed from' if predicted else 'Measured on'} {'; '.join(devices)}.")
    versions: dict[str, list[str]] = {}
    for run in runs:
        for package in _SHOWN_VERSIONS:
            version = (run.get("versions") or {}).get(package)
            if version and version not in versions.setdefault(package, []):
                versions[package].append(version)
    if versions:
        notes.append(", ".join(f"{p} {' and '.join(v)}" for p, v in versions.items() if v) + ".")
    drawn = [r["prompts"] for r in runs if isinstance(r.get("prompts"), dict) and "samples" in r["prompts"]]
    counts = [f"{p['count']} prompts x {p['samples']} picture{'s' * (p['samples'] != 1)}" for p in drawn]
    if counts:
        notes.append("; ".join(dict.fromkeys(counts)) + " for each row.")
    if any("[" in cell for row in cells for cell in row):
        methods = sorted({v["method"] for v in values if isinstance(v, dict) and "method" in v and v.get("low")})
        notes.append("[low, high]: 95 % intervals" + (f" ({'; '.join(methods)})." if methods else "."))
    replaced = {
        f"{role}: {task['scorers'].get(role, 'another one')} for {own}"
        for task in (r.get("task") or {} for r in runs)
        for role, own in (task.get("substitutes") or {}).items()
    }
    if replaced:
        notes.append(f"Substitute scorers, so not the suite's official metric: {'; '.join(sorted(replaced))}.")
    seen = [r["label"] for r in runs if ((r.get("prompts") or {}).get("overlap") or {}).get("count")]
    if seen:
        notes.append(f"Some prompts were trained on in: {', '.join(map(str, seen))}.")
    days = sorted({str(r["time"])[:10] for r in runs if r.get("time")})
    if days:
        notes.append(f"{days[0]}." if len(days) == 1 else f"{days[0]} to {days[-1]}.")
    return notes


def markdown(table: Table) -> str:
    """GitHub's table syntax, with the notes in one line below."""
    lines = []
    if table.cells:
        header = [text(name) if name else " " for name in table.header]
        lines += [
            "| " + " | ".join(header) + " |",
            "|" + "|".join("---:" if n else "---" for n in table.numeric) + "|",
            *("| " + " | ".join(cell or MISSING for cell in row) + " |" for row in table.cells),
            "",
        ]
    return "\n".join([*lines, "_" + " ".join(table.notes).replace("_", "\\_") + "_"])
