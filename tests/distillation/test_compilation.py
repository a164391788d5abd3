import torch
from torch import nn

from tritflow.distillation.compilation import compile_blocks_, uncompile_
from tritflow.testing import tiny_flux_transformer, transformer_inputs


def test_hooks_run_outside_of_what_is_compiled():
    model, calls = tiny_flux_transformer(double=2, single=2), []
    inputs = transformer_inputs(model, batch=2)
    expected = model(**inputs)[0]
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    for block in blocks:
        # A hook of this kind could not be compiled with fullgraph=True.
        block.register_forward_pre_hook(lambda module, args: calls.append(torch._C._current_graph_task_id()))
    compile_blocks_(model, backend="eager")
    assert torch.equal(model(**inputs)[0], expected)
    assert calls == [-1] * 4
    assert all("forward" in vars(block) for block in blocks)
    uncompile_(model)
    assert not any("forward" in vars(block) for block in blocks)
    assert torch.equal(model(**inputs)[0], expected)


def test_only_repeated_blocks_are_compiled():
    model = tiny_flux_transformer(double=1, single=1)
    compile_blocks_(model, backend="eager")
    compiled = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
    assert compiled == set(model._repeated_blocks)
    assert isinstance(model.transformer_blocks[0], nn.Module)
