"""How long the engine takes for a step of so many tokens, for the choice between loading and computing."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from tierkv.block_store.load_or_compute import LoadOrCompute

__all__ = ["StepTimes"]

_LEAST_TOKENS = 32


class StepTimes:
    """Measures steps from their order to their output. Steps may overlap: a step begins when the one before it ends."""

    def __init__(self, costs: LoadOrCompute, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._costs = costs
        self._clock = clock
        self._started: deque[tuple[int, float, int, bool]] = deque()
        self._ended = 0.0

    def start(self, step: int, num_tokens: int, *, is_pure: bool) -> None:
        """Begin a step. is_pure: it loads nothing, so all its time is spent on computing."""
        self._started.append((step, self._clock(), num_tokens, is_pure))

    def end(self, step: int) -> None:
        """End a step. Steps before it whose end was not seen are forgotten."""
        while self._started and self._started[0][0] <= step:
            number, started, num_tokens, is_pure = self._started.popleft()
            now = self._clock()
            if number == step and is_pure and num_tokens >= _LEAST_TOKENS:
                self._costs.record_compute(num_tokens, now - max(started, self._ended))
            self._ended = now
