"""Figures from runs: the same bytes from the same results (no time stamps, no fonts but matplotlib's own)."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tritflow.evaluation.tasks.fidelity import BANDS
from tritflow.report.sources import ReportError, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinct for the colour-blind as well (Okabe & Ito 2008), and from light to dark on paper.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def tag_scores(runs: Sequence[Run]) -> Figure:
    """Bars with 95 % intervals: a group a tag and the overall score, a colour a run."""
    runs = [r for r in runs if (r.get("scores") or {}).get("tags")]
    if not runs:
        raise ReportError("no run holds scores to draw")
    tags = list(dict.fromkeys(t for r in runs for t in r["scores"]["tags"]))
    groups = [*tags, "overall"]
    figure, axes = _figure(max(6.0, 0.28 * len(runs) * len(groups) + 2), 3.6)
    width = 0.8 / len(runs)
    for i, run in enumerate(runs):
        found = [run["scores"]["tags"].get(t) for t in tags] + [run["scores"]["overall"]]
        at = [g - 0.4 + width * (i + 0.5) for g, s in enumerate(found) if s]
        shown = [s for s in found if s]
        axes.bar(
            at,
            [s["value"] for s in shown],
            width * 0.92,
            yerr=[[_end(s, "low") for s in shown], [_end(s, "high") for s in shown]],
            color=_COLORS[i % len(_COLORS)],
            error_kw={"elinewidth": 0.8, "capsize": 1.5},
            label=str(run["label"]),
        )
    axes.set_xticks(range(len(groups)), [g.replace("_", " ") for g in groups], rotation=20, ha="right")
    axes.set_ylim(0, 1)
    axes.set_ylabel("score")
    axes.set_title("Scores on held-out prompts, 95 % intervals by prompt", loc="left")
    figure.legend(frameon=False, ncols=min(len(runs), 4), loc="outside lower center", fontsize=8)
    return figure


def band_detail(runs: Sequence[Run]) -> Figure:
    """Two panels over the octaves of spatial frequency: energy ratio and coherence with the teacher."""
    runs = [r for r in runs if r.get("fidelity")]
    if not runs:
        raise ReportError("no run holds fidelity to draw")
    figure, panels = _figure(8.0, 3.2, 2)
    for axes, measure in zip(panels, ("energy", "coherence"), strict=True):
        for i, run in enumerate(runs):
            found = [run["fidelity"]["bands"][b][measure] for b in BANDS]
            at = [k for k, s in enumerate(found) if s]
            shown = [s for s in found if s]
            axes.errorbar(
                at,
                [s["value"] for s in shown],
                yerr=[[_end(s, "low") for s in shown], [_end(s, "high") for s in shown]],
                color=_COLORS[i % len(_COLORS)],
                marker="o",
                markersize=3.5,
                linewidth=1.2,
                capsize=2,
                label=str(run["label"]),
            )
        axes.axhline(1, color="0.6", linewidth=0.8, zorder=0)
        axes.set_xticks(range(len(BANDS)), BANDS)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.set_xlabel("octave of spatial frequency (upper edge / Nyquist)")
        axes.set_title(f"{measure} against the teacher", loc="left")
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def rivals(runs: Sequence[Run]) -> Figure:
    """Two panels against measured bits a weight: score kept and PSNR; ours large, simulated ones hollow.

    No two runs have colour and marker in common.
    """
    runs = [r for r in runs if r.get("quantizer") and r.get("paired")]
    if not runs:
        raise ReportError("no run of a quantized model was paired with its teacher")
    ours_first = sorted(runs, key=lambda r: r["quantizer"]["name"] != "tritflow")
    own = sum(r["quantizer"]["name"] == "tritflow" for r in runs)
    figure, panels = _figure(9.0, 3.8, 2)
    for axes, path, name in zip(panels, (_kept, _psnr), ("score kept (%)", "PSNR to the teacher (dB)"), strict=True):
        for place, run in enumerate(ours_first):
            score = path(run)
            if not score or score.get("value") is None:
                continue
            ours = place < own
            i, markers = (place, "DPX") if ours else (place - own, "os^")
            color = _COLORS[i % len(_COLORS)]
            axes.errorbar(
                [run["quantizer"]["bits_per_weight"]],
                [score["value"]],
                yerr=[[_end(score, "low")], [_end(score, "high")]],
                color=color,
                marker=markers[i // len(_COLORS) % 3],
                markersize=7 if ours else 5,
                markerfacecolor="white" if run["quantizer"].get("simulated") else color,
                linewidth=0,
                elinewidth=1,
                capsize=2,
                label=str(run["label"]),
            )
        axes.set_xlabel("bits a weight")
        axes.set_ylabel(name)
    panels[0].axvline(3.0, color="0.7", linewidth=0.8, zorder=0)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=3, loc="outside lower center", fontsize=7)
    return figure


def scaling(runs: Sequence[Run]) -> Figure:
    """Score kept (above) and PSNR (below) with 95 % intervals, against steps of distillation (left, a line a size) and
    against the transformer's size (right, a line a number of steps)."""
    newest = {(r["parameters"], r["steps"]): r for r in runs if r.get("paired")}
    if not newest:
        raise ReportError("no run holds sizes and steps to draw")
    names = {r["parameters"]: str(r["size"]) for r in newest.values()}
    figure, panels = _figure(9.0, 6.0, 2, rows=2)
    for row, path, label in zip(
        panels, (_kept, _own_psnr), ("score kept (%)", "PSNR to the teacher (dB)"), strict=True
    ):
        found = {
            key: score for key, r in sorted(newest.items()) if (score := path(r)) and score.get("value") is not None
        }
        _lines(row[0], {(names[size], steps): score for (size, steps), score in found.items()})
        _lines(
            row[1],
            {
                (f"{steps:,} steps", size / 1e6): score
                for (size, steps), score in sorted(found.items(), key=lambda e: e[0][1])
            },
        )
        row[0].set_ylabel(label)
    for axes, title in zip(
        panels[1], ("steps of distillation", "parameters of the transformer (millions)"), strict=True
    ):
        axes.set_xlabel(title)
    counts, sizes = sorted({steps for _, steps in newest}), [size / 1e6 for size in sorted(names)]
    for left, right in panels:
        left.set_xticks(counts, [f"{steps:,}" for steps in counts])
        right.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
        left.minorticks_off()
        right.minorticks_off()
    for axes in panels[0]:
        axes.axhline(100, color="0.8", linewidth=0.8, zorder=0)
        axes.legend(frameon=False, fontsize=8)
    return figure


