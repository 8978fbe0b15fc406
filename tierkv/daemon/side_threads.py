"""SideThreads: threads for calls that may hang, such as those on a network disk that does not answer."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

__all__ = ["SideThreads", "result_of"]

Result = TypeVar("Result")


async def result_of(call: Future[Result], *, timeout_s: float | None) -> Result:
    """Wait for a call on the loop and return its result. Raises TimeoutError; then the call continues."""
    waiting = asyncio.wrap_future(call)
    await asyncio.wait({waiting}, timeout=timeout_s)
    if not waiting.done():
        waiting.add_done_callback(lambda late: late.cancelled() or late.exception())  # else asyncio logs the exception
        raise TimeoutError
    return waiting.result()


class SideThreads(Executor):
    """An executor of up to `num_threads` daemon threads. The process ends without waiting for them.

    A future that is cancelled before a thread takes it is never run.
    """

    def __init__(self, num_threads: int, *, name: str) -> None:
        self._num_threads = num_threads
        self._name = name
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._num_started = 0
        self._num_pending = 0
        self._is_shut = False

    @property
    def num_pending(self) -> int:
        """Calls that are queued or have not returned."""
        return self._num_pending

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Queue a call."""
        future: Future[Result] = Future()
        with self._lock:
            if self._is_shut:
                raise RuntimeError(f"the threads {self._name} have been shut down")
            self._num_pending += 1
            if self._num_started < min(self._num_pending, self._num_threads):
                self._num_started += 1
                threading.Thread(target=self._run, name=f"{self._name}-{self._num_started}", daemon=True).start()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = False, *, cancel_futures: bool = False) -> None:
        """Let each thread end after its queued calls. Does not wait for them, whatever `wait` says."""
        with self._lock:
            if self._is_shut:
                return
            self._is_shut = True
            for _ in range(self._num_started):
                self._calls.put(None)

    def _run(self) -> None:
        while (item := self._calls.get()) is not None:
            future, call = item
            try:
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    result = call()
                except BaseException as exc:  # noqa: BLE001 - the caller's, through its future
                    self._end_one()
                    future.set_exception(exc)
                else:
                    self._end_one()
                    future.set_result(result)
            finally:
                if future.cancelled():
                    self._end_one()
                del future, call, item

    def _end_one(self) -> None:
        with self._lock:
            self._num_pending -= 1
