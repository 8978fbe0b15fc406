"""WaitingQueue: waiting requests in order, in runs, so that a thousand requests return to the queue in one step."""

from __future__ import annotations

import heapq

from tierkv.scheduling.request import Order, Request, RequestState

__all__ = ["WaitingQueue"]

_FEW = 64


class WaitingQueue:
    """A heap of runs. A run is a list of requests, the first one last; a new request is a run of its own.

    Requests that have ended are skipped. To remove one costs nothing: it is dropped when it is first in its run, or
    when more have ended than wait.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Order, list[Request]]] = []
        self._size = 0
        self._num_ended = 0

    def push(self, request: Request) -> None:
        """Add a request at the place of its order."""
        heapq.heappush(self._heap, (request.order, [request]))
        self._size += 1

    def push_run(self, run: list[Request]) -> None:
        """Add requests that are sorted by their order. The queue owns the list from now on."""
        if run:
            self._size += len(run)
            run.reverse()
            heapq.heappush(self._heap, (run[-1].order, run))

    def take(self) -> Request | None:
        """Remove the first request that waits, and return it; None if there is none."""
        while self._heap:
            run = self._heap[0][1]
            request = run.pop()
            self._size -= 1
            if run:
                heapq.heapreplace(self._heap, (run[-1].order, run))
            else:
                heapq.heappop(self._heap)
            if request.state is RequestState.WAITING:
                return request
            self._num_ended = max(0, self._num_ended - 1)
        return None

    def note_end(self) -> None:
        """Note that a request which may be in the queue has ended."""
        self._num_ended += 1
        if self._num_ended > _FEW + self._size // 2:
            self._drop_ended()

    def _drop_ended(self) -> None:
        runs = [[each for each in run if each.state is RequestState.WAITING] for _, run in self._heap]
        self._heap = [(run[-1].order, run) for run in runs if run]
        heapq.heapify(self._heap)
        self._size = sum(map(len, runs))
        self._num_ended = 0
