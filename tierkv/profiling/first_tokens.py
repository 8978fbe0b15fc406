"""FirstTokens: the times to the first token of a run, and the seconds that the cache saved."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tierkv.errors import ConfigError

__all__ = ["FirstToken", "FirstTokenRecorder", "FirstTokens"]

_LEAST_TOKENS = 64  # that a request must compute, for its time to say what a token costs
_MAX_REQUESTS = 1 << 16


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One request: the tokens of its prompt, those of them that were cached, seconds to its first new token."""

    prompt_tokens: int
    cached_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """The requests whose times were recorded."""

    requests: Sequence[FirstToken] = ()

    @property
    def token_s(self) -> float | None:
        """Seconds that computing one prompt token takes, by the fastest request; None if none computed enough.

        The fastest, so that the seconds saved are rather too few than too many.
        """
        computed = [(each.seconds, each.prompt_tokens - each.cached_tokens) for each in self.requests]
        return min((seconds / tokens for seconds, tokens in computed if tokens >= _LEAST_TOKENS), default=None)

    @property
    def saved_s(self) -> float | None:
        """Seconds that computing the cached tokens would have taken, less what loading them took; None if unknown."""
        token_s = self.token_s
        if token_s is None:
            return None
        return sum(
            max(0.0, each.prompt_tokens * token_s - each.seconds) for each in self.requests if each.cached_tokens
        )

    @property
    def median_s(self) -> float | None:
        """Median seconds to the first token, of requests of which something was cached; of all if nothing was."""
        found = [each.seconds for each in self.requests if each.cached_tokens] or [
            each.seconds for each in self.requests
        ]
        return median(found) if found else None

    @property
    def computed_median_s(self) -> float | None:
        """Median seconds to the first token of requests of which nothing was cached; None if there was none."""
        found = [each.seconds for each in self.requests if not each.cached_tokens]
        return median(found) if found else None


class FirstTokenRecorder:
    """The newest times, a bounded number of them. Any thread may add one."""

    def __init__(self, *, max_requests: int = _MAX_REQUESTS) -> None:
        self._requests: deque[FirstToken] = deque(maxlen=max_requests)

    def add(self, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """Record one request. Raises ConfigError for figures that make no sense."""
        if not 0 <= cached_tokens <= prompt_tokens or not 0 <= seconds < float("inf"):
            raise ConfigError(f"{cached_tokens} of {prompt_tokens} tokens in {seconds} s is no time to a first token")
        self._requests.append(FirstToken(prompt_tokens, cached_tokens, seconds))

    def recorded(self) -> FirstTokens:
        """Return what was recorded so far."""
        return FirstTokens(tuple(self._requests))
