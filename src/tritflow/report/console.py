"""An evaluation run as tables on the terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tritflow.report.formats import interval, signed_interval


def evaluation_tables(run: dict[str, Any]) -> RenderableType:
    """Scores per tag, what changed against the teacher, fidelity, and where the numbers come from."""
    parts: list[RenderableType] = [_scores(run)]
    if "fidelity" in run:
        parts.append(_fidelity(run["fidelity"]))
    parts += [Text(line, style="dim") for line in _notes(run)]
    seen = run["prompts"]["overlap"]
    if seen["count"]:
        parts.append(
            Text(
                f"Warning: {seen['count']} of {run['prompts']['count']} prompts were trained on; "
                "the scores without them stand in the last column",
                style="bold yellow",
            )
        )
    return Group(*parts)


def _scores(run: dict[str, Any]) -> Table:
    paired, against = run.get("paired"), run.get("against")
    clean = run.get("scores_without_overlap")
    substitutes = run["task"].get("substitutes")
    suite = f"{run['task']['name']}{' with substitute scorers' if substitutes else ''}"
    table = Table(title=f"{suite}: {run['label']}", title_justify="left")
    table.add_column("tag")
    for name in [
        run["label"],
        *([against["model"]["name"], "difference", "kept"] if against else []),
        *(["without overlap"] if clean else []),
    ]:
        table.add_column(name, justify="right", overflow="fold")

    def row(name: str, scores: Any, theirs: Any, pair: Any, apart: Any, style: str = "") -> None:
        cells = [name, interval(scores)]
        if against:
            cells += [
                interval(theirs),
                signed_interval(pair and pair["difference"]),
                interval(pair and pair["kept"], percent=True),
            ]
        if clean:
            cells.append(interval(apart))
        table.add_row(*cells, style=style)

    for tag, scores in run["scores"]["tags"].items():
        row(
            tag,
            scores,
            against and against["scores"]["tags"].get(tag),
            paired and paired["tags"].get(tag),
            clean and clean["tags"].get(tag),
        )
    table.add_section()
    row(
        "overall",
        run["scores"]["overall"],
        against and against["scores"]["overall"],
        paired and paired["overall"],
        clean and clean["overall"],
        "bold",
    )
    return table


def _fidelity(found: dict[str, Any]) -> Table:
    table = Table(title="To the teacher's pictures of the same noise (medians)", title_justify="left")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_row("PSNR, whole picture (dB)", interval(found["psnr"], digits=2))
    if found["psnr_object"]:
        table.add_row("PSNR, object pixels (dB)", interval(found["psnr_object"], digits=2))
    table.add_row("SSIM", interval(found["ssim"]))
    if found.get("lpips"):
        table.add_row("LPIPS", interval(found["lpips"]))
    table.add_row("energy of the top octave", interval(found["bands"]["top"]["energy"]))
    table.add_row("coherence of the top octave", interval(found["bands"]["top"]["coherence"]))
    for name, detail in found.get("details", {}).items():
        if detail["ratio"]:
            table.add_row(f"{name.replace('_', ' ')}, of the teacher's", interval(detail["ratio"]))
    return table


def _notes(run: dict[str, Any]) -> list[str]:
    p, s = run["prompts"], run["settings"]
    lines = [
        f"{p['count']} prompts x {p['samples']} pictures, {s['width']}x{s['height']}, "
        f"{s['num_inference_steps']} steps, guidance {s['guidance_scale']:g}; 95 % intervals by prompt",
        run["device"],
    ]
    noise = run["scores"]["seed_noise"]
    if noise is not None:
        lines.append(f"another seed set would move the overall score by about {noise:.3f} (one standard deviation)")
    paired = (run.get("paired") or {}).get("overall")
    if paired and paired["minimum_detectable"] is not None:
        lines.append(f"smallest difference this run would have seen (80 % power): {paired['minimum_detectable']:.3f}")
    sets = run.get("seed_sets")
    if sets and sets["overall"]:
        a, b = sets["base_seeds"]
        lines.append(f"seed {a} against seed {b}, the same model: overall {signed_interval(sets['overall'])}")
    for role, stands_for in (run["task"].get("substitutes") or {}).items():
        lines.append(f"{role}: {run['task']['scorers'].get(role, '')}, a substitute for {stands_for}")
    if run["task"].get("substitutes"):
        lines.append("these are not the suite's official scores; --official reads those back")
    if not p["overlap"]["known"]:
        lines.append("which prompts this model was trained on is not known (--trained-on FILE tells)")
    return lines
