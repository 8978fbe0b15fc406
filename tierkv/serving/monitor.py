"""What a server counts: requests, tokens, times, and the seconds that the cache has saved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["Monitor"]

_LEAST_TOKENS = 64  # that a prefill must compute, for its time to say what a token costs
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

    def metrics(self, core: Any, engine: Mapping[str, int]) -> Iterator[Any]:
        """Yield the metrics for Prometheus. core: prometheus_client.core. engine: the engine's counts by name."""
        for name, value, text in (
            ("prompt_tokens", self.prompt_tokens, "Tokens of the prompts of finished answers."),
            ("cached_tokens", self.cached_tokens, "Those of them that were in the cache."),
            ("new_tokens", self.new_tokens, "Tokens generated."),
            ("saved_seconds", self.saved_s, "Seconds of computing prompts that the cache has saved."),
        ):
            yield core.CounterMetricFamily(f"tierkv_serve_{name}", text, value=value)
        for name, text in (("running", "Answers that are computed."), ("waiting", "Answers that wait for their turn.")):
            yield core.GaugeMetricFamily(f"tierkv_serve_{name}", text, value=engine.get(name, 0))
        if "preempted" in engine:
            text = "Times that an answer was interrupted for a more urgent one."
            yield core.CounterMetricFamily("tierkv_serve_preempted", text, value=engine["preempted"])
        answers = core.CounterMetricFamily("tierkv_serve_answers", "Answers, by what ended them.", labels=["outcome"])
        for outcome in dict.fromkeys(("stop", "length", "cancelled", "deadline", "shutdown", "error", *self.outcomes)):
            answers.add_metric([outcome], self.outcomes[outcome])
        yield answers
        requests = core.CounterMetricFamily("tierkv_serve_requests", "Requests to /v1, by status.", labels=["status"])
        for status in dict.fromkeys((200, 400, 401, 404, 413, 429, 500, 503, *self.statuses)):
            requests.add_metric([str(status)], self.statuses[status])
        yield requests
        yield core.HistogramMetricFamily(
            "tierkv_serve_first_token_seconds",
            "Seconds to the first token.",
            buckets=self._cumulative(),
            sum_value=self._first_token_sum_s,
        )

    def _cumulative(self) -> list[tuple[str, int]]:
        total, buckets = 0, []
        for bound, count in zip((*map(str, _BUCKETS_S), "+Inf"), self._first_token_buckets, strict=True):
            total += count
            buckets.append((bound, total))
        return buckets
