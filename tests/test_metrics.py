"""The metrics endpoint over a cache whose counters are known, and the dashboard that reads it."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from fake_cache import FakeCache

from tierkv.daemon.messages import LimitStatus, StatusReport
from tierkv.daemon.metrics import exposition
from tierkv.daemon.metrics import serve_metrics as serve_metrics_of_daemon
from tierkv.errors import ConfigError
from tierkv.profiling.metrics import _BY_REASON, _OF_CACHE, _OF_TIER, MetricsServer, serve_metrics
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import Tier
from tierkv.values.events import EventKind
from tierkv.values.stats import CacheStats, TierStats

parser = pytest.importorskip("prometheus_client.parser")

DASHBOARD = Path(__file__).resolve().parents[1] / "examples/grafana_dashboard.json"


@pytest.fixture
def cache() -> FakeCache:
    made = FakeCache(hot=10)
    made.hits[Tier.WARM] = 7
    made.counters = {"requests": 3, "misses": 2, "miss_reasons": {"corrupt": 2}, "fragmentation_ratio": 0.25}
    return made


@pytest.fixture
def server(cache: FakeCache) -> Iterator[MetricsServer]:
    with serve_metrics(cache, 0) as started:
        yield started


def get(server: MetricsServer, path: str, method: str = "GET") -> str:
    request = urllib.request.Request(server.url + path, method=method)
    with urllib.request.urlopen(request, timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def samples(text: str) -> dict[tuple[str, str], float]:
    """Read an exposition: (name, value of its only label) -> value."""
    found: dict[tuple[str, str], float] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            label = "" if sample.name == "tierkv_cache_info" else "".join(sample.labels.values())
            found[sample.name, label] = sample.value
    return found


def test_the_endpoint_has_the_counters_of_the_cache(server: MetricsServer) -> None:
    found = samples(get(server, "/metrics"))
    assert found["tierkv_requests_total", ""] == 3
    assert found["tierkv_hits_total", "warm"] == 7 and found["tierkv_hits_total", "cold"] == 0
    assert found["tierkv_misses_total", "corrupt"] == 2 and found["tierkv_misses_total", "absent"] == 0
    assert found["tierkv_capacity_bytes", "hot"] == 640
    assert found["tierkv_fragmentation_ratio", ""] == 0.25
    assert found["tierkv_cache_info", ""] == 1


def test_every_counter_of_the_cache_has_a_metric() -> None:
    sums = {"hits", "hit_tokens", "eviction_count", "tiers", "misses", "skipped_writes"}  # told by tier or by reason
    told = {each.field for each in (*_OF_CACHE, *_BY_REASON)}
    assert {each.name for each in fields(CacheStats)} == told | sums
    assert {each.name for each in fields(TierStats)} == {each.field for each in _OF_TIER}


def test_every_reason_has_a_metric_before_it_first_happens(server: MetricsServer) -> None:
    found = samples(get(server, "/metrics"))
    assert {label for name, label in found if name == "tierkv_misses_total"} == {each.value for each in MissReason}
    skips = {label for name, label in found if name == "tierkv_skipped_writes_total"}
    assert {"queue_full", "stalled", "busy", "full", "io_error"} <= skips and "stored" not in skips


def test_the_server_listens_on_this_machine_alone(server: MetricsServer) -> None:
    assert server.url == f"http://127.0.0.1:{server.port}"


def test_the_status_names_the_largest_prefixes(cache: FakeCache, server: MetricsServer) -> None:
    cache.tell(EventKind.REGISTER, Tier.HOT, 9)
    status = json.loads(get(server, "/status"))
    assert status["requests"] == 3 and status["tiers"]["warm"]["hits"] == 7
    (prefix,) = status["prefixes"]
    assert prefix["block"] == "09" and prefix["blocks"] == {"hot": 1, "warm": 0}


@pytest.mark.parametrize(("path", "method", "code"), [("/", "GET", 404), ("/metrics", "POST", 405)])
def test_there_is_nothing_else_to_be_had(server: MetricsServer, path: str, method: str, code: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        get(server, path, method)
    assert refused.value.code == code
    refused.value.close()


def test_a_port_that_is_taken_is_refused_and_the_cache_left_alone(cache: FakeCache, server: MetricsServer) -> None:
    with pytest.raises(ConfigError, match=str(server.port)):
        serve_metrics(cache, server.port)
    assert len(cache.observers) == 1


def test_a_closed_server_neither_answers_nor_observes(cache: FakeCache) -> None:
    server = serve_metrics(cache, 0)
    server.close()
    server.close()
    assert cache.observers == []
    with pytest.raises(urllib.error.URLError):
        get(server, "/metrics")


def expressions(node: Any) -> Iterator[str]:
    """Yield every query in a dashboard."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key in ("expr", "definition") and isinstance(value, str))
        for value in node.values():
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(server: MetricsServer) -> None:
    labels: dict[str, set[str]] = {}
    for family in parser.text_string_to_metric_families(get(server, "/metrics")):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = list(expressions(json.loads(DASHBOARD.read_text())))
    used = {name for query in asked for name in re.findall(r"\btierkv_\w+", query)}
    assert used <= set(labels) and len(used) > 10
    for query in asked:
        for by in re.findall(r"by \((\w+)\)", query):
            assert all(by in labels[name] for name in re.findall(r"\btierkv_\w+", query)), query


def test_the_dashboard_shows_each_metric_somewhere(server: MetricsServer) -> None:
    exposed = {name for name, _ in samples(get(server, "/metrics"))}
    used = {n for query in expressions(json.loads(DASHBOARD.read_text())) for n in re.findall(r"\btierkv_\w+", query)}
    assert exposed == used


def report_of_daemon() -> StatusReport:
    """Return a report with a counter that the cache has too, and means something else by."""
    gauges = dict.fromkeys((each for each in StatusReport.__struct_fields__), 7)
    told = {
        "socket": "",
        "store": "",
        "tenants": [],
        "counters": {"skipped_writes": 3},
        "cold": {"blocks": 5},
        "limits": [LimitStatus(name="leases", used=3, limit=9)],
        "shares": [],
    }
    return StatusReport(**{**gauges, **told})  # type: ignore[arg-type]


def test_cache_and_daemon_share_no_metric_name(server: MetricsServer) -> None:
    of_cache, of_daemon = get(server, "/metrics"), exposition(report_of_daemon())
    families = [family.name for family in parser.text_string_to_metric_families(of_cache + of_daemon)]
    assert len(families) == len(set(families))
    both = samples(of_cache + of_daemon)
    assert both == samples(of_cache) | samples(of_daemon)
    assert both["tierkv_daemon_skipped_writes_total", ""] == 3 and both["tierkv_skipped_writes_total", "busy"] == 0
    assert both["tierkv_daemon_cold_blocks", ""] == 5 and both["tierkv_daemon_leased_slots", ""] == 7


def test_the_daemon_answers_a_scrape() -> None:
    async def scrape() -> bytes:
        async with await serve_metrics_of_daemon(0, report_of_daemon, timeout_s=10) as served:
            reader, writer = await asyncio.open_connection(*served.sockets[0].getsockname())
            writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
            answer = await reader.read()
            writer.close()
            return answer

    head, body = asyncio.run(scrape()).split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK") and f"Content-Length: {len(body)}".encode() in head
    assert samples(body.decode()) == samples(exposition(report_of_daemon()))
