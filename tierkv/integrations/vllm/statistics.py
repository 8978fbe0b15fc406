"""Counters of the connector, drained after each step into vLLM's own statistics."""

from __future__ import annotations

from collections import Counter

from tierkv.metrics.metric import Kind, Metric

__all__ = ["COUNTERS", "REASON", "Statistics", "labels_of", "metrics_of_connector"]

COUNTERS = {
    "queries": "Requests for which the connector looked for blocks.",
    "hit_tokens": "Prompt tokens that were announced to the scheduler as cached.",
    "computed_instead_tokens": "Cached prompt tokens that were computed, because that was measured to be faster.",
    "loaded_blocks": "Blocks copied into the engine's memory.",
    "failed_blocks": "Announced blocks that could not be loaded; the engine computed them.",
    "saved_blocks": "Blocks taken over from the engine's memory.",
    "unsaved_blocks": "Blocks not saved, because the request had computed over blocks that were not loaded.",
    "not_cached": "Requests that are not cached, by reason.",
}
"""Every counter and what it counts. A name may be followed by REASON and a reason."""

REASON = ":"


def metrics_of_connector() -> tuple[Metric, ...]:
    """Return the counters as vLLM shows them to Prometheus, without the labels that vLLM adds."""
    return tuple(
        Metric(f"vllm:tierkv_{name}", Kind.COUNTER, text, labels_of(name), name) for name, text in COUNTERS.items()
    )


def labels_of(name: str) -> tuple[str, ...]:
    """Return the labels of a counter beside vLLM's own."""
    return ("reason",) if name == "not_cached" else ()


class Statistics:
    """Counters of one side of the connector."""

    def __init__(self) -> None:
        self._new: Counter[str] = Counter()
        self.total: Counter[str] = Counter()

    def add(self, name: str, count: int = 1, *, reason: str = "") -> None:
        """Raise a counter of COUNTERS."""
        assert name in COUNTERS
        if count:
            self._new[f"{name}{REASON}{reason}" if reason else name] += count

    def drain(self) -> dict[str, int]:
        """Return what was counted since the last call."""
        new, self._new = self._new, Counter()
        self.total += new
        return dict(new)
