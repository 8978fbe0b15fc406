"""Serves a running cache's counters over HTTP: /metrics for Prometheus, /status as JSON for `tierkv top`.

Needs prometheus-client, of the extra `metrics`; it is imported when a server or a collector is made. Only counts,
sizes and block hashes leave the process: no token and no text.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from socketserver import ThreadingMixIn
from typing import Any, Protocol
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.profiling.prefixes import PrefixTable
from tierkv.profiling.remote_metrics import remote_samples, remote_status
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.values.events import CacheObserver
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace
from tierkv.values.stats import CacheStats, TierStats

__all__ = ["CacheCollector", "MetricsServer", "ServedCache", "metrics_text", "serve_metrics", "status_of"]


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


@dataclass(frozen=True, slots=True)
class _Metric:
    """One metric: the field of CacheStats or TierStats that it shows. Counters get the suffix _total."""

    name: str
    field: str
    is_counter: bool
    help: str


_OF_CACHE = (
    _Metric("requests", "requests", True, "Requests that acquired a sequence."),
    _Metric("prompt_tokens", "prompt_tokens", True, "Tokens of their prompts."),
    _Metric("collisions", "collisions", True, "Lookups that met another block with the same hash; each cost a miss."),
    _Metric("prefetched_blocks", "prefetched_blocks", True, "Blocks brought into the warm tier before a request."),
    _Metric("fragmentation_ratio", "fragmentation_ratio", False, "Free hot blocks outside the longest free run."),
    _Metric("state_files", "state_files", False, "State files that are loaded and open."),
    _Metric("shared_blocks", "avg_shared_blocks", False, "Mean blocks that a live sequence shares with another."),
)
_BY_REASON = (
    _Metric("misses", "miss_reasons", True, "Blocks that no tier answered, by reason."),
    _Metric("prefetch_misses", "prefetch_misses", True, "Blocks that a prefetch could not bring, by reason."),
    _Metric("skipped_writes", "skip_reasons", True, "Blocks that were not written to a lower tier, by reason."),
)
_MISS_REASONS = tuple(reason.value for reason in MissReason)
_PUT = (PutOutcome.STORED, PutOutcome.EXISTS)
_SKIP_REASONS = (*(each.value for each in PutOutcome if each not in _PUT), "queue_full", "stalled", "refused", "daemon")
_OF_TIER = (
    _Metric("hits", "hits", True, "Blocks that the tier answered."),
    _Metric("hit_tokens", "hit_tokens", True, "Prompt tokens that the tier answered."),
    _Metric("evictions", "evictions", True, "Blocks that the tier forgot to make room."),
    _Metric("written_bytes", "bytes_in", True, "Bytes of blocks written into the tier."),
    _Metric("read_bytes", "bytes_out", True, "Bytes of blocks read from the tier."),
    _Metric("blocks", "blocks", False, "Blocks that the tier holds."),
    _Metric("used_bytes", "used_bytes", False, "Bytes of these blocks as the model uses them."),
    _Metric("stored_bytes", "stored_bytes", False, "Bytes that they take in the tier."),
    _Metric("capacity_bytes", "capacity_bytes", False, "Bytes that the tier may take."),
)


class CacheCollector:
    """A collector for any registry of prometheus_client; reads the cache when it is scraped."""

    def __init__(self, cache: ServedCache) -> None:
        self._cache = cache
        self._core = _prometheus().core

    def collect(self) -> Iterator[Any]:
        """Yield every metric family."""
        stats, core = self._cache.stats(), self._core
        info = core.InfoMetricFamily("tierkv_cache", "The model and the blocks of this cache.")
        info.add_metric([], {name: str(value) for name, value in _about(self._cache).items()})
        yield info
        for metric in _OF_CACHE:
            yield self._family(metric, (), [((), getattr(stats, metric.field))])
        for metric in _OF_TIER:
            yield self._family(
                metric, ("tier",), [((tier.value,), getattr(each, metric.field)) for tier, each in stats.tiers.items()]
            )
        for metric in _BY_REASON:
            counts = getattr(stats, metric.field)
            known = _SKIP_REASONS if metric.field == "skip_reasons" else _MISS_REASONS
            reasons = dict.fromkeys([*known, *counts])  # Prometheus wants each reason before it first happens
            yield self._family(metric, ("reason",), [((reason,), counts.get(reason, 0)) for reason in reasons])
        yield from remote_samples(core, stats.remotes)

    def _family(
        self, metric: _Metric, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
    ) -> Any:
        kind = self._core.CounterMetricFamily if metric.is_counter else self._core.GaugeMetricFamily
        family = kind(f"tierkv_{metric.name}", metric.help, labels=labels)
        for values, value in samples:
            family.add_metric(values, value)
        return family


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
    registry = _prometheus().CollectorRegistry()
    registry.register(CacheCollector(cache))
    table = PrefixTable()
    started = time.monotonic()
    app = _application(
        _prometheus().make_wsgi_app(registry),
        lambda: status_of(cache, table, count=prefixes, uptime_s=time.monotonic() - started),
    )
    try:
        server = make_server(host, port, app, _Server, _Handler)
    except (OSError, OverflowError) as exc:
        raise ConfigError(f"metrics cannot be served at {host}:{port}: {exc}") from exc
    cache.add_observer(table)
    return MetricsServer(server, lambda: cache.remove_observer(table))


def metrics_text(cache: ServedCache, more: Callable[[Any], Iterator[Any]]) -> tuple[bytes, str]:
    """Return a cache's metrics as Prometheus reads them, and their media type.

    more: is called with prometheus_client.core, and yields further metrics. Raises ConfigError without
    prometheus-client.
    """
    client = _prometheus()
    registry = client.CollectorRegistry()
    registry.register(CacheCollector(cache))
    registry.register(_MoreMetrics(lambda: more(client.core)))
    return client.generate_latest(registry), client.CONTENT_TYPE_LATEST


class _MoreMetrics:
    """A collector of what a function yields."""

    def __init__(self, metrics: Callable[[], Iterator[Any]]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Any]:
        return self._metrics()


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
        "dtype": cache.layout.dtype,
        "block_size": cache.layout.block_size,
        "block_bytes": cache.layout.block_bytes,
    }


def _plain(stats: TierStats) -> dict[str, int]:
    return {each.name: getattr(stats, each.name) for each in fields(TierStats)}


def _application(metrics: Any, status: Callable[[], Mapping[str, Any]]) -> Any:
    """Return a WSGI application of two pages; only reading is allowed."""

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if environ.get("REQUEST_METHOD") != "GET":
            start_response("405 Method Not Allowed", [("Allow", "GET"), ("Content-Type", "text/plain")])
            return [b"only GET\n"]
        if path == "/metrics":
            pages: Iterable[bytes] = metrics(environ, start_response)
            return pages
        if path == "/status":
            start_response("200 OK", [("Content-Type", "application/json"), ("Cache-Control", "no-store")])
            return [json.dumps(status()).encode()]
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"there are /metrics and /status\n"]

    return answer


class _Server(ThreadingMixIn, WSGIServer):
    """Serves each request on a daemon thread, so that a slow client blocks neither others nor the process's end."""

    daemon_threads = True


class _Handler(WSGIRequestHandler):
    """Logs no requests: Prometheus makes one every few seconds."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it
        """Log nothing."""


def _prometheus() -> Any:
    try:
        import prometheus_client
        import prometheus_client.core
    except ModuleNotFoundError as exc:
        raise ConfigError("metrics need prometheus-client", hint="pip install 'tierkv[metrics]'") from exc
    return prometheus_client
