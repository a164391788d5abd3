"""The Hopper attention kernel compiles without a GPU, and its machine code keeps what the design rests on."""

import pytest

from tritflow.kernels.hopper import why_not_compile

reason = why_not_compile()
compiles = pytest.mark.skipif(reason is not None, reason=str(reason))

CONFIGS = [{}, {"ahead": False}, {"consumers": 3, "keys": 64}, {"consumers": 3, "keys": 64, "ahead": False}]


def _check(compiled):
    assert compiled.spills == 0
    assert compiled.stack == 0
    assert not [note for note in compiled.notes if "serialized" in note]
    assert compiled.shared <= 227 * 1024


@compiles
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("config", CONFIGS)
def test_products_are_asynchronous_and_nothing_spills(config, kind):
    from tritflow.kernels.hopper.aot import compile_attention, in_flight_overwrites
    from tritflow.kernels.hopper.attention_launch import AttentionConfig

    compiled = compile_attention(AttentionConfig(**config), dtype=kind)
    _check(compiled)
    # Products in flight read weights from registers.
    assert in_flight_overwrites(compiled.sass) == []
    settings = AttentionConfig(**config)
    # A product is four slices of 32 of what is summed, two for weights of 64 keys. Queries with keys before the loop,
    # twice in it and, for an even number of tiles, once behind it; weights with values as often.
    logits, values = settings.consumers * 4 * 4, settings.consumers * settings.keys // 32 * 4
    if kind == "int8":
        assert (compiled.count("IGMMA"), compiled.count("QGMMA")) == (logits, values)
    else:
        assert compiled.count("QGMMA") == logits + values


@compiles
@pytest.mark.parametrize("tokens", [1, 129, 300])
def test_any_number_of_tokens_compiles(tokens):
    from tritflow.kernels.hopper.aot import compile_attention
    from tritflow.kernels.hopper.attention_launch import AttentionConfig

    _check(compile_attention(AttentionConfig(), tokens=tokens, features=64, x_dtype="fp32"))
