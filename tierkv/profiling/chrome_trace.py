"""A profiled run as Chrome trace events: JSON that Perfetto and chrome://tracing open.

Format: "Trace Event Format", the Chromium project. Spans of one thread come from nested work, so they nest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tierkv.profiling.profiled_run import ProfiledRun
from tierkv.values.block import Tier

__all__ = ["trace_of"]

_PROCESS = 1


def trace_of(run: ProfiledRun) -> dict[str, Any]:
    """Return the trace: iterations and spans by thread, counters of every snapshot, evictions as instants.

    Times are microseconds since the profiler began, whole nanoseconds, so that ends of nested spans compare.
    """
    events = [*_names(run), *sorted(_iter_events(run), key=lambda event: event["ts"])]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"title": run.title, **run.about}}


def _names(run: ProfiledRun) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": _PROCESS, "name": "process_name", "args": {"name": run.title}}
    for name, number in _threads(run).items():
        yield {"ph": "M", "pid": _PROCESS, "tid": number, "name": "thread_name", "args": {"name": name}}


def _iter_events(run: ProfiledRun) -> Iterator[dict[str, Any]]:
    threads = _threads(run)
    for iteration in run.iterations:
        detail = {f"{tier.value} blocks": count for tier, count in iteration.hits.items()}
        yield {
            **_span(run, iteration.started, iteration.ended, threads[iteration.thread]),
            "name": iteration.label or f"iteration {iteration.number + 1}",
            "cat": "iteration",
            "args": {"requests": iteration.requests, "prompt tokens": iteration.prompt_tokens, **detail},
        }
    for span in run.spans:
        yield {
            **_span(run, span.started, span.ended, threads[span.thread]),
            "name": span.name,
            "cat": "cache",
            "args": dict(span.detail),
        }
    for snapshot in run.snapshots:
        tiers = snapshot.stats.tiers
        at = _us(run, snapshot.timestamp)
        used = {tier.value: tiers[tier].used_bytes for tier in (Tier.HOT, Tier.WARM) if tier in tiers}
        yield _counter("bytes in use", at, used)
        if Tier.COLD in tiers:
            yield _counter("bytes stored", at, {"cold": tiers[Tier.COLD].stored_bytes})
        yield _counter("hit rate", at, {"blocks": round(snapshot.cache_hit_rate, 6)})
        yield _counter("fragmentation", at, {"hot pool": round(snapshot.fragmentation_ratio, 6)})
    for eviction in run.measured.evictions:
        yield {
            "ph": "i",
            "pid": _PROCESS,
            "tid": 0,
            "s": "p",
            "ts": _us(run, eviction.time),
            "name": f"evict {eviction.tier.value}",
            "cat": "eviction",
            "args": {"block": eviction.block_hash.hex(), "age_s": eviction.age_s, "idle_s": eviction.idle_s},
        }


def _threads(run: ProfiledRun) -> dict[str, int]:
    """Number the threads: those of iterations first."""
    names = dict.fromkeys([*(each.thread for each in run.iterations), *(span.thread for span in run.spans)])
    return {name: number for number, name in enumerate(names, start=1)}


def _span(run: ProfiledRun, started: float, ended: float, thread: int) -> dict[str, Any]:
    first, last = _ns(run, started), _ns(run, ended)
    return {"ph": "X", "pid": _PROCESS, "tid": thread, "ts": first / 1000, "dur": (last - first) / 1000}


def _counter(name: str, at: float, values: dict[str, int] | dict[str, float]) -> dict[str, Any]:
    return {"ph": "C", "pid": _PROCESS, "tid": 0, "ts": at, "name": name, "args": values}


def _us(run: ProfiledRun, time: float) -> float:
    return _ns(run, time) / 1000


def _ns(run: ProfiledRun, time: float) -> int:
    return round((time - run.started) * 1e9)
