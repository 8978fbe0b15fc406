"""A bounded queue and one thread: work that must not stand in a request's way."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["WriteBehind"]

_log = logging.getLogger(__name__)
Job = TypeVar("Job")


class WriteBehind(Generic[Job]):
    """Hands jobs to `process` in batches of at most `batch_size`, in order, on a thread of its own.

    `process` must release whatever its jobs hold, also when it fails; an exception that escapes it is logged
    and the next batch follows.
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
        self._in_work = 0
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Jobs queued or in work."""
        with self._changed:
            return len(self._jobs) + self._in_work

    def offer(self, job: Job) -> bool:
        """Queue a job. False if the queue is full or closing: the job is not taken."""
        with self._changed:
            if self._is_closing or len(self._jobs) >= self.capacity:
                return False
            self._jobs.append(job)
            self._changed.notify_all()
            return True

    def flush(self) -> None:
        """Wait until every job offered so far has been processed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._jobs and not self._in_work)

    def close(self) -> None:
        """Process what is queued, then stop the thread. May be called twice."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._jobs) or self._is_closing)
                batch = [self._jobs.popleft() for _ in range(min(self._batch_size, len(self._jobs)))]
                self._in_work = len(batch)
            if not batch:
                return
            try:
                self._process(batch)
            except Exception:  # noqa: BLE001 - the outermost loop of its thread
                _log.exception("writing %d blocks to lower tiers failed", len(batch))
            finally:
                with self._changed:
                    self._in_work = 0
                    self._changed.notify_all()
