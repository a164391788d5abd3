"""The scorers' bench on tiny models, and its real architectures as far as a CPU builds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_scorers
import torch
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.evaluation import throughput
from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers import dpt_depth, llava_judge, mask2former
from tritflow.report.tables import build, load_specs, markdown
from tritflow.results import read


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    monkeypatch.setattr(dpt_depth, "SIDE", 64)
    monkeypatch.setattr(llava_judge, "DESCRIPTION_TOKENS", 3)

    def of(name: str, kind: str):  # type: ignore[no-untyped-def]
        import transformers

        folder = getattr(tiny_scorers, name)(tmp_path / name)
        tokenizer = (
            transformers.AutoTokenizer.from_pretrained(folder) if name in ("clip", "blip", "owlv2", "llava") else None
        )
        return lambda: (getattr(transformers, kind).from_pretrained(folder), tokenizer)

    made = {
        "mask2former": of("mask2former", "Mask2FormerForUniversalSegmentation"),
        "clip colors": of("clip", "CLIPModel"),
        "blip-vqa": of("blip", "BlipForQuestionAnswering"),
        "owlv2": of("owlv2", "Owlv2ForObjectDetection"),
        "dpt": of("dpt", "DPTForDepthEstimation"),
        "llava judge": of("llava", "LlavaForConditionalGeneration"),
    }
    monkeypatch.setattr(throughput, "MAKE", made)


@pytest.mark.usefixtures("tiny")
def test_every_scorer_is_timed(tmp_path: Path) -> None:
    arguments = ["bench", "scorers", "--pictures", "6", "--size", "64", "--batch-size", "4"]
    done = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.output
    runs = json.loads(done.stdout)
    assert [r["label"] for r in runs] == list(throughput.MAKE)
    assert all(v > 0 for r in runs for v in r["per_second"].values())
    assert set(runs[0]["per_second"]) == {"overlapped", "without_reading", "reading_alone"}
    assert {r["dtype"] for r in runs} == {"float32"}
    kept = read(next(tmp_path.glob("scorers-*.json")), "scorers")
    assert [(r["label"], r["size"]) for r in kept] == [(r["label"], 64) for r in runs]
    text = markdown(build(load_specs()["scorers"], kept))
    assert text.count("| mask2former |") == 1
    assert "random weights" in text
    words = CliRunner().invoke(app, [*arguments, "--scorer", "dpt"])
    assert words.exit_code == 0, words.output
    assert "dpt" in words.stdout
    assert "pictures a second while PNGs are read" in words.stdout


def test_unknown_scorers_are_refused() -> None:
    with pytest.raises(EvaluationError, match="no scorer 'owl'"):
        next(throughput.measure(["owl"]))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("mask2former", 69), ("clip colors", 428), ("blip-vqa", 361), ("owlv2", 155), ("dpt", 123), ("llava judge", 7063)],
)
def test_the_architectures_are_of_the_real_size(name: str, millions: int) -> None:
    with torch.device("meta"):
        model, _ = throughput.MAKE[name]()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.03)
