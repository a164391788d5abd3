"""Words of the captions are found once a session: looking through 20,000 captions takes seconds."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from tritflow.training import data


@pytest.fixture(scope="session", autouse=True)
def words_are_found_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "training_words", functools.cache(data.training_words))
        yield
