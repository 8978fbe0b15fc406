"""Locks that know their owner, so that "the caller holds the lock" can be asserted.

A method whose docstring says so begins with `assert lock.is_owned()`: one call into C, about 30 ns.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from typing import Protocol

__all__ = ["NO_LOCK", "Owned", "OwnedCondition", "OwnedLock"]


class Owned(Protocol):
    """A lock that can only be asked for its owner."""

    @property
    def is_owned(self) -> Callable[[], bool]:
        """Return whether the calling thread holds the lock, when called."""


class OwnedLock(_thread.RLock):  # type: ignore[misc]  # final in typeshed only
    """A re-entrant lock; `is_owned` returns whether the calling thread holds it."""

    is_owned: Callable[[], bool] = _thread.RLock._is_owned  # type: ignore[attr-defined]


class OwnedCondition(threading.Condition):
    """A condition with an `OwnedLock` of its own."""

    def __init__(self) -> None:
        lock = OwnedLock()
        super().__init__(lock)
        self.is_owned: Callable[[], bool] = lock.is_owned


class _NoLock:
    is_owned: Callable[[], bool] = (1).__bool__


NO_LOCK: Owned = _NoLock()
"""Stands for a lock that is always held, for an object that only one thread uses."""
