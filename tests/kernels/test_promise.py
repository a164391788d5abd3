from __future__ import annotations

import threading

import pytest
import torch

from tritflow.kernels import constant_weights, tuning
from tritflow.kernels.hopper import backend, why_not_compile
from tritflow.kernels.promise import weights_are_constant
from tritflow.kernels.tuning import Choice

AHEAD = {"rows": 32, "registers": 96, "digits": True, "early": True, "ahead": True}


class _Kernel:
    """In a kernel's place: keeps what it was launched with."""

    def __init__(self) -> None:
        self.launches: list[dict] = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append(options)


@pytest.fixture
def kernels(monkeypatch):
    if reason := why_not_compile():
        pytest.skip(reason)
    from tritflow.kernels.hopper import one_row, skinny

    digits, plain = _Kernel(), _Kernel()
    monkeypatch.setattr(one_row, "one_row_kernel", digits)
    monkeypatch.setattr(skinny, "w2a16_skinny_kernel", plain)
    return digits, plain


def _inputs(m=1, n=64, k=256):
    return torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(n, k // 4, dtype=torch.uint8), torch.ones(n)


def test_weights_are_read_ahead_under_the_promise_alone(kernels):
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    digits, _ = kernels
    x, weight, scale = _inputs()
    w2a16_skinny(x, weight, scale, **AHEAD)
    with constant_weights():
        w2a16_skinny(x, weight, scale, **AHEAD)
        w2a16_skinny(x, weight, scale, **AHEAD | {"early": False})
        w2a16_skinny(x, weight.t().contiguous().t(), scale, **AHEAD)  # a kernel makes them contiguous just before
    w2a16_skinny(x, weight, scale, **AHEAD)
    assert [launch["AHEAD"] for launch in digits.launches] == [False, True, False, False, False]
    assert [launch["launch_pdl"] for launch in digits.launches] == [True, True, False, True, True]


def test_what_digits_do_not_take_runs_as_without_rows(kernels):
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    digits, plain = kernels
    x, weight, scale = _inputs(m=2)
    with constant_weights():
        w2a16_skinny(x, weight, scale, **AHEAD | {"rows": 48, "registers": None})
    assert not digits.launches
    assert [(launch["ROWS"], launch["maxnreg"]) for launch in plain.launches] == [(32, 96)]


def test_the_promise_has_an_entry_of_its_own(monkeypatch):
    table = {tuning.W2A16: Choice("hopper", {"rows": 48}), tuning.W2A16_CONSTANT: Choice("hopper", AHEAD)}
    monkeypatch.setattr(tuning, "lookup", lambda device, name, m, n, k: table.get(name))
    x, weight, _ = _inputs()
    assert backend._few_rows(x, weight) == {"rows": 48}
    with constant_weights():
        assert backend._few_rows(x, weight) == AHEAD
        del table[tuning.W2A16_CONSTANT]
        assert backend._few_rows(x, weight) == {"rows": 48}
    table[tuning.W2A16] = Choice("triton", {"BLOCK_M": 16})
    assert backend._few_rows(x, weight) == {}


def test_the_promise_is_one_thread_s_and_ends():
    seen = []

    def look():
        seen.append(weights_are_constant())

    def fail():
        with constant_weights():
            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            with constant_weights():
                look()
            look()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [*seen, weights_are_constant()] == [False, True, True, False]


def test_what_was_launched_before_is_waited_for_and_a_capture_cannot_be_entered(monkeypatch):
    class Stream:
        waited = 0

        def synchronize(self):
            Stream.waited += 1

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    with constant_weights(), constant_weights():
        assert Stream.waited == 1
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        with constant_weights():  # the capture began inside
            pass
    with pytest.raises(RuntimeError, match="before the capture begins"), constant_weights():
        pass
    assert not weights_are_constant()
    with constant_weights(torch.device("cpu")):
        assert Stream.waited == 1
