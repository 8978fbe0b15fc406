"""What a server counts: requests, tokens, times, and the seconds that the cache has saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tierkv.metrics.catalogue import SERVER_BY_LABEL, SERVER_FIRST_TOKEN, SERVER_TOTALS
from tierkv.metrics.metric import Buckets, MetricSamples

__all__ = ["Monitor"]

_LEAST_TOKENS = 64  # that a prefill must compute, for its time to say what a token costs
_OUTCOMES = ("stop", "length", "cancelled", "deadline", "shutdown", "error")
_STATUSES = ("200", "400", "401", "404", "413", "429", "500", "503")
_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Monitor:
    """The counters of a server. Used by the thread of its event loop only.

    outcomes: answers by what ended them: stop, length, cancelled, deadline, shutdown, error.
    statuses: requests to /v1 by the HTTP status of their answer.
    """

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.prompt_tokens: int = 0
        self.cached_tokens: int = 0
        self.new_tokens: int = 0
        self.last_cached_tokens: int = 0
        self.last_prompt_tokens: int = 0
        self.saved_s: float = 0.0
        self._token_s: float | None = None  # the least time that computing a token has taken
        self._first_token_buckets = [0] * (len(_BUCKETS_S) + 1)
        self._first_token_sum_s = 0.0

    def record(self, *, outcome: str, prompt_tokens: int, cached_tokens: int, new_tokens: int, ttft_s: float) -> None:
        """Count one answer. ttft_s: seconds to its first token.

        Seconds saved are those that computing the whole prompt would have taken, less those that the first token took.
        The least time for a token so far is the measure, so they are rather too few than too many.
        """
        self.outcomes[outcome] += 1
        self.prompt_tokens += prompt_tokens
        self.cached_tokens += cached_tokens
        self.new_tokens += new_tokens
        self.last_cached_tokens, self.last_prompt_tokens = cached_tokens, prompt_tokens
        if not new_tokens:
            return
        self._first_token_sum_s += ttft_s
        self._first_token_buckets[sum(ttft_s > bound for bound in _BUCKETS_S)] += 1
        computed = prompt_tokens - cached_tokens
        if computed >= _LEAST_TOKENS:
            self._token_s = min(ttft_s / computed, self._token_s or ttft_s / computed)
        if self._token_s is not None and cached_tokens:
            self.saved_s += max(0.0, prompt_tokens * self._token_s - ttft_s)

    def status(self) -> dict[str, Any]:
        """Return the counters as plain values."""
        return {
            "outcomes": dict(self.outcomes),
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "new_tokens": self.new_tokens,
            "last_prompt_tokens": self.last_prompt_tokens,
            "last_cached_tokens": self.last_cached_tokens,
            "saved_s": round(self.saved_s, 6),
        }

    def metrics(self, engine: Mapping[str, int]) -> Iterator[MetricSamples]:
        """Yield the metrics for Prometheus. engine: the engine's counts by name."""
        for metric in SERVER_TOTALS:
            of_engine = metric.name.removeprefix("tierkv_serve_")
            value = getattr(self, metric.source) if hasattr(self, metric.source) else engine.get(of_engine, 0)
            yield MetricSamples.of_value(metric, value)
        counts = {"outcomes": self.outcomes, "statuses": {str(code): n for code, n in self.statuses.items()}}
        for metric, known in zip(SERVER_BY_LABEL, (_OUTCOMES, _STATUSES), strict=True):
            yield MetricSamples.of_label(metric, counts[metric.source], known)
        yield MetricSamples(SERVER_FIRST_TOKEN, {}, {(): Buckets(self._cumulative(), self._first_token_sum_s)})

    def _cumulative(self) -> tuple[tuple[str, int], ...]:
        total, buckets = 0, list[tuple[str, int]]()
        for bound, count in zip((*map(str, _BUCKETS_S), "+Inf"), self._first_token_buckets, strict=True):
            total += count
            buckets.append((bound, total))
        return tuple(buckets)
