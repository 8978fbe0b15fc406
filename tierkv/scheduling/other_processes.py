"""OtherProcesses: requests that wait because another process computes their next block."""

from __future__ import annotations

from collections.abc import Callable

from tierkv.cache import TierCache
from tierkv.scheduling.request import Request

__all__ = ["OtherProcesses"]

_ASK_EVERY_S = 0.002
_MOST_ASKED = 8  # requests in one step: a question is two messages to the daemon


class OtherProcesses:
    """Asks the daemon, again and again but never for long, whether another process still computes a block.

    A request waits for `compute_wait_s` at most. Requests with the same prefix follow the first of them, so one asks.
    """

    def __init__(self, cache: TierCache, *, clock: Callable[[], float]) -> None:
        self._cache = cache
        self._clock = clock
        self._waiting: list[Request] = []
        self._asked_at = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def must_wait(self, request: Request) -> bool:
        """Return whether a request waits from now on. Its `num_verified` is then how many of its tokens are there."""
        if not request.hashes or not self._cache.batching.has_other_processes or not self._is_awaited(request):
            return False
        if request.elsewhere_since is None:
            request.elsewhere_since = self._clock()
        self._waiting.append(request)
        return True

    def ask_again(self, advance: Callable[[Request], None]) -> list[Request]:
        """Return requests that wait no more. advance: called with each other one after its question."""
        if not self._waiting or self._clock() < self._asked_at + _ASK_EVERY_S:
            return []
        self._asked_at = self._clock()
        asked, self._waiting = self._waiting[:_MOST_ASKED], self._waiting[_MOST_ASKED:]
        done: list[Request] = []
        for request in asked:
            if self._is_awaited(request):
                self._waiting.append(request)
                advance(request)
            else:
                done.append(request)
        return done

    def remove(self, request: Request) -> None:
        """Forget a request that waits."""
        self._waiting.remove(request)

    def _is_awaited(self, request: Request) -> bool:
        since = request.elsewhere_since
        if since is not None and self._clock() - since >= self._cache.config.compute_wait_s:
            return False
        found = self._cache.batching.computed_elsewhere(request.token_ids)
        if found is None:
            return False
        request.num_computed = request.num_verified = found
        return True
