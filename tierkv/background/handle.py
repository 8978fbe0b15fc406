"""A handle of work in the background: wait for it, await it, or cancel it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from typing import Generic, TypeVar

from tierkv.errors import ClosedError
from tierkv.values.checks import check_seconds

__all__ = ["Handle"]

Result = TypeVar("Result")


class Handle(Generic[Result]):
    """Work in the background, as its caller sees it. Thread-safe.

    `await handle` is `result()` that does not block the event loop; nothing polls. Cancelling the task that awaits
    does not cancel the work. In a forked process every method raises ClosedError, because the thread that does the
    work is not there.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._future: Future[Result] = Future()
        self._is_cancelled = threading.Event()
        self._on_cancel: Callable[[], None] | None = None

    def done(self) -> bool:
        """Return whether the work has ended, with a result or an error."""
        self._require_own_process()
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the work has ended, at most `timeout_s` seconds. Return whether it has.

        Raises ConfigError for a `timeout_s` that is not a time.
        """
        self._require_own_process()
        if timeout_s is not None:
            timeout_s = check_seconds("timeout_s", timeout_s)
        return bool(wait([self._future], timeout_s).done)

    def result(self) -> Result:
        """Wait for the result and return it, or raise the work's error."""
        self._require_own_process()
        return self._future.result()

    def cancel(self) -> None:
        """Request the end: work that has not begun is dropped, other work ends early. Returns at once."""
        self._require_own_process()
        self._is_cancelled.set()
        action = self._on_cancel
        if action:
            action()

    def __await__(self) -> Generator[object, None, Result]:
        self._require_own_process()
        if not self._future.done():
            loop = asyncio.get_running_loop()
            woken: asyncio.Future[None] = loop.create_future()

            def wake() -> None:
                if not woken.done():
                    woken.set_result(None)

            def wake_loop(_: Future[Result]) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(wake)

            self._future.add_done_callback(wake_loop)
            yield from woken.__await__()
        return self._future.result()

    def _require_own_process(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError("the work belongs to the process that began it, not to one forked from it")

    # -- for the thread that does the work ---------------------------------------------------------------

    @property
    def is_cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._is_cancelled.is_set()

    def on_cancel(self, action: Callable[[], None]) -> None:
        """Set a function that `cancel` calls, each time, until the work has ended."""
        self._on_cancel = action
        if self._future.done():
            self._on_cancel = None  # it may refer to large arguments of the work

    def succeed(self, result: Result) -> None:
        """End the work with a result."""
        self._future.set_result(result)
        self._on_cancel = None

    def fail(self, error: Exception) -> None:
        """End the work with an error."""
        self._future.set_exception(error)
        self._on_cancel = None
