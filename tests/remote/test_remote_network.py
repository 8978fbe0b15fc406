"""Two machines: two network namespaces, with 1 ms and 10 ms of delay and 1 Gbit/s, and a redis-server beside the first.

Delay and speed come from the kernel (netem) where it has that, else from a proxy in the first namespace.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_servers import free_port, need, wait_until

FIRST, SECOND = "tkvfirst", "tkvsecond"
ADDRESS = "10.231.77.1"
ROOT = Path(__file__).parents[2]


class Network:
    """Two namespaces and what runs in them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: list[subprocess.Popen[str]] = []
        self.has_netem = False
        self.url_first = self.url_second = ""

    def start(self, delay_ms: float) -> None:
        """Connect the namespaces, and start redis-server in the first."""
        folder = self._folder
        ip("netns", "add", FIRST)
        ip("netns", "add", SECOND)
        ip("link", "add", "tkv0", "netns", FIRST, "type", "veth", "peer", "name", "tkv1", "netns", SECOND)
        for name, device, address in ((FIRST, "tkv0", ADDRESS), (SECOND, "tkv1", "10.231.77.2")):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        port = free_port()
        server = [need("redis-server"), "--port", str(port), "--bind", "0.0.0.0", "--save", ""]
        self._start(FIRST, [*server, "--protected-mode", "no", "--dir", str(folder)])
        wait_until(lambda: not self._run(FIRST, ["redis-cli", "-p", str(port), "ping"]).returncode)
        self.has_netem = self._shape(delay_ms)
        self.url_first = f"redis://127.0.0.1:{port}?base_s=2"
        if not self.has_netem:
            proxy = [
                sys.executable,
                "-m",
                "benchmarks.slow_proxy",
                str(port),
                str(delay_ms / 1e3),
                "125e6",
                ADDRESS,
                "0",
            ]
            started = self._start(FIRST, proxy)
            assert started.stdout is not None
            port = int(started.stdout.readline())
        self.url_second = f"redis://{ADDRESS}:{port}?base_s=2"

    def tierkv(self, machine: str, url: str, *arguments: str) -> dict[str, Any]:
        """Run a command of tierkv in a namespace, with a store of that machine."""
        store = self._folder / f"store-{machine}"
        line = [sys.executable, "-m", "tierkv", *arguments, "--store", str(store), "--device", "cpu", "--json"]
        ended = self._run(machine, [*line, "--remote", url])
        assert not ended.returncode, ended.stderr
        result: dict[str, Any] = json.loads(ended.stdout)
        return result

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(10)
            if process.stdout:
                process.stdout.close()
        for name in (FIRST, SECOND):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def _shape(self, delay_ms: float) -> bool:
        rule = ["root", "netem", "delay", f"{delay_ms}ms", "rate", "1gbit"]
        devices = ((FIRST, "tkv0"), (SECOND, "tkv1"))
        lines = [["tc", "-n", name, "qdisc", "add", "dev", device, *rule] for name, device in devices]
        return not any(subprocess.run(line, capture_output=True, check=False).returncode for line in lines)

    def _start(self, machine: str, line: list[str]) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["ip", "netns", "exec", machine, *line],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        self._processes.append(process)
        return process

    def _run(self, machine: str, line: list[str]) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self._folder / "cache")}
        command = ["ip", "netns", "exec", machine, *line]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture(params=[1.0, 10.0], ids=["1ms", "10ms"])
def network(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Network]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces take root and the command ip")
    pytest.importorskip("redis")
    need("redis-server")
    if subprocess.run(["ip", "netns", "add", FIRST], capture_output=True, check=False).returncode:
        pytest.skip("this machine makes no network namespaces")
    ip("netns", "del", FIRST)
    opened = Network(tmp_path)
    try:
        opened.start(request.param)
        yield opened
    finally:
        opened.close()


@pytest.mark.slow
def test_what_one_machine_warms_the_other_answers_with_equal_tokens_also_when_the_first_is_gone(
    network: Network, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The quick brown fox jumps over the lazy dog. " * 120)
    warmed = network.tierkv(FIRST, network.url_first, "warm", str(prompts))
    assert warmed["blocks_computed"] > 3
    shutil.rmtree(tmp_path / f"store-{FIRST}")
    options = ("run", "What now?", "--system", str(prompts), "--max-new-tokens", "8", "--compare")
    answer = network.tierkv(SECOND, network.url_second, *options)
    assert answer["same_tokens"] and answer["max_logit_diff"] == pytest.approx(0, abs=1e-2)
    assert answer["cached_tokens"]["cold"] >= 256 * (warmed["blocks_computed"] - 1)
    print(
        f"delay by {'netem' if network.has_netem else 'a proxy'}: {answer['cached_tokens']['cold']} tokens, "
        f"first token {answer['ttft_s'] * 1e3:.0f} ms, computed {answer['recompute_ttft_s'] * 1e3:.0f} ms"
    )
