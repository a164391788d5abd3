"""Replace linear layers of a model by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tritflow.modules.fake import FakeTernaryLinear
from tritflow.modules.ternary_linear import TernaryLinear


def swap_linears_(
    model: nn.Module,
    predicate: Callable[[str, nn.Linear], bool],
    make: Callable[[str, nn.Linear], nn.Module],
) -> list[str]:
    """Put `make(name, linear)` in the place of every dense `nn.Linear` that `predicate(name, linear)` accepts.

    Layers that are ternary already are left alone. A linear that is reachable by two names stays shared. Training
    mode is passed on.

    Args:
        model: changed in place; must not be a linear layer itself.
        predicate: called once a linear, with its dotted name.
        make: builds the replacement; the old layer is dropped before the next one is built.

    Returns:
        The names of what was replaced, in the model's order.

    Raises:
        ValueError: `model` is itself a linear layer, which cannot be replaced in place.
    """
    if isinstance(model, nn.Linear):
        raise ValueError("swap_linears_ replaces layers inside a model, and this model is itself one linear layer")
    swapped: list[str] = []
    done: dict[int, nn.Module] = {}
    for name, linear in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(linear, nn.Linear) or isinstance(linear, TernaryLinear | FakeTernaryLinear):
            continue
        if id(linear) not in done:
            if not predicate(name, linear):
                continue
            done[id(linear)] = make(name, linear).train(linear.training)
            swapped.append(name)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, done[id(linear)])
    return swapped
