"""Wakeup: how the thread that computes wakes a reader, which is a thread or a task of an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial

from tierkv.background.active_calls import ActiveCalls
from tierkv.engine.generation import Wake
from tierkv.errors import ConfigError

__all__ = ["Wakeup"]


class Wakeup:
    """One reader sleeps until something is ready. The other thread takes no lock while no reader sleeps.

    calls: of the cache, because a forked process waits for nothing.
    """

    def __init__(self, calls: ActiveCalls) -> None:
        self._calls = calls
        self._changed = threading.Condition()
        self._is_reading = False
        self._is_asleep = False
        self._future: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def wait(self, is_ready: Callable[[], bool], *, timeout_s: float | None = None) -> None:
        """Block the thread until `is_ready`, or for `timeout_s`. Raises ConfigError if another reader waits."""
        self._begin()
        try:
            with self._changed:
                self._is_asleep = True  # before the look: the other thread looks at this behind its change
                while not is_ready():
                    self._calls.require_own_process()
                    if not self._changed.wait(timeout_s):
                        break
        finally:
            self._is_asleep = self._is_reading = False

    async def wait_in_loop(self, is_ready: Callable[[], bool]) -> None:
        """Do as `wait`, as a part of an event loop's task."""
        self._begin()
        loop = asyncio.get_running_loop()
        try:
            while not is_ready():
                self._calls.require_own_process()
                future = loop.create_future()
                self._future = loop, future  # before the look, as above
                if not is_ready():
                    await future
        finally:
            self._future = None
            self._is_reading = False

    def wake(self) -> tuple[Wake, Callable[[], None]] | None:
        """Wake a thread that sleeps. For a task, return its event loop's wake and what to call there.

        Called behind each change. Raises RuntimeError if the event loop of a task that waits is closed.
        """
        if self._is_asleep:
            with self._changed:
                self._changed.notify_all()
        if self._future is None:
            return None
        (loop, future), self._future = self._future, None
        if loop.is_closed():
            raise RuntimeError("the event loop of a stream's reader is closed")
        return loop.call_soon_threadsafe, partial(_set, future)

    def _begin(self) -> None:
        if self._is_reading:
            raise ConfigError("a stream has one reader: another thread or task waits for its next token")
        self._is_reading = True


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
