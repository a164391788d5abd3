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


def _measured(device="NVIDIA H200"):
    dense = [("nvjet_a", 80.0), ("cudnn_sdpa_x", 25.0), ("triton_poi_fused", 5.0)]
    ternary = [("w2a8_kernel", 30.0), ("expand_words_kernel", 5.0), ("cudnn_sdpa_x", 20.0), ("gelu_kernel", 4.0)]

    def contender(kernels, p50, rest):
        listed = [{"name": name, "calls": 1, "milliseconds": ms} for name, ms in kernels]
        total = sum(ms for _, ms in kernels) + rest
        return {"kernels": listed, "kernel_milliseconds": total, "milliseconds": {"p50": p50}}

    return {
        "device": device,
        "settings": {"size": 1024, "batch": 1},
        "contenders": {
            "bf16 compiled": contender(dense, 120.0, 5.0),
            "W2A8 fp8 optimized, scratch": contender(ternary, 66.0, 6.0),
            "W2A8 int8 optimized, triton": contender(ternary, 90.0, 30.0),
            "W2A8 int8 stock": contender(ternary, 1.0, 0.0),
        },
    }


def test_shares_are_read_out_of_a_measured_run():
    run = _measured()
    assert roofline.fastest(run) == "W2A8 fp8 optimized, scratch"
    assert roofline.parts(run["contenders"]["W2A8 fp8 optimized, scratch"]) == {
        "products": 35.0,
        "attention": 20.0,
        "between": 10.0,
    }
    found, step, gpu = roofline.reached_by(run, roofline.GPUS["H200"]), roofline.work(), roofline.GPUS["H200"]
    assert found.bf16 == pytest.approx(step.products / (gpu.bf16 * 80e-3))
    again = roofline.predict(gpu, step, found)  # a measured GPU is predicted as it was measured
    assert (again["products"], again["attention"], again["between"]) == pytest.approx((35.0, 20.0, 10.0))


def test_a_prediction_is_told_beside_the_measurement():
    run = roofline.run(measured=_measured())
    assert run["check"]["gpu"] == "H200"
    assert run["check"]["parts"]["w2a8"]["measured"] == 66.0
    expected = roofline.predict(roofline.GPUS["H200"], roofline.work())["w2a8"]
    assert run["check"]["parts"]["w2a8"]["expected"] == pytest.approx(expected, abs=1e-3)
    assert "expected of H200" in roofline.table(run)
    assert run["expected"] != run["reached"]


def test_a_run_that_cannot_serve_is_refused():
    with pytest.raises(ValueError, match="no datasheet of NVIDIA T4"):
        roofline.run(measured=_measured("NVIDIA T4"))
    run = _measured()
    del run["contenders"]["bf16 compiled"]
    with pytest.raises(ValueError, match="bf16 compiled"):
        roofline.run(measured=run)
    run = _measured()
    for name in ("W2A8 fp8 optimized, scratch", "W2A8 int8 optimized, triton"):
        run["contenders"][name]["kernels"] = []
    with pytest.raises(ValueError, match="no optimized W2A8 contender"):
        roofline.run(measured=run)
    with pytest.raises(ValueError, match="no list of kernels"):
        roofline.parts({"milliseconds": {"p50": 1.0}})


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA T4", None),
    ],
)
def test_devices_by_the_name_that_pytorch_gives(device, name):
    assert roofline.known(device) == name
