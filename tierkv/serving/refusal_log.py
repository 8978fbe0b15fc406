"""RefusalLog: a log line for each request that is refused, so many a minute. No text of a request is in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from tierkv.serving.api_errors import ApiError
from tierkv.values.log_event import LogEvent, LogLimit

__all__ = ["RefusalLog"]

_LINES_PER_MINUTE = 60
_PATH_CHARACTERS = 100

_log = logging.getLogger(__name__)


class RefusalLog:
    """Used by the thread of the event loop only."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = LogLimit(_LINES_PER_MINUTE, clock=clock)

    def add(self, error: ApiError, path: str, client: str) -> None:
        """Log an answer with an HTTP status of 400 or more. What the client sent is not logged."""
        may_log, missed = self._limit.take()
        if missed:
            _log.warning(LogEvent("refused more requests", count=missed))
        if may_log:
            kind = error.body()["error"]["type"]
            values = {"code": error.code, "field": error.param}
            known = {name: value for name, value in values.items() if value}
            where = path[:_PATH_CHARACTERS]
            _log.warning(LogEvent("refused", status=error.status, reason=kind, **known, path=where, client=client))
