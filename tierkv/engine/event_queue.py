"""EventQueue: the tokens of a call's requests on their way to one reader, a thread or a task of an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from tierkv.background.active_calls import ActiveCalls
from tierkv.engine.generation import ModelRequest, TokenEvent, Wake
from tierkv.errors import ConfigError

__all__ = ["EventQueue"]


class EventQueue:
    """Satisfies `Reader`. The step loop puts, one reader takes; neither holds a lock while the other works.

    It has one place for each new token that the requests may get, so it needs no bound of its own.
    num_open: requests that have not ended yet. error: of the first request that failed. calls: of the cache, because a
    forked process waits for nothing.
    """

    def __init__(self, num_requests: int, *, calls: ActiveCalls, wants_events: bool = True) -> None:
        self.num_open: int = num_requests
        self.error: BaseException | None = None
        self.wants_events: bool = wants_events
        self._calls = calls
        self._events: deque[TokenEvent] = deque()
        self._changed = threading.Condition()
        self._is_reading = False
        self._wants_end = False  # the reader sleeps until the end, not until the next event
        self._sleeps = False
        self._future: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def has_news(self) -> bool:
        """Whether a reader need not wait: there is an event, or nothing more will come."""
        return bool(self._events) or not self.num_open

    def take(self) -> TokenEvent | None:
        """Return the next event; None if there is none now."""
        return self._events.popleft() if self._events else None

    def put(self, event: TokenEvent) -> tuple[Wake, Callable[[], None]] | None:
        """Add a token. Return how to wake a task that waits for it."""
        self._events.append(event)
        return None if self._wants_end else self._wake()

    def end(self, request: ModelRequest) -> tuple[Wake, Callable[[], None]] | None:
        """Note that a request has ended. Return how to wake a task that waits for that."""
        self.error = self.error or request.error
        self.num_open -= 1
        return self._wake()

    def wait(self, *, until_end: bool = False, timeout_s: float | None = None) -> None:
        """Block the thread until there is news, or for `timeout_s`; with `until_end`, until all requests have ended."""
        self._begin(until_end)
        try:
            with self._changed:
                self._sleeps = True  # before the look: the other thread looks at this after it has put something
                while not self._is_ready():
                    self._calls.require_own_process()
                    if not self._changed.wait(timeout_s):
                        break
        finally:
            self._sleeps = self._is_reading = self._wants_end = False

    async def wait_in_loop(self, *, until_end: bool = False) -> None:
        """Do as `wait`, as a part of an event loop's task."""
        self._begin(until_end)
        loop = asyncio.get_running_loop()
        try:
            while not self._is_ready():
                self._calls.require_own_process()
                future = loop.create_future()
                self._future = loop, future  # before the look, as above
                if not self._is_ready():
                    await future
        finally:
            self._future = None
            self._is_reading = self._wants_end = False

    def _begin(self, until_end: bool) -> None:
        if self._is_reading:
            raise ConfigError("a stream has one reader: another thread or task waits for its next token")
        self._is_reading, self._wants_end = True, until_end

    def _is_ready(self) -> bool:
        return not self.num_open if self._wants_end else self.has_news

    def _wake(self) -> tuple[Wake, Callable[[], None]] | None:
        if self._sleeps:
            with self._changed:
                self._changed.notify_all()
        if self._future is None:
            return None
        (loop, future), self._future = self._future, None
        if loop.is_closed():
            raise RuntimeError("the event loop of a stream's reader is closed")
        return loop.call_soon_threadsafe, partial(_set, future)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
