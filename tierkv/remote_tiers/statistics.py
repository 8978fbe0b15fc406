"""Counters and latencies of one remote tier."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

__all__ = ["Latencies", "RemoteRecorder", "RemoteStats"]

_BUCKETS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Calls of one kind, counted by their time. buckets[n]: calls that took less than 2**n microseconds, and no less
    than half of that.
    """

    buckets: tuple[int, ...] = (0,) * _BUCKETS
    total_s: float = 0.0

    @property
    def count(self) -> int:
        """How many calls there were."""
        return sum(self.buckets)

    def quantile_us(self, share: float) -> int:
        """Return a time in microseconds that this share of the calls did not exceed; 0 without any call."""
        wanted, seen = share * self.count, 0
        for power, count in enumerate(self.buckets):
            seen += count
            if count and seen >= wanted:
                return int(2**power)
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteStats:
    """A snapshot. url: without password. is_up: whether calls pass, or the breaker is open.

    counters: by name; `read_hits`, `read_bytes`, `written_bytes`, and one for each reason of a miss (`miss_`), of a
    write that was dropped (`dropped_`) and of a failure (`failed_`). latencies: by kind of call.
    """

    url: str
    is_up: bool
    counters: dict[str, int] = field(default_factory=dict)
    latencies: dict[str, Latencies] = field(default_factory=dict)


class RemoteRecorder:
    """Counts and times calls. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._totals: Counter[str] = Counter()

    def count(self, name: str, by: int = 1) -> None:
        """Raise a counter."""
        with self._lock:
            self._counters[name] += by

    def time(self, kind: str, seconds: float) -> None:
        """Record how long a call took."""
        bucket = min(int(seconds * 1e6).bit_length(), _BUCKETS - 1)
        with self._lock:
            self._buckets.setdefault(kind, [0] * _BUCKETS)[bucket] += 1
            self._totals[kind] += seconds  # type: ignore[assignment]

    def snapshot(self, url: str, *, is_up: bool) -> RemoteStats:
        """Return the counters so far."""
        with self._lock:
            latencies = {
                kind: Latencies(buckets=tuple(buckets), total_s=float(self._totals[kind]))
                for kind, buckets in self._buckets.items()
            }
            return RemoteStats(url=url, is_up=is_up, counters=dict(self._counters), latencies=latencies)
