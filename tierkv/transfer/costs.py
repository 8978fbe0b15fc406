"""What work costs by its size, as measured: the two sides of compute or load.

Not lines through the origin. A pass of few tokens costs what it costs to launch, and that is most of it on a fast GPU;
a few blocks are read side by side and take as long as one.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import NamedTuple

__all__ = ["ColdLoad", "CostBySize", "LoadKind"]

_MEMORY = 5
_FORGOTTEN = 0.98


class CostBySize:
    """Medians of the last works of about each size (a power of two); in between, straight lines. Thread-safe."""

    def __init__(self) -> None:
        self._works: dict[int, deque[tuple[int, float]]] = {}
        self._beliefs: dict[int, float] = {}
        self._points: list[tuple[float, float]] | None = None

    def add(self, size: int, seconds: float) -> None:
        """Count a work of that size, such as a pass of so many new tokens."""
        if size > 0:
            self._works.setdefault(size.bit_length(), deque(maxlen=_MEMORY)).append((size, seconds))
            self._beliefs.pop(size.bit_length(), None)
            self._points = None

    def estimate(self, size: int) -> float | None:
        """Return the seconds that a work of that size takes, as far as believed; None before anything is measured.

        Below the smallest size measured it costs what that costs; above the largest, in proportion.
        """
        seconds = self._drawn(size)
        return None if seconds is None else seconds * self._beliefs.get(size.bit_length(), 1.0)

    def forget(self, size: int) -> None:
        """Believe a little less in what works of about that size take, until one is measured: it may be faster now.

        Works of other sizes say nothing about that: they may be done all the time.
        """
        self._beliefs[size.bit_length()] = _FORGOTTEN * self._beliefs.get(size.bit_length(), 1.0)

    def _drawn(self, size: int) -> float | None:
        points = self._points
        if points is None:
            works_by_size = [list(works) for works in list(self._works.values())]  # others may be adding
            points = self._points = sorted(
                (statistics.median(n for n, _ in works), statistics.median(s for _, s in works))
                for works in works_by_size
            )
        if not points:
            return None
        if size >= points[-1][0]:
            return points[-1][1] * size / points[-1][0]
        before = points[0]
        for at, seconds in points:
            if size <= at:
                span = at - before[0]
                share = (size - before[0]) / span if span > 0 else 1.0
                return before[1] + max(share, 0.0) * (seconds - before[1])
            before = (at, seconds)
        raise AssertionError("the largest size was compared first")


class LoadKind(NamedTuple):
    """in_memory: the blocks lie in the page cache. is_split: the engine computes the first of them meanwhile."""

    in_memory: bool
    is_split: bool = False


class ColdLoad(NamedTuple):
    """Cold blocks that are wanted at once, and how many tokens the pass that waits for them computes."""

    kind: LoadKind
    num_blocks: int
    num_rest: int
