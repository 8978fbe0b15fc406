"""A thread for system calls that may never return, as a read of a disk that hangs. The caller waits a bounded time.

Python cannot end a call that the kernel does not end: the thread stays in it, with the call's arguments. If the call
returns later, the thread runs the calls that are still queued.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from tierkv.errors import ClosedError, StoreError

__all__ = ["CallThread"]

Result = TypeVar("Result")

_POLL_S = 0.1  # how often a caller asks whether it must end


class CallThread:
    """Runs calls one after another on a thread of its own, for one caller. Context manager.

    what: begins the messages. wait_s: how long the caller waits for each call.
    must_end: returns whether the caller must stop waiting; asked about ten times a second.
    """

    def __init__(self, what: str, *, wait_s: float, must_end: Callable[[], bool] = lambda: False) -> None:
        self._what = what
        self._wait_s = wait_s
        self._must_end = must_end
        self._jobs: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._is_stuck = False
        self._thread = threading.Thread(target=self._run, name="tierkv-file", daemon=True)
        self._thread.start()

    def __enter__(self) -> CallThread:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def call(self, work: Callable[[], Result], *, undo: Callable[[Result], object] | None = None) -> Result:
        """Return what a call returns, or raise what it raises.

        undo: called on the thread with a result that comes too late.
        Raises StoreError if the call takes longer than `wait_s`, and at each later call then; ClosedError if
        `must_end` returns True.
        """
        if self._is_stuck:
            raise StoreError(f"{self._what}: an earlier call has not returned")
        job = _Job(work, undo)
        self._jobs.put(job)
        deadline = time.monotonic() + self._wait_s
        try:
            while not job.is_done.wait(min(_POLL_S, max(0.0, deadline - time.monotonic()))):
                if self._must_end():
                    raise ClosedError(f"{self._what}: the cache is being closed")
                if time.monotonic() >= deadline:
                    raise StoreError(f"{self._what}: there has been no answer for {self._wait_s:g} s")
        except BaseException:
            if not job.abandon():
                self._is_stuck = True
                raise
        return job.result()

    def clean_up(self, work: Callable[[], object]) -> None:
        """Run the last call and ignore its errors. If the thread is stuck, the call runs after it returns."""
        if self._is_stuck:
            self._jobs.put(_Job(work, None))
            return
        with contextlib.suppress(Exception):
            self.call(work)

    def close(self) -> None:
        """Let the thread end after its calls. Returns at once."""
        self._jobs.put(None)

    def _run(self) -> None:
        while job := self._jobs.get():
            job.run()


class _Job(Generic[Result]):
    """One call and its result."""

    def __init__(self, work: Callable[[], Result], undo: Callable[[Result], object] | None) -> None:
        self.is_done = threading.Event()
        self._work = work
        self._undo = undo
        self._lock = threading.Lock()
        self._is_abandoned = False
        self._result: list[Result] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as exc:  # noqa: BLE001  # the caller raises it
            self._error = exc
        with self._lock:
            self.is_done.set()
            is_late = self._is_abandoned
        if is_late and self._result and self._undo:
            with contextlib.suppress(Exception):
                self._undo(self._result[0])

    def abandon(self) -> bool:
        """Leave the result to `undo`. Return whether the result came before; then the caller has it."""
        with self._lock:
            self._is_abandoned = not self.is_done.is_set()
            return not self._is_abandoned

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._result[0]
