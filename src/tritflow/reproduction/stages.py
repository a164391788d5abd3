"""The stages of a reproduction, each around a public function of the house."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from tritflow.evaluation.api import prompts_hash
from tritflow.evaluation.contenders import trained_prompts
from tritflow.evaluation.images import ImageSet, ImageSetError
from tritflow.evaluation.run import Plan, evaluate
from tritflow.evaluation.scorers.weights import identity
from tritflow.reproduction import costs
from tritflow.reproduction.engine import Json, Report, Stage
from tritflow.reproduction.measures import measure_latency, measure_storage
from tritflow.reproduction.request import Request
from tritflow.results import append, digest, provenance, read


def stages(request: Request) -> list[Stage]:
    """All stages in order. Raises one line each for a model, recipe, suite or prompts that are not there."""
    job = costs.job_of(request)
    found = [_prompts(request), _quantize(request), _check(request)] if job.prompts else []
    found = found or [_quantize(request), _check(request)]
    scores = []
    for suite in request.chosen_suites:
        draws = [_draw(request, suite, who) for who in request.contenders]
        found += draws
        scores += [_score(request, suite, who) for who in request.contenders]
    measured = [_storage(request), _latency(request)]
    last = [s.name for s in [*scores, *measured]]
    return [*found, *scores, *measured, _report(request, tuple(last))]


def _prompts(request: Request) -> Stage:
    path = request.calibration_prompts

    def run(report: Report) -> None:
        found = costs.job_of(request).prompts
        assert found is not None
        found.write(path)
        report("calibration prompts", len(found), len(found))

    def inputs() -> Json:
        found = costs.job_of(request).prompts
        return {"prompts": found.sha256 if found else None}

    return Stage("prompts", "calibration prompts", (), inputs, partial(_files, [path]), run, lambda: [path], mends=True)


def _quantize(request: Request) -> Stage:
    needs = ("prompts",) if costs.job_of(request).prompts else ()

    def run(report: Report) -> None:
        from tritflow.pipelines.loading import quiet
        from tritflow.pipelines.quantize import quantize

        with quiet():
            quantize(
                request.model,
                request.student,
                request.recipe,
                prompts=request.calibration_prompts if needs else None,
                device=request.device,
                on_progress=lambda stage, done, total: report(f"quantizing: {stage}", done, total),
            )

    def outputs() -> Json | None:
        from tritflow.calibration.artifacts import read_json
        from tritflow.evaluation.models import fingerprint

        meta = request.student / "meta.json"
        if not meta.is_file() or not read_json(meta).get("complete") or not _whole(request.student):
            return None
        return {"digest": read_json(meta)["digest"], "files": fingerprint([request.student])}

    return Stage(
        "quantize",
        f"quantizing with recipe {Path(request.recipe).stem}",
        needs,
        lambda: costs.job_of(request).identity,
        outputs,
        run,
        lambda: [request.student],
        partial(costs.of_quantizing, request),
        precious=True,
    )


def _whole(folder: Path) -> bool:
    return any((folder / "transformer").glob("*.safetensors"))


def _check(request: Request) -> Stage:
    path = request.results / "check.json"

    def run(report: Report) -> None:
        import tritflow.models  # noqa: F401 - families register their tensors' shapes
        from tritflow.formats.accounting import account

        found = [c.summary() for c in account(request.student)]
        report("verifying every byte", 1, 1)
        _save(path, "check", [{"label": c["name"], **{k: v for k, v in c.items() if k != "path"}} for c in found])

    def outputs() -> Json | None:
        # What was found, not when: pictures of the very same model are not drawn again.
        if not path.is_file():
            return None
        parts = [{k: run[k] for k in ("label", "tensor_bytes", "digest")} for run in read(path, "check")]
        return {"parts": digest(parts)}

    return replace(_measuring("check", "verifying every byte", ("quantize",), dict, path, run), outputs=outputs)


def _measuring(
    name: str,
    what: str,
    needs: tuple[str, ...],
    inputs: Callable[[], Json],
    path: Path,
    run: Callable[[Report], None],
    cost: Callable[[bool], costs.Cost] = lambda fresh: costs.Cost(),
) -> Stage:
    """A stage whose result is one results file."""
    return Stage(name, what, needs, inputs, partial(_files, [path]), run, lambda: [path], cost)


def _save(path: Path, topic: str, runs: Sequence[Json]) -> None:
    path.unlink(missing_ok=True)
    for run in runs:
        append(path, topic, {**run, **{k: v for k, v in provenance().items() if k not in run}})


def _draw(request: Request, suite: str, who: str) -> Stage:
    def folder() -> Path:
        return request.pictures(request.task(suite)) / request.drawn_by(who).folder_name

    def inputs() -> Json:
        task, by = request.task(suite), request.drawn_by(who)
        origin = provenance(by.device)
        return {
            "model": by.model.hash,
            "settings": asdict(by.settings),
            "suite": [task.name, task.version],
            "prompts": prompts_hash(request.records(task)),
            **asdict(request.sampling(task)),
            "device": origin["device"],
            "versions": {k: v for k, v in origin["versions"].items() if k in ("torch", "diffusers", "pillow")},
        }

    def outputs() -> Json | None:
        try:
            return {"pictures": ImageSet.open(folder(), request.task(suite)).hash}
        except ImageSetError:
            return None

    def run(report: Report) -> None:
        task = request.task(suite)
        evaluate(
            task,
            request.records(task),
            request.drawn_by(who),
            request.pictures(task),
            sampling=request.sampling(task),
            stage=report,
            plan=Plan(draw_only=True),
        )

    return Stage(
        f"draw-{suite}-{who}",
        f"drawing {suite} with {request.contenders[who]}",
        () if who == "teacher" else ("check",),
        inputs,
        outputs,
        run,
        lambda: [folder()],
        partial(costs.of_drawing, request, suite, who),
        mends=True,
        precious=True,
    )


def _score(request: Request, suite: str, who: str) -> Stage:
    path = request.results / f"{suite}-{who}.json"

    def run(report: Report) -> None:
        task = request.task(suite)
        run = evaluate(
            task,
            request.records(task),
            request.drawn_by(who),
            request.pictures(task),
            teacher=None if who == "teacher" else request.teacher(),
            sampling=request.sampling(task),
            label=request.contenders[who],
            trained_on=None if who == "teacher" else _trained_on(request),
            stage=report,
        )
        path.unlink(missing_ok=True)
        append(path, suite, run)

    def inputs() -> Json:
        task = request.task(suite)
        chosen = {role: identity(source) for role, source in request.scorers.get(suite, {}).items()}
        return {"suite": [task.name, task.version], "scorers": chosen, "label": request.contenders[who]}

    drawn = dict.fromkeys((f"draw-{suite}-teacher", f"draw-{suite}-{who}"))
    return _measuring(
        f"score-{suite}-{who}",
        f"scoring {suite} of {request.contenders[who]}",
        tuple(drawn),
        inputs,
        path,
        run,
        partial(costs.of_scoring, request, suite, who),
    )


def _trained_on(request: Request) -> list[str] | None:
    path = request.calibration_prompts
    given = path if costs.job_of(request).prompts else None
    return trained_prompts(str(request.student), given, request.prompts)


def _storage(request: Request) -> Stage:
    path = request.results / "storage.json"
    return _measuring(
        "storage",
        "measuring storage",
        ("check",),
        dict,
        path,
        lambda report: _save(path, "storage", measure_storage(request)),
    )


def _latency(request: Request) -> Stage:
    path = request.results / "cost.json"

    def inputs() -> Json:
        origin = provenance(request.on)
        same = {k: v for k, v in origin["versions"].items() if k in ("tritflow", "torch", "triton")}
        asked = {"steps": request.latency_steps, "rounds": request.rounds, "dtype": request.dtype}
        return {"device": origin["device"], "versions": same, **asked}

    return _measuring(
        "latency",
        "measuring latency and memory",
        ("storage",),
        inputs,
        path,
        lambda report: _save(path, "cost", [measure_latency(request, report)]),
        partial(costs.of_timing, request),
    )


def _report(request: Request, needs: tuple[str, ...]) -> Stage:
    folder = request.out / "report"

    def run(report: Report) -> None:
        from tritflow.report.build import write_report
        from tritflow.report.sources import collect

        pictures = [request.pictures(request.task(suite)) for suite in request.chosen_suites]
        names = [f"{suite}-{who}" for suite in request.chosen_suites for who in request.contenders]
        results = [request.results / f"{name}.json" for name in [*names, "storage", "cost"]]
        # Results and pictures of an earlier choice of suites or recipe may lie beside those of this run.
        sources = collect([*results, *pictures])
        ours = {who.folder_name for who in map(request.drawn_by, request.contenders)}
        sources.pictures = [p for p in sources.pictures if p.name in ours]
        write_report(sources, folder)
        report("report", 1, 1)

    def outputs() -> Json | None:
        return _files(sorted(p for p in folder.rglob("*") if p.is_file())) if (folder / "report.md").is_file() else None

    def inputs() -> Json:
        return {"tritflow": provenance()["versions"].get("tritflow")}

    return Stage("report", "writing the report", needs, inputs, outputs, run, lambda: [folder], mends=True)


def _files(paths: Sequence[Path]) -> Json | None:
    """SHA-256 of small files; None when one is missing."""
    found: dict[str, Any] = {}
    for path in paths:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            found[path.name if len(paths) == 1 else path.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(found) <= 1:
        return found or None
    # Many files are told by one number; where the run's folder lies says nothing.
    return {"files": len(found), "sha256": hashlib.sha256("".join(found.values()).encode()).hexdigest()}
