"""Counters and latencies of one remote tier, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LATENCY_BUCKETS", "Latencies", "RemoteStats"]

LATENCY_BUCKETS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Latencies:
    """Calls of one kind, counted by their time. buckets[n]: calls that took less than 2**n microseconds, and no less
    than half of that.
    """

    buckets: tuple[int, ...] = (0,) * LATENCY_BUCKETS
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
