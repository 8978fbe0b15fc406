"""Serves a running cache's counters over HTTP: /metrics for Prometheus, /status as JSON for `tierkv top`.

Needs prometheus-client, of the extra `metrics`; it is imported when a server is made. Only counts,
sizes and block hashes leave the process: no token and no text.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from socketserver import ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.metrics.catalogue import CACHE_BY_REASON, CACHE_BY_TIER, CACHE_INFO, CACHE_TOTALS
from tierkv.metrics.exposition import exposition, load_prometheus
from tierkv.metrics.metric import TENANT_CHARACTERS, MetricSamples
from tierkv.profiling.prefixes import PrefixTable
from tierkv.profiling.remote_metrics import metrics_of_remotes, remote_status
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.values.events import CacheObserver
from tierkv.values.hosts import is_local_host
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace
from tierkv.values.stats import CacheStats, TierStats

__all__ = ["MetricsServer", "ServedCache", "metrics_of", "serve_metrics", "status_of"]

_MOST_CONNECTIONS = 16
_TIMEOUT_S = 10.0  # for a request to arrive, and its answer to be read


class ServedCache(Protocol):
    """What the server needs of a cache; TierCache satisfies it."""

    @property
    def config(self) -> CacheConfig: ...
    @property
    def layout(self) -> BlockLayout: ...
    @property
    def namespace(self) -> Namespace: ...
    def stats(self) -> CacheStats: ...
    def add_observer(self, observer: CacheObserver) -> None: ...
    def remove_observer(self, observer: CacheObserver) -> None: ...


_MISS_REASONS = tuple(reason.value for reason in MissReason)
_PUT = (PutOutcome.STORED, PutOutcome.EXISTS)
_SKIP_REASONS = (
    *(each.value for each in PutOutcome if each not in _PUT),
    "queue_full",
    "stalled",
    "refused",
    "daemon",
    "read_only",
)


def metrics_of(cache: ServedCache) -> Iterator[MetricSamples]:
    """Yield every metric of a cache as it is now."""
    stats = cache.stats()
    about = {name: str(value) for name, value in _about(cache).items()}
    yield MetricSamples(CACHE_INFO, {tuple(about[name] for name in CACHE_INFO.labels): 1})
    for metric in CACHE_TOTALS:
        yield MetricSamples.of_value(metric, getattr(stats, metric.source))
    for metric in CACHE_BY_TIER:
        yield MetricSamples.of_label(
            metric, {tier.value: getattr(each, metric.source) for tier, each in stats.tiers.items()}
        )
    for metric in CACHE_BY_REASON:
        known = _SKIP_REASONS if metric.source == "skip_reasons" else _MISS_REASONS
        yield MetricSamples.of_label(metric, getattr(stats, metric.source), known)  # each reason before it happens
    yield from metrics_of_remotes(stats.remotes)


class MetricsServer:
    """A running server on a thread of its own. Context manager; `close` may be called twice."""

    def __init__(self, server: WSGIServer, on_close: Callable[[], None]) -> None:
        self._server = server
        self._on_close = on_close
        self._is_open = True
        self._thread = threading.Thread(target=server.serve_forever, name="tierkv-metrics", daemon=True)
        self._thread.start()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port that it listens on, also where 0 was given."""
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        """The address, for `tierkv top --url`."""
        return f"http://{self._server.server_address[0]!s}:{self.port}"

    def close(self) -> None:
        """Stop answering."""
        if self._is_open:
            self._is_open = False
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._on_close()


def serve_metrics(
    cache: ServedCache, port: int = 9464, *, host: str = "127.0.0.1", prefixes: int = 10
) -> MetricsServer:
    """Answer /metrics and /status until closed; close it before the cache. host: an IPv4 address or name.

    Every process that reaches the port can read; by default only those of this machine. prefixes: how many of the
    largest /status lists. Raises ConfigError without prometheus-client, and for an address that cannot be bound.
    """
    load_prometheus()  # its absence is said now, not at the first scrape
    table = PrefixTable()
    started = time.monotonic()
    app = _application(
        lambda: exposition(metrics_of(cache)),
        lambda: status_of(cache, table, count=prefixes, uptime_s=time.monotonic() - started),
        needs_local_host=host == "localhost" or host.startswith("127."),
    )
    try:
        server = make_server(host, port, app, _Server, _Handler)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"metrics cannot be served at {host}:{port}: {exc}") from exc
    cache.add_observer(table)
    return MetricsServer(server, lambda: cache.remove_observer(table))


def status_of(cache: ServedCache, table: PrefixTable, *, count: int, uptime_s: float) -> dict[str, Any]:
    """Return the content of /status: plain values, counters since the cache was opened."""
    stats = cache.stats()
    return {
        **_about(cache),
        "uptime_s": round(uptime_s, 3),
        "hit_rate": stats.hit_rate,
        "token_hit_rate": stats.token_hit_rate,
        **{
            each.name: getattr(stats, each.name) for each in fields(CacheStats) if each.name not in ("tiers", "remotes")
        },
        "tiers": {tier.value: _plain(each) for tier, each in stats.tiers.items()},
        "remotes": [remote_status(each) for each in stats.remotes],
        "prefixes": [use.to_dict() for use in table.largest(count)],
    }


def _about(cache: ServedCache) -> dict[str, Any]:
    return {
        "model": cache.namespace.name,
        "namespace": cache.namespace.digest.hex(),
        "tenant": str(cache.namespace.identity()["salt"])[:TENANT_CHARACTERS],
        "dtype": cache.layout.dtype,
        "block_size": cache.layout.block_size,
        "block_bytes": cache.layout.block_bytes,
    }


def _plain(stats: TierStats) -> dict[str, int]:
    return {each.name: getattr(stats, each.name) for each in fields(TierStats)}


def _application(
    metrics: Callable[[], tuple[bytes, str]], status: Callable[[], Mapping[str, Any]], *, needs_local_host: bool
) -> Any:
    """Return a WSGI application of two pages; only reading is allowed.

    needs_local_host: refuse requests under a name of another machine.
    """

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if needs_local_host and (host := environ.get("HTTP_HOST")) and not is_local_host(host):
            start_response("403 Forbidden", [("Content-Type", "text/plain")])
            return [b"only under local names\n"]
        if environ.get("REQUEST_METHOD") != "GET":
            start_response("405 Method Not Allowed", [("Allow", "GET"), ("Content-Type", "text/plain")])
            return [b"only GET\n"]
        if path == "/metrics":
            text, kind = metrics()
            start_response("200 OK", [("Content-Type", kind), ("Cache-Control", "no-store")])
            return [text]
        if path == "/status":
            start_response("200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
            return [json.dumps(status()).encode()]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /metrics and /status\n"]

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    """Serves each request on a daemon thread, so that a slow client blocks neither others nor the process's end.

    Connections are bounded in number and in time: else they would take the descriptors that the engine needs.
    """

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start a thread for a connection, or close it where there are too many."""
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and end the connection once its time is over."""
        timer = threading.Timer(_TIMEOUT_S, _end, [request])
        timer.daemon = True
        try:
            timer.start()
            super().process_request_thread(request, client_address)
        except RuntimeError:  # no thread can be started
            self.shutdown_request(request)
        finally:
            timer.cancel()
            self._room.release()


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    """Logs no requests: Prometheus makes one every few seconds."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Log nothing."""
