"""Count the calls that are active inside an object, so that closing it refuses new calls and waits for the others.

A call is also refused in a forked process: the threads, connections and locks that it may need are the parent's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tierkv.errors import ClosedError

__all__ = ["ActiveCalls", "HasActiveCalls", "while_open"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class ActiveCalls:
    """Counts the threads inside an object's methods. A method may call another one.

    what: the object's name in messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()
        self._lock = threading.Lock()  # held directly: a Condition's own `with` takes twice the time
        self._changed = threading.Condition(self._lock)
        self._num_threads = self._num_waiting = 0
        self._is_closed = False
        self._own = threading.local()

    @property
    def is_closed(self) -> bool:
        """Whether new calls are refused."""
        return self._is_closed

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from the one that made the object."""
        return os.getpid() != self._pid

    def require_own_process(self) -> None:
        """Raise ClosedError in a forked process. Takes no lock: a thread that only the parent has may hold it."""
        if self.is_forked:
            raise ClosedError(
                f"{self._what} belongs to the process that made it, not to this one, which was forked from it",
                hint="make a new one here, or start processes by spawn",
            )

    def enter(self) -> None:
        """Begin a call; `leave` must follow. Raises ClosedError after `close`, and in a forked process."""
        self.require_own_process()
        depth = self._depth
        if not depth:
            with self._lock:
                if self._is_closed:
                    raise ClosedError(f"{self._what} is closed")
                self._num_threads += 1
        self._own.depth = depth + 1

    def leave(self) -> None:
        """End a call."""
        self._own.depth -= 1
        if not self._own.depth:
            with self._lock:
                self._num_threads -= 1
                if self._num_waiting:
                    self._changed.notify_all()

    def close(self) -> bool:
        """Refuse new calls from now on. Return whether this was the first `close`; waits for no call.

        Returns False in a forked process, which has nothing to close.
        """
        if self.is_forked:
            return False
        with self._changed:
            was_open, self._is_closed = not self._is_closed, True
            return was_open

    def wait(self, wait_s: float | None = None) -> bool:
        """Wait until no other thread is inside, at most `wait_s` seconds if given. Return whether none is."""
        own = min(self._depth, 1)
        with self._changed:
            self._num_waiting += 1
            try:
                return self._changed.wait_for(lambda: self._num_threads == own, wait_s)
            finally:
                self._num_waiting -= 1

    @property
    def _depth(self) -> int:
        return int(getattr(self._own, "depth", 0))


class HasActiveCalls(Protocol):
    """An object whose calls are counted."""

    @property
    def calls(self) -> ActiveCalls: ...


Owner = TypeVar("Owner", bound=HasActiveCalls)


def while_open(
    method: Callable[Concatenate[Owner, Parameters], Result],
) -> Callable[Concatenate[Owner, Parameters], Result]:
    """Count a method's calls: it raises ClosedError once its object is closed, and closing waits for its calls."""

    @wraps(method)
    def counted(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        calls = self.calls
        calls.enter()
        try:
            return method(self, *args, **kwargs)
        finally:
            calls.leave()

    return counted
