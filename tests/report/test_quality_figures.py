"""Figures and tables of rivals and of sizes, from runs as results hold them."""

import pytest

from tritflow.report import figures
from tritflow.report.build import write_report
from tritflow.report.sources import ReportError, collect
from tritflow.report.tables import build, load_specs
from tritflow.results import append


def score(value, spread=0.02):
    return {"value": value, "low": value - spread, "high": value + spread, "method": "bootstrap by prompt"}


def rival(label, name, bits, kept, psnr, simulated=False):
    return {
        "label": label,
        "task": {"name": "scenes", "version": 2},
        "device": "a GPU",
        "quantizer": {"name": name, "bits_per_weight": bits, "simulated": simulated},
        "scores": {"overall": score(kept)},
        "paired": {"overall": {"kept": score(kept)}},
        "fidelity": {"psnr": score(psnr), "psnr_object": score(psnr - 6)},
        "settings": {"extra": {}},
    }


RUNS = [
    rival("best", "tritflow", 2.07, 0.97, 23.0),
    rival("GGUF Q4_K (simulated)", "q4_k-simulated", 4.5, 0.99, 31.0, True),
    rival("HQQ 2 bits, group 64", "hqq-2", 3.0, 0.12, 9.0),
]


def exposed(label, error, device="cpu"):
    states = {whose: {"mean": [error, factor * error]} for whose, factor in (("teacher", 2), ("student", 3))}
    return {
        "label": label, "against": "small", "mode": "w2a16", "device": device, "trajectories": 4, "seed": 0,
        "guidance_scale": 3.0, "num_inference_steps": 2, "prompts": {"sha256": "p"}, "timesteps": [1.0, 0.5],
        "states": states,
    }  # fmt: skip


def test_a_report_draws_what_the_measuring_commands_left(tmp_path):
    layer = {
        "block": "transformer_blocks.0",
        "kind": "attn.to_q",
        "stream": "image",
        "error": {"all": 0.1, "bins": [0.1]},
    }
    append(tmp_path / "e.json", "exposure", exposed("a", 0.1))
    append(tmp_path / "s.json", "sensitivity", {"label": "x", "device": "cpu", "bins": [0, 1], "layers": [layer]})
    append(tmp_path / "c.json", "scaling", {"label": "x", "device": "cpu", "layers": []})
    written = {p.name for p in write_report(collect([tmp_path]), tmp_path / "report")}
    assert {"exposure.svg", "sensitivity.svg"} <= written
    assert "scaling.svg" not in written  # no run of it can be drawn


def test_exposure_shows_what_compares_with_the_newest_run():
    runs = [exposed("a", 0.1), exposed("b", 0.2, "cuda"), exposed("a", 0.3), exposed("c", 0.4)]
    lines = figures.exposure(runs).axes[0].get_lines()
    assert [line.get_label() for line in lines] == [
        "a; measured on its teacher's states", "a; measured on its own",
        "c; measured on its teacher's states", "c; measured on its own",
    ]  # fmt: skip
    assert list(lines[1].get_ydata()) == pytest.approx([0.3, 0.9])
    with pytest.raises(ReportError, match="no run"):
        figures.exposure([])


def test_rivals_are_drawn_and_tabled_by_bits():
    figure = figures.rivals(RUNS)
    left, right = figure.axes
    lines = [line for container in left.containers for line in container[:1]]
    assert [float(line.get_xdata()[0]) for line in lines] == [2.07, 4.5, 3.0]
    assert [float(line.get_ydata()[0]) for line in lines] == pytest.approx([97, 99, 12])
    assert lines[0].get_marker() == "D"
    assert lines[1].get_markerfacecolor() == "white"
    assert [float(c[0].get_ydata()[0]) for c in right.containers] == [23.0, 31.0, 9.0]
    assert figures.encode(figure) == figures.encode(figures.rivals(RUNS))
    dense = {k: v for k, v in RUNS[0].items() if k != "quantizer"} | {"label": "teacher"}
    table = build(load_specs()["rivals"], [*RUNS, dense])
    assert [row[:3] for row in table.cells] == [
        ("best", "2.07", "no"), ("GGUF Q4_K (simulated)", "4.50", "yes"), ("HQQ 2 bits, group 64", "3.00", "no")
    ]  # fmt: skip
    with pytest.raises(ReportError, match="no run of a quantized model"):
        figures.rivals([dense])


def test_a_rival_of_a_teacher_that_scored_nothing_has_its_distance_all_the_same():
    run = rival("x", "hqq-2", 3.0, 0.5, 9.0)
    run["paired"]["overall"] = {"kept": None}
    left, right = figures.rivals([run]).axes
    assert not left.containers
    assert len(right.containers) == 1


def test_sizes_are_lines_over_steps_and_steps_over_sizes_the_newest_run_of_each():
    runs = [
        {"size": size, "parameters": parameters, "steps": steps, "paired": {"overall": {"kept": score(kept)}},
         "psnr": score(20 + kept)}
        for size, parameters, steps, kept in (
            ("5M", 4_900_000, 2000, 0.5), ("2M", 2_200_000, 500, 0.3), ("2M", 2_200_000, 2000, 0.9),
            ("2M", 2_200_000, 2000, 0.6),
        )
    ]  # fmt: skip
    left, right, below, _ = figures.scaling(runs).axes
    lines = [c[0] for c in left.containers]
    assert [c.get_label() for c in left.containers] == ["2M", "5M"]
    assert list(lines[0].get_xdata()) == [500, 2000]
    assert list(lines[0].get_ydata()) == pytest.approx([30, 60])
    assert [c.get_label() for c in right.containers] == ["500 steps", "2,000 steps"]
    assert list(right.containers[1][0].get_xdata()) == pytest.approx([2.2, 4.9])
    assert list(right.containers[1][0].get_ydata()) == pytest.approx([60, 50])
    assert list(below.containers[0][0].get_ydata()) == pytest.approx([20.3, 20.6])
    with pytest.raises(ReportError, match="no run holds sizes"):
        figures.scaling([])
