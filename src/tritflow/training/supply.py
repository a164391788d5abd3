"""Fresh scenes while the transformer trains, made by the processor's idle cores: no picture is seen too often."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Executor, Future
from typing import Any

from tritflow.training.data import CHUNK, Examples, LatentSet, Mixture, encode_set, example_chunk


class Supply:
    """Keeps worker processes busy making examples, and puts what they made into a `LatentSet`.

    Args:
        pool: where examples are made.
        seed: stream of examples; those before `made` are taken.
        made: examples of this seed that `data.make_examples` has given.
        mixture: what the examples hold.
        ahead: chunks under way at any time.
    """

    def __init__(self, pool: Executor, seed: int, made: int, mixture: Mixture | None = None, ahead: int = 4) -> None:
        self.pool, self.seed, self.next, self.mixture = pool, seed, -(-made // CHUNK), mixture or Mixture()
        self.place = self.total = 0
        self.waiting: deque[Future[Examples]] = deque()
        self._order(ahead)

    def _order(self, count: int) -> None:
        for _ in range(count):
            self.waiting.append(self.pool.submit(example_chunk, (self.seed, self.next, CHUNK, self.mixture)))
            self.next += 1

    def refill(self, latents: LatentSet, vae: Any, size: int, most: int = 1) -> int:
        """Overwrite the oldest examples by at most `most` chunks that are ready; returns how many examples."""
        fresh = 0
        while self.waiting and self.waiting[0].done() and fresh < most * CHUNK:
            part = encode_set(self.waiting.popleft().result(), vae, size, latents.latents.device)
            part = part.first(len(latents.latents))
            self.place = latents.replace(self.place, part)
            fresh += len(part.latents)
            self._order(1)
        self.total += fresh
        return fresh

    def close(self) -> None:
        """Order nothing more."""
        for future in self.waiting:
            future.cancel()
        self.waiting.clear()
