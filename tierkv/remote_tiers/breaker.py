"""Breaker: stops calls to a remote tier that fails, and says when one probe may look for it again."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

__all__ = ["Breaker"]

_FAILURES = 3
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 60.0


class Breaker:
    """Closed: calls pass. Open, after three failures in a row: no call passes, and a request never waits. Thread-safe.

    An open breaker lets one probe pass after a second, then after twice the time, up to a minute. A background thread
    probes, never a request. The first call that succeeds closes the breaker.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._num_failures = 0
        self._wait_s = _FIRST_WAIT_S
        self._probe_at: float | None = None

    @property
    def is_closed(self) -> bool:
        """Whether calls pass."""
        return self._probe_at is None

    def probe_in_s(self) -> float | None:
        """Return the seconds until a probe may pass, 0 at once; None where calls pass without one."""
        probe_at = self._probe_at
        return None if probe_at is None else max(0.0, probe_at - self._clock())

    def note_success(self) -> None:
        """Record that a call was answered."""
        with self._lock:
            self._num_failures = 0
            self._wait_s = _FIRST_WAIT_S
            self._probe_at = None

    def note_failure(self, *, is_probe: bool = False) -> bool:
        """Record that a call failed. Return whether this opened the breaker.

        Calls that began before it opened may fail later: they neither open it again nor lengthen its wait.
        """
        with self._lock:
            if self._probe_at is not None and not is_probe:
                return False
            self._num_failures += 1
            if self._num_failures < _FAILURES and not is_probe:
                return False
            was_closed = self._probe_at is None
            if not was_closed:
                self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
            self._probe_at = self._clock() + self._wait_s
            return was_closed
