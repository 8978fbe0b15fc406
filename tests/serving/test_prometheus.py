"""A real Prometheus scrapes a daemon and a server with its cache: every query of the dashboard returns numbers."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from child_process import ENVIRONMENT, TESTS
from serve_process import running_server

from tierkv.metrics.catalogue import groups
from tierkv.metrics.metric import Kind

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("prometheus") or not shutil.which("promtool"), reason="needs Prometheus"),
]

DASHBOARD = json.loads((Path(__file__).resolve().parents[2] / "examples/grafana_dashboard.json").read_text())
TIMEOUT_S = 60.0
SETTINGS = {"$__rate_interval": "30s", "$__range": "60s", "$instance": ".*", "$daemon": ".*"}


def queries_of(node: Any) -> Iterator[str]:
    """Yield every query in a dashboard."""
    if isinstance(node, dict):
        yield from (value for key, value in node.items() if key in ("expr", "definition") and isinstance(value, str))
        for value in node.values():
            yield from queries_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from queries_of(value)


QUERIES = list(dict.fromkeys(queries_of(DASHBOARD)))


def read(url: str, data: bytes | None = None) -> str:
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
        text: str = answer.read().decode()
    return text


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str
    scraped: dict[str, str]  # job -> address of its metrics

    def ask(self, path: str, **options: str) -> Any:
        answer = json.loads(read(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(options)}"))
        assert answer["status"] == "success", answer
        return answer["data"]

    def values(self, query: str) -> list[float]:
        """Return the values of a query; names of processes count as 1."""
        if match := re.fullmatch(r"label_values\((\w+), (\w+)\)", query):
            return [1.0 for _ in self.ask(f"label/{match[2]}/values", **{"match[]": match[1]})]
        for name, value in SETTINGS.items():
            query = query.replace(name, value)
        return [float(each["value"][1]) for each in self.ask("query", query=query)["result"]]


@contextmanager
def running_daemon(folder: Path) -> Iterator[str]:
    """Run a daemon and a client of it; yield the address of its metrics."""
    line = [sys.executable, "-m", "tierkv", "daemon", "start", "--socket", str(folder / "d.sock"), "--warm", "4M"]
    line += ["--store", str(folder / "daemon-store"), "--min-free", "0", "--metrics-port", "0", "--log-format", "json"]
    line += ["--remote", f"dir://{folder / 'remote'}"]
    line += ["--remote", f"dir://{folder / 'remote'}"]
    log = folder / "daemon.log"
    with log.open("w") as output, subprocess.Popen(line, env=ENVIRONMENT, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while "serving" not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.05)
            port = json.loads(log.read_text().splitlines()[0])["metrics_port"]
            yield f"http://127.0.0.1:{port}/metrics"
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


@contextmanager
def running_prometheus(folder: Path, **urls: str) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes these addresses every half second."""
    jobs = [
        {
            "job_name": job,
            "metrics_path": urllib.parse.urlsplit(url).path,
            "static_configs": [{"targets": [urllib.parse.urlsplit(url).netloc]}],
        }
        for job, url in urls.items()
    ]
    settings = folder / "prometheus.yml"
    settings.write_text(json.dumps({"global": {"scrape_interval": "500ms"}, "scrape_configs": jobs}))  # JSON is YAML
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    line = ["prometheus", f"--config.file={settings}", f"--storage.tsdb.path={folder / 'series'}"]
    line += [f"--web.listen-address={address}", "--log.level=warn"]
    with (
        (folder / "prometheus.log").open("w") as output,
        subprocess.Popen(line, stdout=output, stderr=output) as process,
    ):
        try:
            yield Prometheus(f"http://{address}", urls)
        finally:
            process.terminate()
            process.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def prometheus(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Return a Prometheus that has scraped a daemon and a server before and after they had work."""
    folder = tmp_path_factory.mktemp("p")
    (folder / "remote").mkdir()
    remote = ("--remote", f"dir://{folder / 'remote'}")
    with running_daemon(folder) as daemon, running_server(model_path, folder, *remote) as server:
        urls = {"daemon": daemon, "server": f"{server.url}/metrics"}
        with running_prometheus(folder, **urls) as found:
            wait_until(lambda: len(up(found)) == 2)
            work(folder, server.url)
            wait_until(lambda: min(found.values("tierkv_serve_answers_total{outcome='length'}"), default=0) >= 4)
            yield found


def up(found: Prometheus) -> list[float]:
    try:
        return [each for each in found.values("up") if each == 1]
    except OSError:
        return []  # it starts


def work(folder: Path, server: str) -> None:
    """Ask the server for answers, and the daemon for blocks."""
    body = {"model": str(json.loads(read(f"{server}/v1/models"))["data"][0]["id"]), "max_tokens": 4}
    for number, prompt in enumerate(("a" * 100, "a" * 100 + "b" * 50, "a" * 100 + "c" * 30, "a" * 200, "d" * 200)):
        read(f"{server}/v1/completions", json.dumps({**body, "prompt": prompt}).encode())
        if number % 2:
            time.sleep(1.2)  # two scrapes: calls of remote tiers have no samples before the first of them
    with pytest.raises(urllib.error.HTTPError):
        read(f"{server}/v1/completions", b"no JSON")
    line = [sys.executable, "-m", "tierkv", "tenant", "set", "default", "--store", str(folder / "daemon-store")]
    line += ["--warm-share", "1M", "--warm-limit", "4M", "--cold-share", "1M", "--cold-limit", "1G"]
    subprocess.run(line, env=ENVIRONMENT, check=True)
    path = f"{TESTS / 'daemon'}:{ENVIRONMENT['PYTHONPATH']}"
    line = [sys.executable, "-c", CLIENT, str(folder / "d.sock")]
    subprocess.run(line, env={**ENVIRONMENT, "PYTHONPATH": path}, check=True)


CLIENT = """
import sys, pathlib
from raw_client import chain_of, connect, tokens_of, write_prompt
from tierkv.daemon.messages import Done, Flush, Found, Match, Release
from tierkv.errors import DaemonError

client = connect(pathlib.Path(sys.argv[1]))
for start in range(3):
    tokens = tokens_of(16, start)
    write_prompt(client, tokens)
    client.call(Match(hashes=chain_of(tokens), tokens=tokens), Found)
missing = tokens_of(16, 99)
client.call(Match(hashes=chain_of(missing), tokens=missing), Found)
client.call(Flush(), Done)
try:
    client.call(Release(slots=b"123"), Done)
except DaemonError:
    pass
"""


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)


@pytest.mark.parametrize("query", QUERIES, ids=range(len(QUERIES)))
def test_each_query_of_the_dashboard_returns_numbers(prometheus: Prometheus, query: str) -> None:
    wait_until(lambda: any(map(math.isfinite, prometheus.values(query))))


def test_prometheus_has_every_metric_with_its_type_and_help(prometheus: Prometheus) -> None:
    known = prometheus.ask("metadata")
    for metric in (each for some in groups().values() for each in some):
        name = metric.exposed_name if metric.kind is Kind.INFO else metric.name
        found = known.get(metric.exposed_name) or known.get(name)
        assert found, f"{metric.exposed_name} was not scraped"
        kind = "gauge" if metric.kind is Kind.INFO else metric.kind.value
        assert (found[0]["type"], found[0]["help"]) == (kind, metric.help)


def test_promtool_accepts_what_the_processes_answer(prometheus: Prometheus) -> None:
    for url in prometheus.scraped.values():
        checked = subprocess.run(["promtool", "check", "metrics"], input=read(url), capture_output=True, text=True)
        assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_dashboard_shows_every_metric() -> None:
    shown = {name for query in QUERIES for name in re.findall(r"\btierkv_\w+", query)}
    shown = {re.sub(r"(?<=_seconds)_(bucket|sum|count)$", "", name) for name in shown}
    assert shown == {each.exposed_name for some in groups().values() for each in some}
