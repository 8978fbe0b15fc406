"""The example of a FastAPI app: clients that vanish midway end their requests, and the others get their text."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from child_process import ENVIRONMENT
from serve_process import descriptors_of, threads_of

pytest.importorskip("fastapi", reason="of the extra dev")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def app(model_path: Path, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """Run the example as its text says; yield the URL and the process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", "examples", "fastapi_app:app", "--port", str(port)]
    environment = {**ENVIRONMENT, "TIERKV_MODEL": str(model_path), "TIERKV_STORE": str(tmp_path / "store")}
    log = tmp_path / "log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                load_of(url)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        yield url, process.pid
        process.terminate()
        assert process.wait(30) in (0, -15), log.read_text()
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def load_of(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/load", timeout=30) as answer:
        return dict(json.loads(answer.read()))


def story(url: str, about: str, tokens: int) -> str:
    with urllib.request.urlopen(f"{url}/stories?about={about}&tokens={tokens}", timeout=120) as answer:
        return str(answer.read().decode())


def test_clients_that_vanish_midway_cost_nothing_and_disturb_nobody(app: tuple[str, int]) -> None:
    url, pid = app
    host, port = url.removeprefix("http://").split(":")
    want = story(url, "disks", 60)
    assert len(want) == 60
    before = descriptors_of(pid), threads_of(pid)
    vanishing = []
    for number in range(20):
        connection = socket.create_connection((host, int(port)), timeout=60)
        connection.sendall(f"GET /stories?about={number}&tokens=2000 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        vanishing.append(connection)
    texts: list[str] = []
    readers = [threading.Thread(target=lambda: texts.append(story(url, "disks", 60))) for _ in range(4)]
    for reader in readers:
        reader.start()
    for number, connection in enumerate(vanishing):
        if number % 2:
            connection.recv(100)  # some have read a part
        connection.close()
    for reader in readers:
        reader.join(120)
    assert texts == [want] * 4
    deadline = time.monotonic() + 60
    while (load := load_of(url))["running"] or load["waiting"] or load["cancelled"] < 20:
        assert time.monotonic() < deadline, load
        time.sleep(0.1)
    assert load["cancelled"] == 20
    time.sleep(0.5)
    after = descriptors_of(pid), threads_of(pid)
    assert after[0] <= before[0] + 1 and after[1] <= before[1] + 1, (before, after)
    assert os.path.exists(f"/proc/{pid}")
