"""What Prometheus and /status show of remote tiers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

from tierkv.metrics.catalogue import REMOTE_CALL_SECONDS, REMOTE_EVENTS, REMOTE_UP
from tierkv.metrics.metric import Buckets, MetricSamples
from tierkv.values.remote_stats import Latencies, RemoteStats

__all__ = ["metrics_of_remotes", "remote_status"]


def metrics_of_remotes(remotes: Sequence[RemoteStats]) -> Iterator[MetricSamples]:
    """Yield the metrics of remote tiers; the label remote is the URL without its password."""
    yield MetricSamples.of_label(REMOTE_UP, {each.url: float(each.is_up) for each in remotes})
    yield MetricSamples(
        REMOTE_EVENTS, {(each.url, name): count for each in remotes for name, count in each.counters.items()}
    )
    times: dict[tuple[str, ...], Buckets] = {
        (each.url, kind): _buckets(latencies) for each in remotes for kind, latencies in each.latencies.items()
    }
    yield MetricSamples(REMOTE_CALL_SECONDS, {}, times)


def remote_status(remote: RemoteStats) -> dict[str, Any]:
    """Return the plain values of one remote tier for /status."""
    calls = {
        kind: {"count": each.count, "us_p50": each.quantile_us(0.5), "us_p99": each.quantile_us(0.99)}
        for kind, each in remote.latencies.items()
    }
    return {"url": remote.url, "is_up": remote.is_up, "counters": remote.counters, "calls": calls}


def _buckets(latencies: Latencies) -> Buckets:
    counts = list(accumulate(latencies.buckets))
    bounds = [str(2**power / 1e6) for power in range(len(counts) - 1)]
    return Buckets(tuple(zip([*bounds, "+Inf"], counts, strict=True)), latencies.total_s)
