"""The daemon's log lines about refusals and evictions: enough to see what happens, and a bounded number of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from tierkv.daemon.protocol import ProtocolError
from tierkv.errors import CapacityError, StoreError, TierKVError
from tierkv.values.log_event import LogEvent, LogLimit

__all__ = ["EVICTION_LINE_S", "LogLines", "reason_of"]

EVICTION_LINE_S = 10.0
"""Evictions of so many seconds share one line."""

_log = logging.getLogger(__name__)


def reason_of(why: Exception) -> str:
    """Return the kind of error by which a message was refused, as the metric and the log name it."""
    for kind, reason in ((ProtocolError, "protocol"), (CapacityError, "capacity"), (StoreError, "store")):
        if isinstance(why, kind):
            return reason
    return "refused" if isinstance(why, TierKVError) else "internal"


class LogLines:
    """Writes these lines. Used on the loop. refusals_per_minute: the others are only counted."""

    def __init__(self, *, refusals_per_minute: int, clock: Callable[[], float]) -> None:
        self._limit = LogLimit(refusals_per_minute, clock=clock)
        self._clock = clock
        self._evicted: dict[str, int] = {}
        self._logged_at = clock()

    def refused(self, client: str, why: str, *, reason: str) -> None:
        """Log a refusal, unless this minute had as many as the limit allows."""
        may_log, missed = self._limit.take()
        if missed:
            _log.warning(LogEvent("refused more messages", count=missed))
        if may_log:
            _log.warning(LogEvent("refused", client=client, reason=reason, error=why))

    @property
    def are_evictions_due(self) -> bool:
        """Return whether the last line about evictions is old enough."""
        return self._clock() - self._logged_at >= EVICTION_LINE_S

    def evicted(self, totals: Mapping[str, int]) -> None:
        """Log what each tier has evicted since the last call. totals: blocks evicted so far, by tier."""
        seconds, self._logged_at = round(self._clock() - self._logged_at), self._clock()
        for tier, total in totals.items():
            if blocks := total - self._evicted.get(tier, 0):
                _log.info(LogEvent("evicted", tier=tier, blocks=blocks, seconds=seconds))
        self._evicted.update(totals)
