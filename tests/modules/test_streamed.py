"""Blocks whose weights come when they run: the same numbers, one block at a time."""

import copy

import pytest
import torch
import torch.multiprocessing.reductions
from torch import nn

from tritflow.modules.streamed import StreamedBlocks


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("shift", torch.randn(width))

    def forward(self, x, gain=None):
        return torch.tanh(self.linear(x)) + self.shift + (0 if gain is None else gain)


class Model(nn.Module):
    def __init__(self, depth=5):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 3)

    def forward(self, x, gain=None):
        for block in self.blocks:
            x = block(x, gain=gain)
        return self.head(x)


NAMES = [f"blocks.{i}" for i in range(5)]
SIZE = 8 * 8 + 8 + 8


@pytest.fixture
def model():
    return Model().requires_grad_(False)


def streamed(model, **kwargs):
    state = {name: t.clone() for name, t in model.state_dict().items()}
    return StreamedBlocks(copy.deepcopy(model), NAMES, lambda name: state[name].clone(), **kwargs)


def empty(block):
    return all(t.is_meta for t in block.state_dict().values())


def test_forward_and_backward_are_the_same_with_one_block_in_memory(model):
    s = streamed(model)
    assert all(empty(b) for b in s.model.blocks)
    x, gain = torch.randn(4, 8), torch.randn(8)
    with torch.no_grad():
        assert torch.equal(s.model(x, gain), model(x, gain))
    found = []
    for m in (model, s.model):
        leaf, other = x.clone().requires_grad_(), gain.clone().requires_grad_()
        m(leaf, gain=other).square().sum().backward()
        found.append((leaf.grad, other.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert s.peak == SIZE
    assert all(empty(b) for b in s.model.blocks)


def test_weights_are_freed_not_only_hidden(model):
    """Storages that `read` handed out are gone when the next block is read, in backward too."""
    state = {name: t.clone() for name, t in model.state_dict().items()}
    given, most = [], 0

    def read(name):
        nonlocal most
        tensor = state[name].clone()
        given.append(torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage()))
        most = max(most, sum(not ref.expired() for ref in given))
        return tensor

    s = StreamedBlocks(copy.deepcopy(model), NAMES, read)
    x = torch.randn(4, 8, requires_grad=True)
    s.model(x).sum().backward()
    assert len(given) == 2 * 3 * len(NAMES)  # three tensors a block, forward and backward
    assert most == 3


def test_holding_copying_and_keeping(model):
    s = streamed(model, keep_bytes=2 * SIZE * 4)
    with s.loaded("blocks.3") as one, s.loaded("blocks.3") as same:
        assert one is same
        assert torch.equal(one.linear.weight, model.blocks[3].linear.weight)
    assert not empty(s.model.blocks[3])  # within the budget it stays
    for name in NAMES:
        with s.loaded(name):
            pass
    assert [empty(b) for b in s.model.blocks] == [False, True, True, False, True]
    assert s.peak == 3 * SIZE
    for name in ("blocks.0", "blocks.1"):
        mine = s.copy(name)
        reference = model.get_submodule(name)
        with torch.no_grad():
            mine.linear.weight.mul_(2)
            x = torch.randn(2, 8)
            assert not torch.equal(mine(x), reference(x))
            assert torch.equal(s.model.get_submodule(name)(x), reference(x))


def test_another_dtype_and_a_model_that_is_whole(model):
    s = streamed(model, dtype=torch.float64)
    assert {t.dtype for t in s.model.blocks.state_dict().values()} == {torch.float64}
    with s.loaded("blocks.0") as block:
        assert {t.dtype for t in block.state_dict().values()} == {torch.float64}
    before = copy.deepcopy(model)
    whole = StreamedBlocks.in_memory(model, NAMES)
    x = torch.randn(2, 8)
    assert torch.equal(model(x), before(x))
    whole.close()
    assert all("forward" not in b.__dict__ and not empty(b) for b in model.blocks)


def test_what_no_checkpoint_holds_is_refused(model):
    model.blocks[1].register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(ValueError, match=r"blocks\.1\.table"):
        StreamedBlocks(model, NAMES, lambda name: torch.zeros(()))
