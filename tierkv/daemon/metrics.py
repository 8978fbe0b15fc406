"""Metrics of the daemon in Prometheus' text format, over HTTP on the loopback interface.

Every name begins with tierkv_daemon_, so that one scraper may read the metrics of a cache too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from tierkv.daemon.messages import StatusReport
from tierkv.daemon.tenant_metrics import tenant_lines
from tierkv.errors import DaemonError

__all__ = ["exposition", "serve_metrics"]

_GAUGES = (
    "uptime_s",
    "warm_bytes",
    "warm_free_bytes",
    "rss_bytes",
    "clients",
    "leased_slots",
    "reserved_slots",
    "claims",
    "pending_writes",
    "bytes_received",
    "bytes_sent",
)


def exposition(report: StatusReport) -> str:
    """Return the figures of a status report in Prometheus' format."""
    gauges = {name: getattr(report, name) for name in _GAUGES} | {f"cold_{key}": n for key, n in report.cold.items()}
    for each in report.limits:
        gauges |= {f"held_{each.name}": each.used, f"limit_{each.name}": each.limit}
    counters = {f"{key}_total": count for key, count in report.counters.items()}
    lines: list[str] = []
    for kind, samples in (("gauge", gauges), ("counter", counters)):
        for key, value in samples.items():
            lines += [f"# TYPE tierkv_daemon_{key} {kind}", f"tierkv_daemon_{key} {value}"]
    lines += tenant_lines(report.shares)
    return "\n".join(lines) + "\n"


async def serve_metrics(port: int, report: Callable[[], StatusReport], *, timeout_s: float) -> asyncio.Server:
    """Answer every request with the metrics. timeout_s: for a request to arrive. Raises DaemonError."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.TimeoutError, asyncio.LimitOverrunError, asyncio.IncompleteReadError, OSError):
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout_s)
            body = exposition(report()).encode()
            head = f"HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
        writer.close()

    try:
        return await asyncio.start_server(answer, "127.0.0.1", port)
    except OSError as exc:
        raise DaemonError(f"metrics cannot be served on port {port}: {exc.strerror}") from exc
