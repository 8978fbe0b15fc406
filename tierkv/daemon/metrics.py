"""Metrics of the daemon in Prometheus' text format, over HTTP on the loopback interface.

Every name begins with tierkv_daemon_, so that one scraper may read the metrics of a cache too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from tierkv.daemon.messages import StatusReport, TenantStatus
from tierkv.errors import DaemonError
from tierkv.metrics.catalogue import (
    DAEMON_BY_REASON,
    DAEMON_BY_TIER,
    DAEMON_INFO,
    DAEMON_LIMITS,
    DAEMON_NAMESPACES,
    DAEMON_REMOTE_EVENTS,
    DAEMON_TENANTS,
    DAEMON_TOTALS,
)
from tierkv.metrics.exposition import exposition
from tierkv.metrics.metric import TENANT_CHARACTERS, MetricSamples
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.values.hosts import is_local_host

__all__ = ["metrics_of", "serve_metrics"]

_MOST_CONNECTIONS = 16
_REASONS = {
    "missed_blocks": [each.value for each in (MissReason.ABSENT, MissReason.COLLISION, MissReason.IO_ERROR)],
    "skipped_writes": [
        "evicted",
        "queue_full",
        *(each.value for each in PutOutcome if each.name not in ("STORED", "EXISTS")),
    ],
    "refused_messages": ["protocol", "capacity", "store", "refused", "internal"],
}


def metrics_of(report: StatusReport) -> Iterator[MetricSamples]:
    """Yield the figures of a status report."""
    yield MetricSamples(DAEMON_INFO, {(report.version,): 1})
    for metric in DAEMON_TOTALS:
        name = metric.source.removeprefix("daemon_")
        value = getattr(report, name) if hasattr(report, name) else report.counters.get(name, 0)
        yield MetricSamples.of_value(metric, value)
    tiers = _tiers_of(report)
    for metric in DAEMON_BY_TIER:
        figure = metric.source.removeprefix("daemon_")
        yield MetricSamples.of_label(metric, {tier: figures[figure] for tier, figures in tiers.items()})
    for metric in DAEMON_BY_REASON:
        name = metric.source.removeprefix("daemon_")
        yield MetricSamples.of_label(metric, report.reasons.get(name, {}), _REASONS[name])
    for metric in DAEMON_NAMESPACES:
        figure = metric.source.removeprefix("daemon_namespace_")
        yield MetricSamples(metric, {_labels_of(each): _figures_of(each)[figure] for each in report.tenants})
    for metric in DAEMON_TENANTS:
        figures = {
            (each.name, tier): getattr(each, f"{tier}_{metric.source}")
            for each in report.shares
            for tier in ("warm", "cold")
        }
        yield MetricSamples(metric, {labels: figure for labels, figure in figures.items() if figure >= 0})
    events = {name: count for name, count in report.counters.items() if name.startswith("remote_")}
    yield MetricSamples.of_label(
        DAEMON_REMOTE_EVENTS, {name.removeprefix("remote_"): count for name, count in events.items()}
    )
    for metric in DAEMON_LIMITS:
        yield MetricSamples.of_label(metric, {each.name: getattr(each, metric.source) for each in report.limits})


def _tiers_of(report: StatusReport) -> dict[str, dict[str, int]]:
    """Return the figures of each tier: of the cold tier only where there is a store that can be read."""
    warm = {
        "blocks": sum(each.warm_blocks for each in report.tenants),
        "used_bytes": report.warm_bytes - report.warm_free_bytes,
        "capacity_bytes": report.warm_bytes,
        "evictions": report.counters.get("evicted_blocks", 0),
    }
    if not report.cold:
        return {"warm": warm}
    cold = {
        "blocks": report.cold["blocks"],
        "used_bytes": report.cold["live_bytes"],
        "capacity_bytes": report.cold["quota_bytes"],
        "evictions": report.cold["evicted_blocks"],
    }
    return {"warm": warm, "cold": cold}


def _labels_of(tenant: TenantStatus) -> tuple[str, str, str]:
    return tenant.namespace[:TENANT_CHARACTERS], tenant.name, tenant.owner[:TENANT_CHARACTERS]


def _figures_of(tenant: TenantStatus) -> dict[str, int]:
    return {
        "blocks": tenant.warm_blocks,
        "bytes": tenant.warm_blocks * tenant.block_bytes,
        "pinned_bytes": tenant.pinned_bytes,
        "clients": tenant.clients,
    }


async def serve_metrics(port: int, report: Callable[[], StatusReport], *, timeout_s: float) -> asyncio.Server:
    """Answer GET /metrics. timeout_s: for a request to arrive, and its answer to be read. Raises DaemonError.

    Every user of this machine can connect. So connections are bounded in number and in time: else they would take the
    descriptors that clients need.
    """
    num_open = 0

    async def exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        writer.transport.set_write_buffer_limits(0)  # so that `drain` waits until all has left
        writer.write(_answer_to(request, report))
        await writer.drain()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_open
        num_open += 1
        try:
            if num_open <= _MOST_CONNECTIONS:
                await asyncio.wait_for(exchange(reader, writer), timeout_s)
                writer.close()
        except (asyncio.TimeoutError, asyncio.LimitOverrunError, asyncio.IncompleteReadError, OSError):
            pass
        finally:
            num_open -= 1
            if not writer.is_closing():
                writer.transport.abort()

    try:
        return await asyncio.start_server(answer, "127.0.0.1", port)
    except OSError as exc:
        raise DaemonError(f"metrics cannot be served on port {port}: {exc.strerror}") from exc


def _answer_to(request: bytes, report: Callable[[], StatusReport]) -> bytes:
    first, *lines = request.split(b"\r\n")
    method, path, *_ = (*first.split(b" "), b"", b"")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
    status, kind, body = "404 Not Found", "text/plain", b"there is /metrics\n"
    if (host := headers.get(b"host")) and not is_local_host(host.decode("latin-1")):
        status, body = "403 Forbidden", b"only under local names\n"
    elif method != b"GET":
        status, body = "405 Method Not Allowed", b"only GET\n"
    elif path.split(b"?")[0] == b"/metrics":
        status = "200 OK"
        body, kind = exposition(metrics_of(report()))
    head = f"HTTP/1.0 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
