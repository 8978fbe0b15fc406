"""Who is inside an object's methods, so that closing it can let everybody out first, and nobody in.

The one door that every call passes: it also turns away a process that was forked from the one that made the object,
because the threads, the connections and the locks that a call may need are the parent's.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from tierkv.errors import ClosedError

__all__ = ["HasCalls", "OpenCalls", "while_open"]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class OpenCalls:
    """Counts the threads inside `what`. A thread may call further methods from inside one."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._inside = 0
        self._is_closed = False
        self._own = threading.local()

    @property
    def is_closed(self) -> bool:
        """Whether nobody new is let in."""
        return self._is_closed

    @property
    def is_foreign(self) -> bool:
        """Whether this process was forked from the one that made the object."""
        return os.getpid() != self._pid

    def require_own_process(self) -> None:
        """Raise ClosedError in a forked process. Takes no lock: its owner may be a thread that the fork left behind."""
        if os.getpid() != self._pid:
            raise ClosedError(
                f"{self._what} belongs to the process that made it, not to this one, which was forked from it",
                hint="make a new one here, or start processes by spawn",
            )

    def enter(self) -> None:
        """Let this thread in; `leave` must follow. Raises ClosedError, in a forked process too."""
        self.require_own_process()
        depth = self._depth
        if not depth:
            with self._changed:
                if self._is_closed:
                    raise ClosedError(f"{self._what} is closed")
                self._inside += 1
        self._own.depth = depth + 1

    def leave(self) -> None:
        """End what `enter` began."""
        self._own.depth -= 1
        if not self._own.depth:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def close(self) -> bool:
        """Let nobody in any more. Return whether this was the first call; waits for nobody.

        False in a forked process, which has nothing to close: everything is the parent's.
        """
        if self.is_foreign:
            return False
        with self._changed:
            was_open, self._is_closed = not self._is_closed, True
            return was_open

    def wait(self, wait_s: float | None = None) -> bool:
        """Wait until all other threads have left; return whether they have, after `wait_s` seconds if that is given."""
        own = min(self._depth, 1)
        with self._changed:
            return self._changed.wait_for(lambda: self._inside == own, wait_s)

    @property
    def _depth(self) -> int:
        return int(getattr(self._own, "depth", 0))


class HasCalls(Protocol):
    """An object whose methods are counted."""

    @property
    def calls(self) -> OpenCalls:
        """Who is inside them."""


Owner = TypeVar("Owner", bound=HasCalls)


def while_open(
    method: Callable[Concatenate[Owner, Parameters], Result],
) -> Callable[Concatenate[Owner, Parameters], Result]:
    """Make a method raise ClosedError once its object is closed, and closing wait for those inside it."""

    @wraps(method)
    def counted(self: Owner, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        calls = self.calls
        calls.enter()
        try:
            return method(self, *args, **kwargs)
        finally:
            calls.leave()

    return counted
