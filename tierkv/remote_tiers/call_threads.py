"""CallThreads: runs calls that may never return, such as a read of a network disk, and waits a bounded time for each.

A call that is late keeps its thread. Its result goes to `undo` when it comes, and the thread serves the next call then.
A call must write only into memory of its own: the memory of a caller that no longer waits has another use.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from tierkv.errors import RemoteError

__all__ = ["CallThreads"]

Result = TypeVar("Result")


class CallThreads:
    """At most `most` threads, started when they are needed. Thread-safe."""

    def __init__(self, most: int, *, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._num_threads = 0
        self._num_busy = 0
        self._is_closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()

    @property
    def num_busy(self) -> int:
        """Calls that have not returned."""
        return self._num_busy

    def call(
        self,
        work: Callable[[], Result],
        *,
        left_s: Callable[[], float],
        undo: Callable[[Result], object] | None = None,
    ) -> Result:
        """Return what a call returns, or raise what it raises.

        left_s: returns how long to wait, also while the call waits, and raises RemoteError once that is over. undo:
        called with a result that comes too late. Raises RemoteError at once where all threads are busy.
        """
        result: Result = _wait(self._start(work, undo), left_s)
        return result

    def call_all(self, works: Sequence[Callable[[], Result]], *, left_s: Callable[[], float]) -> list[Result]:
        """Return what several calls return that run at the same time. Raises as `call`, for the first that fails."""
        jobs = [self._start(work, None) for work in works]
        return [_wait(job, left_s) for job in jobs]

    def close(self) -> None:
        """Let all threads end, those that hang when their calls return. Returns at once; may be called twice."""
        with self._lock:
            self._is_closed = True
            for _ in range(self._num_threads):
                self._jobs.put(None)
            self._num_threads = 0

    def _start(self, work: Callable[[], Result], undo: Callable[[Result], object] | None) -> _Job:
        job = _Job(work, undo)
        with self._lock:
            if self._is_closed or self._num_busy >= self._most:
                raise RemoteError("the remote tier is closed" if self._is_closed else "earlier calls have not returned")
            self._num_busy += 1
            if self._num_busy > self._num_threads:
                self._num_threads += 1
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        while job := self._jobs.get():
            job.run(self._end_call)
            del job  # it refers to its arguments, and the next call may come late

    def _end_call(self) -> None:
        with self._lock:
            self._num_busy -= 1


def _wait(job: _Job, left_s: Callable[[], float]) -> Any:
    """Return a call's result, or leave it to `undo`."""
    try:
        while not job.is_done.wait(left_s()):
            pass
    except RemoteError:
        if job.abandon():
            raise
    return job.result.result()


class _Job:
    """One call and its result."""

    def __init__(self, work: Callable[[], Any], undo: Callable[[Any], object] | None) -> None:
        self.is_done = threading.Event()
        self.result: Future[Any] = Future()
        self._work = work
        self._undo = undo
        self._lock = threading.Lock()
        self._is_abandoned = False

    def run(self, end: Callable[[], None]) -> None:
        try:
            self.result.set_result(self._work())
        except BaseException as exc:  # noqa: BLE001 - the caller raises it
            self.result.set_exception(exc)
        end()  # before the caller goes on: its next call finds this thread free
        with self._lock:
            self.is_done.set()
        if self._is_abandoned and self._undo and self.result.exception() is None:
            with contextlib.suppress(Exception):
                self._undo(self.result.result())

    def abandon(self) -> bool:
        """Leave the result to `undo`. Return False where the result came before."""
        with self._lock:
            self._is_abandoned = not self.is_done.is_set()
            return self._is_abandoned
