"""A thread for calls of the system that may never return, as reads of a disk that hangs: each is waited for so long.

Python cannot end a call that the kernel does not: the thread stays behind in it, with what it works on, and what is
left to do is done if it ever returns.
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

_LOOK_S = 0.1  # how often a caller looks whether it must end


class CallThread:
    """Runs calls one after another on a thread of its own, for one caller. Context manager.

    what: begins the messages. wait_s: how long the caller waits for each call.
    must_end: tells that the caller shall wait no longer; asked about ten times a second.
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
        Raises StoreError if it takes longer than `wait_s`, and for each later call then; ClosedError for `must_end`.
        """
        if self._is_stuck:
            raise StoreError(f"{self._what}: an earlier call has not returned")
        job = _Job(work, undo)
        self._jobs.put(job)
        deadline = time.monotonic() + self._wait_s
        try:
            while not job.is_done.wait(min(_LOOK_S, max(0.0, deadline - time.monotonic()))):
                if self._must_end():
                    raise ClosedError(f"{self._what}: the cache is being closed")
                if time.monotonic() >= deadline:
                    raise StoreError(f"{self._what}: there has been no answer for {self._wait_s:g} s")
        except BaseException:
            if not job.give_up():
                self._is_stuck = True
                raise
        return job.result()

    def clean_up(self, work: Callable[[], object]) -> None:
        """Run the last call, whose errors do not matter; where the thread is stuck, not before it returns."""
        if self._is_stuck:
            self._jobs.put(_Job(work, None))
            return
        with contextlib.suppress(Exception):
            self.call(work)

    def close(self) -> None:
        """Let the thread end after its calls. Waits for nothing."""
        self._jobs.put(None)

    def _run(self) -> None:
        while job := self._jobs.get():
            job.run()


class _Job(Generic[Result]):
    """One call and what came of it."""

    def __init__(self, work: Callable[[], Result], undo: Callable[[Result], object] | None) -> None:
        self.is_done = threading.Event()
        self._work = work
        self._undo = undo
        self._lock = threading.Lock()
        self._is_given_up = False
        self._result: list[Result] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result.append(self._work())
        except BaseException as exc:  # noqa: BLE001  # the caller raises it
            self._error = exc
        with self._lock:
            self.is_done.set()
            is_late = self._is_given_up
        if is_late and self._result and self._undo:
            with contextlib.suppress(Exception):
                self._undo(self._result[0])

    def give_up(self) -> bool:
        """Leave the result to `undo`; return whether it was there already."""
        with self._lock:
            self._is_given_up = not self.is_done.is_set()
            return not self._is_given_up

    def result(self) -> Result:
        if self._error is not None:
            raise self._error
        return self._result[0]
