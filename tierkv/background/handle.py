"""Work that somebody else does: to wait for it, to await it, or to take it back."""

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
    """What somebody who handed work over has of it. Thread-safe.

    `await handle` is `result()` that lets the event loop run: whoever does the work wakes the loop, and nothing polls.
    To cancel the task that awaits does not cancel the work.
    In a forked process every method raises ClosedError: the thread that would end the work is not there.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._future: Future[Result] = Future()
        self._is_cancelled = threading.Event()
        self._on_cancel: Callable[[], None] | None = None

    def done(self) -> bool:
        """Tell whether the work has ended, well or not; nothing of it is under way then."""
        self._require_own_process()
        return self._future.done()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the work has ended, at most `timeout_s` seconds. Return whether it has.

        Raises ConfigError for a time that is none.
        """
        self._require_own_process()
        if timeout_s is not None:
            timeout_s = check_seconds("timeout_s", timeout_s)
        return bool(wait([self._future], timeout_s).done)

    def result(self) -> Result:
        """Return what came of it, waiting for that. Raises what went wrong."""
        self._require_own_process()
        return self._future.result()

    def cancel(self) -> None:
        """Ask for an end: what has not begun is dropped, what is under way ends. Returns at once."""
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
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody awaits any more
                    loop.call_soon_threadsafe(wake)

            self._future.add_done_callback(wake_loop)
            yield from woken.__await__()
        return self._future.result()

    def _require_own_process(self) -> None:
        if os.getpid() != self._pid:
            raise ClosedError("the work belongs to the process that began it, not to one forked from it")

    # -- for whoever does the work -----------------------------------------------------------------------

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody asked for an end."""
        return self._is_cancelled.is_set()

    def on_cancel(self, action: Callable[[], None]) -> None:
        """Have something called, perhaps more than once, when somebody asks for an end before the work has ended."""
        self._on_cancel = action
        if self._future.done():
            self._on_cancel = None  # it may hold what was worked on

    def succeed(self, result: Result) -> None:
        """End the work with a result."""
        self._future.set_result(result)
        self._on_cancel = None

    def fail(self, failure: Exception) -> None:
        """End the work with what went wrong."""
        self._future.set_exception(failure)
        self._on_cancel = None
