"""What a forward pass costs by its number of new tokens, as measured: the side of computing in compute or load.

Not a line through the origin: a pass of few tokens costs what it costs to launch, and that is most of it on a fast GPU.
"""

from __future__ import annotations

import statistics
from collections import deque

__all__ = ["StepCosts"]

_MEMORY = 5


class StepCosts:
    """Medians of the last passes of about each size (a power of two); in between, straight lines."""

    def __init__(self) -> None:
        self._passes: dict[int, deque[tuple[int, float]]] = {}

    def add(self, num_tokens: int, seconds: float) -> None:
        """Count a pass of so many new tokens."""
        if num_tokens > 0:
            self._passes.setdefault(num_tokens.bit_length(), deque(maxlen=_MEMORY)).append((num_tokens, seconds))

    def estimate(self, num_tokens: int) -> float | None:
        """Return the seconds that a pass of so many tokens takes; None before anything is measured.

        Below the smallest size measured a pass costs what that costs; above the largest, in proportion.
        """
        points = sorted(
            (statistics.median(n for n, _ in passes), statistics.median(s for _, s in passes))
            for passes in self._passes.values()
        )
        if not points:
            return None
        if num_tokens >= points[-1][0]:
            return points[-1][1] * num_tokens / points[-1][0]
        before = points[0]
        for size, seconds in points:
            if num_tokens <= size:
                span = size - before[0]
                share = (num_tokens - before[0]) / span if span > 0 else 1.0
                return before[1] + max(share, 0.0) * (seconds - before[1])
            before = (size, seconds)
        raise AssertionError("the largest size was compared first")
