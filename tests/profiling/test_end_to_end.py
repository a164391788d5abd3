from __future__ import annotations

import pytest

from tritflow.profiling import end_to_end as bench


@pytest.fixture(scope="module")
def folder(tiny_flux, tmp_path_factory):
    from tritflow.pipelines.quantize import quantize

    out = tmp_path_factory.mktemp("end-to-end") / "ternary"
    quantize(tiny_flux, out, recipe="absmean")
    return out


@pytest.mark.parametrize("optimized", [False, True])
def test_parts_add_up_to_the_whole(folder, optimized):
    seen = []
    run = bench.measure(
        folder, device="cpu", mode="w2a8", optimized=optimized, rounds=2, progress=lambda *a: seen.append(a)
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert run["optimized"] is optimized
    parts = [run["first"][stage] for stage in bench.STAGES if stage != "total"]
    assert sum(parts) == pytest.approx(run["first"]["total"])
    assert min(parts) > 0
    later = run["later"]["total"]
    assert 0 < later["p20"] <= later["p50"] <= later["p80"]
    steps = run["settings"]["num_inference_steps"]
    assert run["step_milliseconds"]["p50"] * steps / 1e3 < later["p80"] * 1.5
    text = bench.table(run)
    assert ("optimized" in text) is optimized
    assert "transformer" in text


def test_the_pipeline_is_left_as_it_was(folder):
    import torch

    from tritflow.pipelines.loading import load_pipeline
    from tritflow.pipelines.optimize import optimize

    pipe = optimize(load_pipeline(folder, device="cpu"))
    forward = pipe.transformer.__dict__["forward"]
    with bench.stopwatch(pipe, torch.device("cpu")):
        assert pipe.transformer.forward is not forward
    assert pipe.transformer.__dict__["forward"] is forward
    assert "decode" not in pipe.vae.__dict__
    assert "encode_prompt" not in pipe.__dict__
    with pytest.raises(ValueError, match="at least one round"):
        bench.measure(folder, rounds=0)
