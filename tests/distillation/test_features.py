"""Hidden states as a further loss: taps stand around blocks, and go again without a trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tritflow.distillation.features import distance, tapped, with_features
from tritflow.distillation.losses import plain

NAMES = ("text_blocks.0", "blocks.0", "blocks.1")


class Pair(nn.Module):
    """Returns two streams, as a double block does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(x), other * 2


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.text_blocks = nn.ModuleList([Pair()])
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.text_blocks[0](x, other=x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def test_taps_see_what_blocks_return_and_leave_the_model_as_it_was(x: Tensor) -> None:
    model = Model(0)
    names, blocks = list(model.state_dict()), [model.get_submodule(n) for n in NAMES]
    before = model(x)
    with tapped(model, NAMES) as seen:
        assert torch.equal(model(x), before)
        assert list(seen) == list(NAMES)
        assert torch.equal(model.out(seen["blocks.1"][0]), before)
        assert torch.equal(seen["text_blocks.0"][1], 2 * x)

    def fail() -> None:
        with tapped(model, NAMES):
            model(x[..., :2])

    with pytest.raises(RuntimeError, match="shapes"):
        fail()
    assert list(model.state_dict()) == names
    assert [model.get_submodule(n) for n in NAMES] == blocks


def test_distance_is_in_the_teachers_own_units(x: Tensor) -> None:
    scale = torch.tensor([1.0, 100.0, 0.01, 1.0])
    teacher = {"a": (x * scale + 7,), "b": (x, x)}
    assert float(distance(teacher, teacher)) == 0
    mean = {n: tuple(t.mean((0, 1), keepdim=True).expand_as(t) for t in ts) for n, ts in teacher.items()}
    assert float(distance(mean, teacher)) == pytest.approx(1, rel=0.01)
    half = {**teacher, "a": mean["a"]}
    assert float(distance(half, teacher)) == pytest.approx(1 / 3, rel=0.01)


def test_every_block_is_told_what_it_should_have_given(x: Tensor) -> None:
    student, teacher = Model(0), Model(1)
    with tapped(student, NAMES) as seen, tapped(teacher, NAMES) as wanted:
        measure = with_features(plain, seen, wanted, 0.5)
        with torch.no_grad():
            target = teacher(x)
        predicted = student(x)
        loss = measure(predicted, target, {})
        assert float(loss) == pytest.approx(float(plain(predicted, target, {}) + 0.5 * distance(seen, wanted)))
        loss.backward()
        gradients = [student.get_parameter(f"blocks.{i}.block.weight").grad for i in (0, 1)]
        assert all(g is not None and float(g.abs().sum()) > 0 for g in gradients)
        assert teacher.get_parameter("blocks.0.block.weight").grad is None


def test_compiled_blocks_are_seen_too(x: Tensor) -> None:
    model = Model(0)
    with tapped(model, NAMES) as seen:
        for module in model.modules():
            if isinstance(module, Pair):
                module.compile(backend="eager", fullgraph=True)
        model(x)
        assert torch.equal(seen["text_blocks.0"][1], 2 * x)
    assert model.text_blocks[0]._compiled_call_impl is not None
