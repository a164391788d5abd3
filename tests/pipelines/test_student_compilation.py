"""A machine without a working compiler trains all the same, only slower, and says so."""

from __future__ import annotations

import pytest
from torch import nn
from torch._dynamo.exc import TorchDynamoException

from tritflow.distillation.velocity import DistillationResult
from tritflow.pipelines.student import _compiled

DONE = DistillationResult(1, [0.5], {0: 1.0})


class Blocks(nn.Module):
    """Stands for a diffusers model: one block, which can be compiled."""

    _repeated_blocks = ("Linear",)

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Linear(2, 2)


def test_blocks_are_compiled_while_training_alone() -> None:
    model, seen = Blocks(), []

    def train() -> DistillationResult:
        seen.append("forward" in vars(model.block))
        return DONE

    teacher = Blocks()
    assert _compiled([model, teacher], train) is DONE
    assert seen == [True]
    assert "forward" not in vars(model.block)
    assert "forward" not in vars(teacher.block)


def test_a_failing_compiler_is_told_and_done_without() -> None:
    model, seen = Blocks(), []

    def train() -> DistillationResult:
        seen.append("forward" in vars(model.block))
        if seen == [True]:
            raise TorchDynamoException("no C compiler\nand much more")
        return DONE

    with pytest.warns(UserWarning, match=r"train slower \(no C compiler\)"):
        assert _compiled([model], train) is DONE
    assert seen == [True, False]


def test_other_errors_are_not_swallowed() -> None:
    def train() -> DistillationResult:
        raise ValueError("the loss is nan")

    model = Blocks()
    with pytest.raises(ValueError, match="nan"):
        _compiled([model], train)
    assert model.block._compiled_call_impl is None
