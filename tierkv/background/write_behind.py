"""A bounded queue and one thread for work that must not delay a request."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

__all__ = ["WriteBehind"]

_POLL_S = 0.1

_log = logging.getLogger(__name__)
Job = TypeVar("Job")


class WriteBehind(Generic[Job]):
    """Calls `process` with batches of at most `batch_size` jobs, in order, on a thread of its own.

    `process` must release what its jobs hold, also when it fails. Its exceptions are logged; the next batch follows.
    """

    def __init__(
        self,
        process: Callable[[list[Job]], None],
        *,
        capacity: int,
        batch_size: int,
        name: str = "tierkv-write",
    ) -> None:
        self.capacity = capacity
        self._process = process
        self._batch_size = batch_size
        self._jobs: deque[Job] = deque()
        self._num_in_work = 0
        self._started_at = 0.0  # of the batch in work
        self._is_closing = False
        self._is_abandoned = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Jobs queued or in work."""
        with self._changed:
            return len(self._jobs) + self._num_in_work

    def try_put(self, job: Job) -> bool:
        """Queue a job. Return False, without the job, if the queue is full or closing."""
        with self._changed:
            if self._is_closing or len(self._jobs) >= self.capacity:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
            return True

    @property
    def stalled_s(self) -> float:
        """Seconds since the batch in work began; 0 without one."""
        with self._changed:
            return time.monotonic() - self._started_at if self._num_in_work else 0.0

    def queued(self) -> list[Job]:
        """Return the jobs that are not in work yet, oldest first."""
        with self._changed:
            return list(self._jobs)

    def drop_oldest(self, count: int, may_drop: Callable[[Job], bool]) -> list[Job]:
        """Remove up to `count` of the oldest queued jobs; the caller releases what they hold."""
        dropped: list[Job] = []
        with self._changed:
            kept: list[Job] = []
            while self._jobs and len(dropped) < count:
                job = self._jobs.popleft()
                (dropped if may_drop(job) else kept).append(job)
            self._jobs.extendleft(reversed(kept))
            self._changed.notify_all()
        return dropped

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Queue jobs of the batch in work again, in front of all others. Only `process` calls this."""
        with self._changed:
            self._jobs.extendleft(reversed(jobs))
            self._num_in_work -= len(jobs)
            self._changed.notify_all()

    def flush(self, *, stall_s: float = math.inf) -> bool:
        """Wait until all queued jobs have been processed, or `close` has abandoned them; then return True.

        Return False if one batch takes longer than `stall_s`.
        """
        with self._changed:
            while not self._changed.wait_for(
                lambda: (not self._jobs and not self._num_in_work) or self._is_abandoned,
                timeout=None if stall_s == math.inf else min(stall_s, _POLL_S),
            ):
                if self._num_in_work and time.monotonic() - self._started_at > stall_s:
                    return False
            return True

    def close(self, *, stall_s: float = math.inf) -> list[Job]:
        """Process the queued jobs, then stop the thread. May be called twice.

        If one batch takes longer than `stall_s`, the jobs after it are returned instead, and the thread stays in that
        batch: see `is_running`.
        """
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        while self._thread.is_alive():
            self._thread.join(min(_POLL_S, stall_s))
            if self.stalled_s > stall_s:
                with self._changed:
                    left = list(self._jobs)
                    self._jobs.clear()
                    self._is_abandoned = True
                    self._changed.notify_all()
                return left
        return []

    @property
    def is_running(self) -> bool:
        """Whether the thread may still use what its jobs hold."""
        return self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._is_closing)
                batch = [self._jobs.popleft() for _ in range(min(self._batch_size, len(self._jobs)))]
                self._num_in_work = len(batch)
                self._started_at = time.monotonic()
            if not batch:
                return
            try:
                self._process(batch)
            except Exception:  # noqa: BLE001 - the outermost loop of its thread
                _log.exception("writing %d blocks to lower tiers failed", len(batch))
            finally:
                with self._changed:
                    self._num_in_work = 0
                    self._changed.notify_all()
