"""What Prometheus and /status show of remote tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from tierkv.values.remote_stats import Latencies, RemoteStats

__all__ = ["remote_samples", "remote_status"]


def remote_samples(core: Any, remotes: Sequence[RemoteStats]) -> Iterator[Any]:
    """Yield the metrics of remote tiers; the label remote is the URL without its password.

    core: of prometheus_client.
    """
    if not remotes:
        return
    up = core.GaugeMetricFamily("tierkv_remote_up", "Whether the remote tier is asked.", labels=("remote",))
    events = core.CounterMetricFamily(
        "tierkv_remote_events",
        "What happened: hits, bytes, and each reason of a miss, a failure or a dropped write.",
        labels=("remote", "event"),
    )
    times = core.HistogramMetricFamily(
        "tierkv_remote_call_seconds", "Time of the calls, by kind.", labels=("remote", "call")
    )
    for remote in remotes:
        up.add_metric((remote.url,), float(remote.is_up))
        for name, count in remote.counters.items():
            events.add_metric((remote.url, name), count)
        for kind, latencies in remote.latencies.items():
            times.add_metric((remote.url, kind), _buckets(latencies), latencies.total_s)
    yield from (up, events, times)


def remote_status(remote: RemoteStats) -> dict[str, Any]:
    """Return the plain values of one remote tier for /status."""
    calls = {
        kind: {"count": each.count, "us_p50": each.quantile_us(0.5), "us_p99": each.quantile_us(0.99)}
        for kind, each in remote.latencies.items()
    }
    return {"url": remote.url, "is_up": remote.is_up, "counters": remote.counters, "calls": calls}


def _buckets(latencies: Latencies) -> list[tuple[str, float]]:
    """Return (upper bound in seconds, calls up to it), as Prometheus has them."""
    counts = list(accumulate(latencies.buckets))
    bounds = [str(2**power / 1e6) for power in range(len(counts) - 1)]
    return list(zip([*bounds, "+Inf"], map(float, counts), strict=True))
