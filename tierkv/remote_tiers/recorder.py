"""RemoteRecorder: counts and times the calls to one remote tier."""

from __future__ import annotations

import threading
from collections import Counter, defaultdict

from tierkv.values.remote_stats import LATENCY_BUCKETS, Latencies, RemoteStats

__all__ = ["RemoteRecorder"]


class RemoteRecorder:
    """Counts and times calls. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[str] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._totals: defaultdict[str, float] = defaultdict(float)

    def count(self, name: str, by: int = 1) -> None:
        """Raise a counter."""
        with self._lock:
            self._counters[name] += by

    def time(self, kind: str, seconds: float) -> None:
        """Record how long a call took."""
        bucket = min(int(seconds * 1e6).bit_length(), LATENCY_BUCKETS - 1)
        with self._lock:
            self._buckets.setdefault(kind, [0] * LATENCY_BUCKETS)[bucket] += 1
            self._totals[kind] += seconds

    def snapshot(self, url: str, *, is_up: bool) -> RemoteStats:
        """Return the counters so far."""
        with self._lock:
            latencies = {
                kind: Latencies(buckets=tuple(buckets), total_s=self._totals[kind])
                for kind, buckets in self._buckets.items()
            }
            return RemoteStats(url=url, is_up=is_up, counters=dict(self._counters), latencies=latencies)
