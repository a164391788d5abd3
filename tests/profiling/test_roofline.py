from __future__ import annotations

import pytest

from tritflow.profiling import roofline


def test_work_of_flux_1_dev_is_what_is_known():
    step = roofline.work()
    assert step.products == pytest.approx(59.5, abs=0.05)  # TFLOP, counted independently in the project's facts
    assert step.attention == pytest.approx(14.9, abs=0.05)
    assert step.latents == 4608
    assert step.modulation == pytest.approx(3.23 * 2, abs=0.01)
    double = roofline.work(batch=2)
    assert double.products == pytest.approx(2 * step.products)
    assert double.attention == pytest.approx(2 * step.attention)
    assert double.modulation == step.modulation
    assert roofline.work(size=2048).attention > 10 * step.attention


def test_predictions_follow_the_datasheet():
    step = roofline.work()
    gpu = roofline.Gpu(1000, 2000, 4000, 80)
    reached = roofline.Reached(bf16=0.5, int8=0.5, attention=0.5, bandwidth=0.5)
    found = roofline.predict(gpu, step, reached)
    assert found["products"] == pytest.approx(step.products)  # 1000 TOP/s reached: a ms a TFLOP
    assert found["attention"] == pytest.approx(2 * step.attention)
    assert found["between"] == pytest.approx(step.fused / 2)
    assert found["w2a8"] == pytest.approx(found["products"] + found["attention"] + found["between"])
    assert found["speed"] == pytest.approx(found["bf16"] / found["w2a8"])
    slow = roofline.predict(roofline.Gpu(500, 1000, 4000, 80), step, reached)
    assert slow["products"] == pytest.approx(2 * found["products"])
    assert slow["between"] == found["between"]


def test_every_gpu_is_predicted():
    found = roofline.predictions()
    assert set(found) == set(roofline.GPUS)
    assert not found["A10"]["bf16 fits"]
    assert found["B200"]["w2a8"] < found["H200"]["w2a8"] < found["L20"]["w2a8"]


def test_a_run_says_that_nothing_was_measured(tmp_path):
    from tritflow import results

    run = roofline.run()
    entry = results.append(tmp_path / "roofline.json", "roofline", run)
    assert entry["measured"] is False
    text = roofline.table(run)
    assert text.startswith("PREDICTED")
    assert text.count("bf16 does not fit") == 4
