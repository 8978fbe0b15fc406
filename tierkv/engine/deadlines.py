"""Deadlines: which requests have run out of time, found without a look at the others."""

from __future__ import annotations

import heapq

from tierkv.engine.generation import ModelRequest
from tierkv.scheduling.request import RequestState

__all__ = ["Deadlines"]

_FEW = 64


class Deadlines:
    """A heap of requests by deadline. Requests that have ended leave it when they are first, or are the majority."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, ModelRequest]] = []
        self._num_added = 0
        self._clean_at = _FEW

    def add(self, request: ModelRequest) -> None:
        """Add a request, if it has a deadline."""
        if request.deadline is None:
            return
        self._num_added += 1
        heapq.heappush(self._heap, (request.deadline, self._num_added, request))
        if len(self._heap) >= self._clean_at:
            self._heap = [each for each in self._heap if each[2].state is not RequestState.ENDED]
            heapq.heapify(self._heap)
            self._clean_at = 2 * len(self._heap) + _FEW

    def first(self) -> float | None:
        """Return the earliest deadline of a request that has not ended."""
        while self._heap and self._heap[0][2].state is RequestState.ENDED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def expired(self, now: float) -> list[ModelRequest]:
        """Return the requests whose deadline has come, and forget them."""
        found = []
        while (first := self.first()) is not None and first <= now:
            found.append(heapq.heappop(self._heap)[2])
        return found
