"""Scores beside a training run: kept weights in, `curve.json` and a results run out."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from safetensors.torch import save_file

from tritflow.results import read
from tritflow.training import data, flow, models
from tritflow.training.watch import main


def test_kept_weights_become_a_curve_in_results(tmp_path: Path) -> None:
    run, results = tmp_path / "run", tmp_path / "results"
    run.mkdir()
    vae = models.build_vae()
    save_file(vae.state_dict(), run / "vae.safetensors")
    (run / "vae.json").write_text(json.dumps({"shift": 0.0, "scale": 1.0}))
    sizes = models.SmallFluxSize()
    clip, t5 = models.build_text_encoders(sizes, *data.word_tokenizers())
    state = flow.SmallFlux(clip, t5, models.build_transformer(sizes)).state_dict()
    weights = {k: v.contiguous().clone() for k, v in state.items()}
    save_file(weights, run / "flow-last.safetensors", {"steps": "7", "seconds": "1.5"})

    def stop() -> None:
        while not (run / "curve.json").exists():
            time.sleep(0.2)
        (run / "stop").touch()

    threading.Thread(target=stop, daemon=True).start()
    limits = ["--seconds", "120", "--results", str(results)]
    main([str(run), "--per-tag", "1", "--size", "32", "--workers", "1", *limits])
    (found,) = [r for p in results.glob("training-*.json") for r in read(p, "training")]
    assert found["curve"] == json.loads((run / "curve.json").read_text())
    (point,) = found["curve"]
    assert point["steps"] == 7
    assert point["seconds"] == 1.5
    assert 0 <= point["overall"] <= 1
    assert {"position", "counting"} <= set(point)


def test_a_missing_run_folder_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none")])
    assert "start the training first" in capsys.readouterr().err
