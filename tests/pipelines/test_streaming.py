"""`quantize` block by block: what it holds in memory, where activations lie, which samples it takes."""

import dataclasses
import json

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tritflow.config import CalibrationConfig, DistillationConfig, Recipe, ReconstructionConfig, StreamingConfig
from tritflow.distillation.shelf import BudgetError
from tritflow.formats.source import FolderSource
from tritflow.pipelines import dense as module
from tritflow.pipelines.quantize import plan, quantize
from tritflow.pipelines.records import RECORDS
from tritflow.testing import tiny_flux_folder, transformer_inputs

PROMPTS = [f"{count} {color} {shape}" for count in ("one", "two") for color in ("red", "blue", "green")
           for shape in ("cube", "star")]  # fmt: skip
NOTHING = StreamingConfig(block_cache="0", activation_store="ram")
RECIPE = Recipe(
    "r",
    compensation=True,
    compensation_samples=24,
    smoothing=0.0,
    calibration=CalibrationConfig(num_inference_steps=4, batch_size=4, guidance_scales=(2.0, 3.5)),
    streaming=NOTHING,
    reconstruction=ReconstructionConfig(
        steps=4, samples=40, batch_size=8, warmup_steps=1, importance_samples=6, importance_batch=3
    ),
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny_flux_folder(tmp_path_factory.mktemp("deep") / "flux", double=3, single=3)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """Four blocks: enough for first, last and between of both kinds."""
    return tiny_flux_folder(tmp_path_factory.mktemp("four") / "flux", double=2, single=2)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "mine.txt"
    path.write_text("\n".join(PROMPTS))
    return path


def made(source, out, prompts, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return quantize(source, out, recipe, prompts=prompts, device="cpu", keep_work=True)


@pytest.fixture(scope="module")
def reference(four, prompts, tmp_path_factory):
    return made(four, tmp_path_factory.mktemp("reference") / "out", prompts)


class Counted:
    """Counts what the source gave out: parameters of block tensors that are still in memory."""

    def __init__(self, monkeypatch):
        self.refs, self.most = [], 0
        read = FolderSource.tensor

        def tensor(source, name, device="cpu"):
            found = read(source, name, device)
            if "transformer_blocks." in name:
                self.refs = [(r, n) for r, n in self.refs if not r.expired()]
                self.refs.append((StorageWeakRef(found.untyped_storage()), found.numel()))
                self.most = max(self.most, sum(n for _, n in self.refs))
            return found

        monkeypatch.setattr(FolderSource, "tensor", tensor)


@pytest.mark.parametrize("window", [1, 2])
def test_dense_parameters_in_memory_are_those_of_one_block(deep, prompts, tmp_path, monkeypatch, window):
    """Counted at the source, over recording, ranges, compensation, importance (backward), reconstruction, writing."""
    counted = Counted(monkeypatch)
    job = plan(deep, RECIPE, prompts=prompts, device="cpu")
    shapes = job.source.shapes()
    size = {
        block: sum(torch.Size(s).numel() for n, s in shapes.items() if n.startswith(f"{block}."))
        for block in job.family.block_order(job.source.config)
    }
    linear = max(n * k for n, k in job.linears.values())
    made(deep, tmp_path / "out", prompts, reconstruction=dataclasses.replace(RECIPE.reconstruction, window=window))
    # A block, and the original of the one linear that is being rounded.
    assert max(size.values()) <= counted.most <= max(size.values()) + linear
    assert sum(size.values()) > 3 * counted.most


def test_memory_does_not_grow_with_depth(prompts, tmp_path, monkeypatch):
    most = []
    for single in (1, 5):
        source = tiny_flux_folder(tmp_path / f"{single}", single=single)
        with monkeypatch.context() as patch:
            counted = Counted(patch)
            made(source, tmp_path / f"out-{single}", prompts)
            most.append(counted.most)
    assert most[0] == most[1]


@pytest.mark.parametrize(
    "streaming",
    [
        StreamingConfig(),  # blocks stay in memory once read
        StreamingConfig(block_cache="40KiB", activation_store="disk"),
    ],
)
def test_wherever_things_lie_the_bytes_are_the_same(four, prompts, tmp_path, reference, streaming):
    found = made(four, tmp_path / "out", prompts, streaming=streaming)
    assert found.digest == reference.digest
    assert (tmp_path / "out" / RECORDS).read_bytes() == (reference.transformer.parent / RECORDS).read_bytes()
    assert not any((tmp_path / "out" / ".work" / "streams").glob("*"))


@pytest.mark.parametrize(
    ("stage", "at"), [("compensate", 2), ("compensate", 4), ("reconstruct", 1), ("reconstruct", 3)]
)
def test_killed_at_a_block_it_goes_on_to_the_same_bytes(four, prompts, tmp_path, reference, stage, at):
    def kill(now, done, total):
        if now == stage and done == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(four, tmp_path / "out", RECIPE, prompts=prompts, device="cpu", on_progress=kill)
    done = "compensated" if stage == "compensate" else "reconstructed"
    blocks = list((tmp_path / "out" / ".work" / done).glob("*transformer_blocks.*.safetensors"))
    assert len(blocks) == at  # each is stored at once
    times = {path: path.stat().st_mtime_ns for path in blocks}
    report = quantize(four, tmp_path / "out", RECIPE, prompts=prompts, device="cpu", keep_work=True)
    assert report.digest == reference.digest
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())  # and not made again


def test_a_budget_takes_a_spread_of_records_and_says_which(four, prompts, tmp_path, reference):
    each = (16 // 4 + 32) * 32 * 4  # image and text tokens, fp32: 32x32 pixels are 4 tokens
    budget = 10 * 3 * each
    out = tmp_path / "out"
    limited = made(four, out, prompts, streaming=dataclasses.replace(NOTHING, activation_budget=f"{budget}"))
    assert limited.digest != reference.digest
    lines = [json.loads(line) for line in (out / RECORDS).read_text().splitlines()]
    heads = {entry["stage"]: entry for entry in lines if "asked" in entry}
    assert heads["reconstruct"]["pairs"] == {"train": 9, "holdout": 1}
    assert heads["reconstruct"]["limited"]
    assert heads["compensate"]["pairs"] == {"train": 24}  # one set of streams: 24 of 30 that would fit
    assert not heads["compensate"]["limited"]
    pairs = [e for e in lines if "asked" not in e and e["stage"] == "reconstruct" and e["split"] == "train"]
    assert len(pairs) == 9
    assert {e["step"] for e in pairs} == {0, 1, 2, 3}
    assert len({e["trajectory"] for e in pairs}) == 9
    assert {e["guidance"] for e in pairs} <= {2.0, 3.5}
    assert all(e["prompt"] == PROMPTS[e["trajectory"]] for e in pairs)
    whole = (reference.transformer.parent / RECORDS).read_text()
    assert '"limited": true' not in whole
    with pytest.raises(BudgetError, match=r"streaming\.activation_budget"):
        made(four, tmp_path / "none", prompts, streaming=dataclasses.replace(NOTHING, activation_budget="1000"))


def test_the_streamed_teacher_is_the_whole_one(four, prompts):
    job = plan(four, RECIPE, prompts=prompts, device="cpu")
    with module.streamed_teacher(job, torch.float32) as (blocks, pipe):
        assert pipe.transformer is blocks.model
        inputs = transformer_inputs(blocks.model, batch=2)
        whole = module.whole_transformer(job, torch.float32)
        with torch.no_grad():
            assert torch.equal(pipe.transformer(**inputs)[0], whole(**inputs)[0])
        assert {str(p.device) for n, p in blocks.model.named_parameters() if "blocks." in n} == {"meta"}
        assert {str(p.device) for n, p in blocks.model.named_parameters() if "blocks." not in n} == {"cpu"}


def test_distillation_behind_streamed_stages(four, prompts, tmp_path):
    distillation = DistillationConfig(steps=4, batch_size=4, warmup_steps=1)
    digests = {
        made(four, tmp_path / name, prompts, streaming=streaming, distillation=distillation).digest
        for name, streaming in (("streamed", NOTHING), ("kept", StreamingConfig()))
    }
    assert len(digests) == 1
