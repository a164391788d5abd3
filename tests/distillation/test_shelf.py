import errno
import os
from pathlib import Path

import pytest
import torch

from tritflow.config import ConfigError, StreamingConfig
from tritflow.distillation.shelf import BudgetError, Room, Shelf, spread
from tritflow.formats.errors import DiskFullError

MIB = 1 << 20


def test_a_budget_leaves_out_samples_and_says_so():
    shelf = Shelf(budget=100 * MIB)
    assert shelf.room(18, 2, MIB, 5) == Room(18, 2, False)
    assert shelf.room(512, 32, MIB, 5) == Room(18, 2, True)
    assert shelf.room(512, 0, MIB, 1) == Room(100, 0, True)
    assert Shelf().room(10**6, 32, MIB, 5) == Room(10**6, 32, False)
    with pytest.raises(BudgetError, match="at least 120MiB"):
        shelf.room(512, 32, 60 * MIB, 1)
    assert Shelf(budget=120 * MIB).room(512, 32, 60 * MIB, 1) == Room(1, 1, True)


@pytest.mark.parametrize(("trajectories", "steps", "samples"), [(61, 28, 62), (64, 28, 40), (7, 4, 20), (5, 50, 40)])
def test_few_samples_are_spread_over_trajectories_and_steps(trajectories, steps, samples):
    chosen = spread(trajectories, steps, samples, limited=True)
    assert bool((chosen.diff() > 0).all())
    assert int(chosen[0]) >= 0
    assert int(chosen[-1]) < trajectories * steps
    assert len(chosen) >= 0.9 * samples
    taken = torch.bincount((chosen % steps) * 4 // steps, minlength=4)
    assert int(taken.min()) >= len(chosen) // 4 - 2  # each quarter of the noise levels
    assert len((chosen // steps).unique()) == min(trajectories, samples)


def test_an_even_stride_may_see_two_steps_only():
    """Why a limited choice is not even: this is what a stride just short of a trajectory's length sees."""
    assert set((spread(61, 28, 62) % 28).tolist()) == {0, 27}
    assert len(set((spread(61, 28, 62, limited=True) % 28).tolist())) > 20


def test_all_of_what_is_there_is_the_same_either_way():
    assert torch.equal(spread(3, 4, 12, limited=True), torch.arange(12))
    assert torch.equal(spread(3, 4, 50), torch.arange(12))


def test_on_disk_a_tensor_is_a_file_without_a_name(tmp_path):
    shelf = Shelf(store="disk", folder=tmp_path / "streams")
    tensor = shelf.empty((5, 3, 2), torch.bfloat16, torch.device("cpu"))
    values = torch.randn(5, 3, 2).bfloat16()
    tensor[1:3] = values[1:3]
    tensor[torch.tensor([0, 3, 4])] = values[[0, 3, 4]]
    assert torch.equal(tensor, values)
    assert list((tmp_path / "streams").iterdir()) == []
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path / "streams") in maps.read_text()


def test_a_full_disk_is_one_line_not_a_dead_process(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    shelf = Shelf(store="disk", folder=tmp_path)
    with pytest.raises(DiskFullError, match="run the same command again"):
        shelf.empty((5,), torch.float32, torch.device("cpu"))
    assert list(tmp_path.iterdir()) == []


def test_settings():
    config = StreamingConfig(activation_budget="1.5GiB", block_cache="0")
    assert (config.budget_bytes, config.cache_bytes) == (3 << 29, 0)
    for bad in ({"activation_budget": "much"}, {"activation_budget": "0"}, {"block_cache": 3}):
        with pytest.raises(ConfigError, match=r"write for example|is a text"):
            StreamingConfig(**bad)
    with pytest.raises(ConfigError, match="ram"):
        StreamingConfig(activation_store="ramm")