def _lines(axes: Any, found: Mapping[tuple[str, float], dict[str, Any]]) -> None:
    """A line with 95 % intervals for each name of (name, place on a logarithmic axis)."""
    for i, name in enumerate(dict.fromkeys(name for name, _ in found)):
        shown = sorted(((at, score) for (of, at), score in found.items() if of == name), key=lambda e: e[0])
        axes.errorbar(
            [at for at, _ in shown],
            [s["value"] for _, s in shown],
            yerr=[[_end(s, end) for _, s in shown] for end in ("low", "high")],
            color=_COLORS[i % len(_COLORS)],
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
            label=name,
        )
    axes.set_xscale("log")


def _own_psnr(run: Run) -> dict[str, Any] | None:
    return run.get("psnr")


def _kept(run: Run) -> dict[str, Any] | None:
    found = (run["paired"].get("overall") or {}).get("kept")  # a run of few tags has no overall
    return None if not found else {k: 100 * found[k] for k in ("value", "low", "high") if found.get(k) is not None}


def _psnr(run: Run) -> dict[str, Any] | None:
    return (run.get("fidelity") or {}).get("psnr")


def exposure(runs: Sequence[Run]) -> Figure:
    """A student's velocity error step by step, where its teacher goes and where it goes itself; a colour a student.

    Drawn are the newest run and those that compare with it, the newest of each label: of the same prompts, noise and
    sampler on the same device.
    """
    if not runs:
        raise ReportError("no run holds errors along a trajectory to draw")

    def asked(run: Run) -> list[Any]:
        names = ("device", "against", "mode", "trajectories", "seed", "guidance_scale", "num_inference_steps")
        return [run["prompts"]["sha256"], *(run[name] for name in names)]

    runs = list({str(run["label"]): run for run in runs if asked(run) == asked(runs[-1])}.values())
    figure, axes = _figure(6.0, 3.4)
    for i, run in enumerate(runs):
        color = _COLORS[i % len(_COLORS)]
        for whose, style, states in (("teacher", "-", "its teacher's states"), ("student", "--", "its own")):
            found = run["states"][whose]["mean"]
            axes.plot(
                run["timesteps"],
                found,
                style,
                color=color,
                linewidth=1.3,
                label=f"{run['label']}; measured on {states}",
            )
    axes.set_xlim(1, 0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("timestep (1 is noise)")
    axes.set_ylabel("mean square error of the velocity")
    axes.legend(frameon=False, fontsize=8)
    return figure


def sensitivity(runs: Sequence[Run]) -> Figure:
    """The newest run: layers by block, coloured by the error of each alone, and each stream's sum over timesteps."""
    layers = runs[-1].get("layers") if runs else None
    if not layers:
        raise ReportError("the run holds no layers to draw")
    run = runs[-1]
    from tritflow.profiling.sensitivity import by_stream

    blocks = list(dict.fromkeys(layer["block"] for layer in layers))
    kinds = list(dict.fromkeys(layer["kind"] for layer in layers))
    grid = [[math.nan] * len(blocks) for _ in kinds]
    for layer in layers:
        value = layer["error"]["all"]
        grid[kinds.index(layer["kind"])][blocks.index(layer["block"])] = math.log10(max(value, 1e-12))
    figure, (left, right) = _figure(max(9.0, 0.22 * len(blocks) + 6), 1.2 + 0.2 * len(kinds), 2)
    picture = left.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    left.set_yticks(range(len(kinds)), kinds, fontsize=6)
    step = max(1, len(blocks) // 12)
    short = [
        b.replace("single_transformer_blocks.", "single ").replace("transformer_blocks.", "double ") for b in blocks
    ]
    left.set_xticks(range(0, len(blocks), step), short[::step], rotation=60, ha="right", fontsize=6)
    figure.colorbar(picture, ax=left, label="log10 of the relative velocity error")
    left.set_title("One linear ternary, all others dense", loc="left")
    edges = run["bins"]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
    for i, (stream, error) in enumerate(by_stream(run).items()):
        points = [(t, e) for t, e in zip(middles, error["bins"], strict=True) if e is not None]
        right.plot(
            *zip(*points, strict=True), color=_COLORS[i % len(_COLORS)], marker="o", markersize=3.5, label=stream
        )
    right.set_yscale("log")
    right.set_xlabel("timestep (1 is noise)")
    right.set_title("Sum over the linears of a stream", loc="left")
    right.legend(frameon=False, fontsize=8)
    return figure


def training_legs(runs: Sequence[Run]) -> list[Run]:
    """The runs of the topic "training" that led to the newest one, oldest first: back to the last that began with
    nothing, whose first score is below a half."""
    legs: list[Run] = []
    for run in reversed(runs):
        legs.insert(0, run)
        if run.get("curve") and run["curve"][0]["overall"] < 0.5:
            break
    return legs


def training_curve(legs: Sequence[Run]) -> Figure:
    """Score by tag against minutes of training, one leg (a run of the topic "training") after the other; the overall
    score in black. Points without a time, scores of a leg's end alone, are left out."""
    curves = [[p for p in leg.get("curve") or () if "seconds" in p] for leg in legs]
    curves = [points for points in curves if points]
    if not curves:
        raise ReportError("the run holds no curve to draw")
    figure, axes = _figure(7.0, 3.4)
    tags = [k for k in curves[0][0] if k not in ("steps", "seconds", "overall")]
    begin = 0.0
    for number, points in enumerate(curves):
        minutes = [begin + p["seconds"] / 60 for p in points]
        for i, tag in enumerate(tags):
            color = _COLORS[i % (len(_COLORS) - 1)]
            style = "-" if i < len(_COLORS) - 1 else "--"
            name = "_" if number else tag.replace("_", " ")  # once in the legend
            axes.plot(minutes, [p[tag] for p in points], style, color=color, linewidth=1.1, marker=".", label=name)
        axes.plot(minutes, [p["overall"] for p in points], color="black", linewidth=2, marker="o", markersize=3)
        if number:
            axes.axvline(begin, color="0.6", linewidth=0.8, linestyle=":", zorder=0)
        if len(curves) > 1:
            axes.text(begin + 0.1, 0.02, f"leg {number + 1}", fontsize=8, color="0.4")
        begin = minutes[-1]
    axes.plot([], [], color="black", linewidth=2, label="overall")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("minutes since the start" + (", leg after leg" if len(curves) > 1 else ""))
    axes.set_ylabel("score")
    prompts = " or ".join(str(n) for n in sorted({leg["prompts_per_tag"] for leg in legs}))
    axes.set_title(f"Averaged weights while training, {prompts} held-out prompts a tag", loc="left")
    figure.legend(frameon=False, ncols=5, loc="outside lower center", fontsize=8)
    return figure


def encode(figure: Figure, kind: str = "svg") -> bytes:
    """The figure as "svg" or "png" bytes, without a time stamp; a PNG in 64 colours, a quarter of the bytes."""
    import matplotlib
    from PIL import Image

    buffer = io.BytesIO()
    metadata = {"Date": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "tritflow", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, metadata=metadata, dpi=160)
    if kind == "png":
        picture, buffer = Image.open(buffer).convert("RGB").quantize(64), io.BytesIO()
        picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _figure(width: float, height: float, panels: int = 1, *, rows: int = 1) -> tuple[Figure, Any]:
    # Figure alone, not pyplot: no global state, no display.
    from matplotlib.figure import Figure as _Figure

    figure = _Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, panels)
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(labelsize=8)
        one.title.set_fontsize(9)
    return figure, axes


def _end(score: dict[str, Any], which: str) -> float:
    end = score.get(which)
    return 0.0 if end is None else max(0.0, (score["value"] - end) * (1 if which == "low" else -1))
