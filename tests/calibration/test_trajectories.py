import itertools

import pytest
import torch

from tritflow.calibration.trajectories import Trajectories, TrajectoryError, TrajectoryWriter

IDENTITY = {"config": "abc", "seed": 0}
COUNTS, STEPS = (3, 3, 2), 4


def shard(number: int, dtype: torch.dtype = torch.float16):
    """Every number says which trajectory and step it belongs to."""
    count, first = COUNTS[number], sum(COUNTS[:number])
    t = torch.arange(first, first + count)
    marks = (t[:, None] * 10 + torch.arange(STEPS)).to(dtype)
    steps = {
        "hidden_states": marks[..., None, None].expand(-1, -1, 5, 2),
        "velocity": -marks[..., None, None].expand(-1, -1, 5, 2),
        "timestep": marks.float() / 100,
    }
    return steps, {"pooled_projections": t[:, None].to(dtype).expand(-1, 3)}


def record(folder, numbers=range(3), finish=True):
    writer = TrajectoryWriter(folder, IDENTITY, {"device": "cpu"})
    for i in numbers:
        if not writer.has(i):
            writer.write(i, *shard(i))
    if finish:
        writer.finish(3, {"img_ids": torch.zeros(5, 3)}, {"hidden_states": torch.float32})
    return folder


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def check_pairs(batch):
    mark = batch.kwargs["hidden_states"][:, 0, 0]
    assert torch.equal(batch.velocity[:, 0, 0], -mark)
    assert torch.equal(batch.kwargs["timestep"], mark / 100)
    assert torch.equal(batch.kwargs["pooled_projections"][:, 0].float(), (mark // 10))
    assert batch.kwargs["hidden_states"].dtype == batch.velocity.dtype == torch.float32
    assert batch.kwargs["img_ids"].shape == (5, 3)
    return mark.long().tolist()


@pytest.mark.parametrize("loaded", [False, True])
def test_pairs_belong_together_and_every_pair_comes_once_an_epoch(tmp_path, loaded):
    data = Trajectories(record(tmp_path / "t"), holdout=0.25)
    if loaded:
        data.load("cpu")
    assert len(data) == 32
    assert (data.size("train"), data.size("holdout")) == (24, 8)
    seen = [m for batch in itertools.islice(data.batches(8, seed=5), 3) for m in check_pairs(batch)]
    held = check_pairs(data.pairs(torch.arange(8), "holdout"))
    assert len(set(seen)) == 24
    assert set(seen) | set(held) == {t * 10 + s for t in range(8) for s in range(STEPS)}
    assert {m // 10 for m in seen}.isdisjoint({m // 10 for m in held})


def test_batches_can_start_anywhere(tmp_path):
    data = Trajectories(record(tmp_path / "t"))
    whole = [check_pairs(b) for b in itertools.islice(data.batches(7, seed=2), 9)]
    tail = [check_pairs(b) for b in itertools.islice(data.batches(7, seed=2, start=5), 4)]
    assert whole[5:] == tail
    assert whole != [check_pairs(b) for b in itertools.islice(data.batches(7, seed=3), 9)]


def test_resumed_recording_has_the_same_bytes(tmp_path):
    whole = bytes_of(record(tmp_path / "whole"))
    record(tmp_path / "cut", numbers=[0, 2], finish=False)
    with pytest.raises(TrajectoryError, match="not finished"):
        Trajectories(tmp_path / "cut")
    assert bytes_of(record(tmp_path / "cut")) == whole


def test_refusals(tmp_path):
    folder = record(tmp_path / "t")
    with pytest.raises(TrajectoryError, match="another configuration"):
        TrajectoryWriter(folder, {"config": "other"}, {})
    writer = TrajectoryWriter(tmp_path / "u", IDENTITY, {})
    with pytest.raises(TrajectoryError, match="shard 0 is missing"):
        writer.finish(1, {}, {})
    with pytest.raises(TrajectoryError, match="velocity"):
        writer.write(0, {"hidden_states": torch.zeros(1, 1)}, {})
    with pytest.raises(TrajectoryError, match="disagree"):
        writer.write(0, {"velocity": torch.zeros(2, 1)}, {"pooled": torch.zeros(3)})
    with pytest.raises(TrajectoryError, match="no trajectories"):
        Trajectories(tmp_path / "nowhere")


def test_damage_is_found(tmp_path):
    folder = record(tmp_path / "t")
    path = folder / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(TrajectoryError, match=r"shard-00001.safetensors is missing or damaged"):
        Trajectories(folder, verify=True)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(TrajectoryError, match="cannot be read"):
        Trajectories(folder)
