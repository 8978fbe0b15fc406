"""The metrics endpoint over a cache whose counters are known, and the dashboard that reads it."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import fields

import msgspec
import pytest
from fake_cache import FakeCache

from tierkv.daemon.messages import LimitStatus, ShareStatus, StatusReport, TenantStatus
from tierkv.daemon.metrics import metrics_of as metrics_of_daemon
from tierkv.daemon.metrics import serve_metrics as serve_metrics_of_daemon
from tierkv.errors import ConfigError
from tierkv.metrics.catalogue import CACHE_BY_REASON, CACHE_BY_TIER, CACHE_TOTALS, groups
from tierkv.metrics.exposition import exposition
from tierkv.metrics.metric import Kind
from tierkv.profiling import metrics as module
from tierkv.profiling.metrics import MetricsServer, metrics_of, serve_metrics
from tierkv.remote_tiers.recorder import RemoteRecorder
from tierkv.serving.monitor import Monitor
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import Tier
from tierkv.values.events import EventKind
from tierkv.values.stats import CacheStats, TierStats

parser = pytest.importorskip("prometheus_client.parser")


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
    told = {each.source for each in (*CACHE_TOTALS, *CACHE_BY_REASON)} | {"remotes"}
    assert {each.name for each in fields(CacheStats)} == told | sums
    assert {each.name for each in fields(TierStats)} == {each.source for each in CACHE_BY_TIER}


def test_a_remote_tier_has_its_counters_and_times_under_its_safe_url(cache: FakeCache, server: MetricsServer) -> None:
    recorder = RemoteRecorder()
    recorder.count("read_hits", 5)
    for seconds in (10e-6, 100e-6, 100e-6):
        recorder.time("prefix", seconds)
    cache.counters["remotes"] = (recorder.snapshot("redis://host", is_up=True),)
    families = {each.name: each for each in parser.text_string_to_metric_families(get(server, "/metrics"))}
    (up,) = families["tierkv_remote_up"].samples
    assert up.labels == {"remote": "redis://host"} and up.value == 1
    (hits,) = families["tierkv_remote_events"].samples
    assert hits.labels["event"] == "read_hits" and hits.value == 5
    counted = {
        each.labels["le"]: each.value for each in families["tierkv_remote_call_seconds"].samples if "le" in each.labels
    }
    assert counted["1.6e-05"] == 1 and counted["0.000128"] == 3 and counted["+Inf"] == 3
    (remote,) = json.loads(get(server, "/status"))["remotes"]
    assert remote["counters"] == {"read_hits": 5} and remote["calls"]["prefix"]["us_p50"] == 128


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


def report_of_daemon() -> StatusReport:
    """Return a report with a counter that the cache has too, and means something else by."""
    gauges = dict.fromkeys((each for each in StatusReport.__struct_fields__), 7)
    told = {
        "socket": "",
        "store": "",
        "tenants": [
            TenantStatus(
                namespace="ab" * 16,
                name='a "model"\n',
                block_bytes=10,
                warm_blocks=3,
                pinned_bytes=20,
                clients=2,
                owner="cd" * 32,
            )
        ],
        "shares": [
            ShareStatus(
                owner="",
                name="shop",
                warm_bytes=30,
                warm_share=10,
                warm_limit=40,
                cold_bytes=50,
                cold_share=0,
                cold_limit=-1,
            )
        ],
        "counters": {
            "skipped_writes": 3,
            "published_blocks": 4,
            "evicted_blocks": 6,
            "remotes_up": 1,
            "remote_read_hits": 8,
        },
        "reasons": {"skipped_writes": {"full": 2, "of another version": 1}},
        "cold": {"blocks": 5, "live_bytes": 50, "quota_bytes": 90, "evicted_blocks": 1},
        "limits": [LimitStatus(name="leases", used=3, limit=9)],
        "version": "1.2",
    }
    return StatusReport(**{**gauges, **told})  # type: ignore[arg-type]


def text_of_daemon() -> str:
    return exposition(metrics_of_daemon(report_of_daemon()))[0].decode()


def text_of_server(cache: FakeCache) -> str:
    monitor = Monitor()
    monitor.record(outcome="stop", prompt_tokens=100, cached_tokens=0, new_tokens=2, ttft_s=0.5)
    monitor.record(outcome="stop", prompt_tokens=100, cached_tokens=90, new_tokens=2, ttft_s=0.1)
    monitor.statuses[200] += 2
    return exposition((*metrics_of(cache), *monitor.metrics({"running": 4})))[0].decode()


def test_a_server_shows_its_answers_beside_its_cache(cache: FakeCache) -> None:
    found = samples(text_of_server(cache))
    assert found["tierkv_requests_total", ""] == 3 and found["tierkv_serve_requests_total", "200"] == 2
    assert found["tierkv_serve_answers_total", "stop"] == 2 and found["tierkv_serve_answers_total", "error"] == 0
    assert found["tierkv_serve_running", ""] == 4 and found["tierkv_serve_waiting", ""] == 0
    assert found["tierkv_serve_first_token_seconds_sum", ""] == 0.6
    assert found["tierkv_serve_first_token_seconds_bucket", "0.1"] == 1
    assert found["tierkv_serve_first_token_seconds_bucket", "+Inf"] == 2
    assert found["tierkv_serve_saved_seconds_total", ""] == pytest.approx(0.4)


def test_the_daemon_shows_tiers_tenants_and_reasons() -> None:
    found = samples(text_of_daemon())
    assert found["tierkv_daemon_blocks", "warm"] == 3 and found["tierkv_daemon_blocks", "cold"] == 5
    assert found["tierkv_daemon_evictions_total", "warm"] == 6 and found["tierkv_daemon_evictions_total", "cold"] == 1
    assert found["tierkv_daemon_skipped_writes_total", "full"] == 2
    assert found["tierkv_daemon_skipped_writes_total", "of another version"] == 1
    assert found["tierkv_daemon_skipped_writes_total", "busy"] == 0, "a reason is shown before it first happens"
    assert found["tierkv_daemon_missed_blocks_total", "absent"] == 0
    assert found["tierkv_daemon_published_blocks_total", ""] == 4
    assert found["tierkv_daemon_uptime_seconds", ""] == 7 and found["tierkv_daemon_received_bytes_total", ""] == 7
    assert found["tierkv_daemon_limit_used", "leases"] == 3 and found["tierkv_daemon_limit", "leases"] == 9
    name = 'a "model"\nababababababcdcdcdcdcdcd'  # its labels in the order of their names
    assert found["tierkv_daemon_namespace_bytes", name] == 30
    assert found["tierkv_daemon_info", "1.2"] == 1
    assert (
        found["tierkv_daemon_tenant_bytes", "shopwarm"] == 30 and found["tierkv_daemon_tenant_bytes", "shopcold"] == 50
    )
    assert found["tierkv_daemon_tenant_limit_bytes", "shopwarm"] == 40
    assert ("tierkv_daemon_tenant_limit_bytes", "shopcold") not in found, "it has none"
    assert found["tierkv_daemon_remote_events_total", "read_hits"] == 8 and found["tierkv_daemon_remotes_up", ""] == 1


def test_a_daemon_without_a_store_shows_no_cold_tier() -> None:
    report = msgspec.structs.replace(report_of_daemon(), cold={})
    found = samples(exposition(metrics_of_daemon(report))[0].decode())
    assert ("tierkv_daemon_blocks", "warm") in found and ("tierkv_daemon_blocks", "cold") not in found


def test_every_metric_of_the_catalogue_is_exposed_with_its_type_and_help(cache: FakeCache) -> None:
    exposed = {"daemon": text_of_daemon(), "server": text_of_server(cache)}
    shown = {
        each.name: (each.type, each.documentation)
        for text in exposed.values()
        for each in parser.text_string_to_metric_families(text)
    }
    suffix = {Kind.INFO: "_info"}  # in this format, an info metric is a gauge of that name
    kinds = {Kind.INFO: "gauge"}
    listed = {
        each.name + suffix.get(each.kind, ""): (kinds.get(each.kind, each.kind.value), each.help)
        for some in groups().values()
        for each in some
    }
    assert shown == listed


def test_names_have_units_and_labels_that_prometheus_asks_for() -> None:
    for metric in (each for some in groups().values() for each in some):
        assert metric.help.endswith(".") and len(metric.help) > 10
        assert (metric.kind is Kind.COUNTER) == metric.exposed_name.endswith("_total")
        assert not metric.name.endswith(("_s", "_ms", "_total")), "seconds, and no suffix twice"
        assert set(metric.labels) <= {
            *("tier", "tenant", "reason", "namespace", "model", "outcome", "status", "resource", "version"),
            *("dtype", "block_size", "block_bytes", "remote", "event", "call"),
        }


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_accepts_the_exposition(cache: FakeCache) -> None:
    for text in (text_of_daemon(), text_of_server(cache)):
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_cache_and_daemon_share_no_metric_name(server: MetricsServer) -> None:
    of_cache, of_daemon = get(server, "/metrics"), text_of_daemon()
    names = [each.name for each in parser.text_string_to_metric_families(of_cache + of_daemon)]
    assert len(names) == len(set(names))
    both = samples(of_cache + of_daemon)
    assert both == samples(of_cache) | samples(of_daemon)
    assert both["tierkv_daemon_skipped_writes_total", "full"] == 2 and both["tierkv_skipped_writes_total", "busy"] == 0


def scrape(request: bytes) -> bytes:
    async def ask() -> bytes:
        async with await serve_metrics_of_daemon(0, report_of_daemon, timeout_s=10) as served:
            reader, writer = await asyncio.open_connection(*served.sockets[0].getsockname())
            writer.write(request)
            answer = await reader.read()
            writer.close()
            return answer

    return asyncio.run(ask())


def test_the_daemon_answers_a_scrape() -> None:
    head, body = scrape(b"GET /metrics HTTP/1.1\r\nHost: localhost:1\r\n\r\n").split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK") and f"Content-Length: {len(body)}".encode() in head
    assert samples(body.decode()) == samples(text_of_daemon())


@pytest.mark.parametrize(
    ("request_line", "status"), [(b"GET /", b"404"), (b"POST /metrics", b"405"), (b"", b"405"), (b"GET", b"404")]
)
def test_the_daemon_answers_nothing_else(request_line: bytes, status: bytes) -> None:
    assert scrape(request_line + b" HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 " + status)


def test_the_daemon_answers_under_local_names_only() -> None:
    """A page of another site could make its own name lead to this machine, and read the names of models."""
    asked = b"GET /metrics HTTP/1.1\r\nhost: a-name.example\r\n\r\n"
    assert scrape(asked).startswith(b"HTTP/1.0 403 Forbidden")
    assert scrape(asked.replace(b"a-name.example", b"127.0.0.1:9")).startswith(b"HTTP/1.0 200")


@pytest.mark.parametrize("trouble", ["sends nothing", "reads nothing"])
def test_a_scraper_that_is_too_slow_is_disconnected_by_the_daemon(trouble: str) -> None:
    report = report_of_daemon()
    report.tenants = [
        TenantStatus(
            namespace=f"{at:08x}" * 4, name="m" * 5000, block_bytes=1, warm_blocks=1, pinned_bytes=0, clients=1
        )
        for at in range(300)  # more than the buffers of a socket take
    ]

    async def ask() -> None:
        loop = asyncio.get_running_loop()
        async with await serve_metrics_of_daemon(0, lambda: report, timeout_s=0.5) as served:
            with ExitStack() as opened:
                for _ in range(16):
                    slow = opened.enter_context(socket.socket())
                    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                    slow.setblocking(False)
                    await loop.sock_connect(slow, served.sockets[0].getsockname())
                    if trouble == "reads nothing":
                        await loop.sock_sendall(slow, b"GET /metrics HTTP/1.1\r\n\r\n")
                await scraped_at_last(served)

    asyncio.run(asyncio.wait_for(ask(), 30))


async def scraped_at_last(served: asyncio.Server) -> None:
    """Ask until there is room for one more scraper."""
    while True:
        reader, writer = await asyncio.open_connection(*served.sockets[0].getsockname())
        answer = b""
        with suppress(ConnectionError):
            writer.write(b"GET /missing HTTP/1.1\r\n\r\n")
            answer = await reader.read()
        writer.close()
        await asyncio.sleep(0.05)
        if answer.startswith(b"HTTP/1.0 404"):
            return


def test_the_daemon_has_no_more_scrapers_than_its_limit() -> None:
    async def ask() -> None:
        async with await serve_metrics_of_daemon(0, report_of_daemon, timeout_s=10) as served:
            address = served.sockets[0].getsockname()
            opened = [await asyncio.open_connection(*address) for _ in range(16)]
            reader, writer = await asyncio.open_connection(*address)
            assert await asyncio.wait_for(reader.read(), 5) == b""
            writer.close()
            for _, each in opened:
                each.close()
            await scraped_at_last(served)

    asyncio.run(asyncio.wait_for(ask(), 30))


def test_the_cache_answers_under_local_names_only_on_a_local_address(cache: FakeCache, server: MetricsServer) -> None:
    asked = urllib.request.Request(server.url + "/status", headers={"Host": "a-name.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(asked, timeout=10)
    assert refused.value.code == 403
    refused.value.close()
    with serve_metrics(cache, 0, host="0.0.0.0") as open_to_all:
        asked = urllib.request.Request(
            f"http://127.0.0.1:{open_to_all.port}/status", headers={"Host": "a-name.example"}
        )
        with urllib.request.urlopen(asked, timeout=10) as answer:
            assert answer.status == 200


def test_the_cache_has_no_more_scrapers_than_its_limit_and_disconnects_slow_ones(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_TIMEOUT_S", 1.0)
    slow = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(17)]
    with slow.pop() as refused:
        assert refused.recv(1) == b"", "one more than the limit"
    slow[0].sendall(b"GET /met")
    for each in slow:
        assert each.recv(1) == b""
        each.close()
    assert "tierkv_requests_total" in get(server, "/metrics")
    assert "Traceback" not in capfd.readouterr().err


def test_a_connection_for_which_no_thread_can_be_started_is_closed_and_leaves_its_room(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(timer: object) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(module.threading.Timer, "start", fail)
        for _ in range(17):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as opened:
                opened.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                with suppress(ConnectionResetError):
                    assert opened.recv(1) == b""
    assert "tierkv_requests_total" in get(server, "/metrics")
