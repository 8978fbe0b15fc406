"""Real servers, and hostile ones, for tests of remote tiers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.slow_proxy import SlowProxy

__all__ = ["HostileServer", "Redis", "SlowProxy", "free_port", "need", "start_redis", "wait_until"]


def need(program: str) -> str:
    """Return a program's path; skip the test where it is not installed."""
    path = shutil.which(program) or shutil.which(program, path=str(Path(os.sys.executable).parent))  # type: ignore[attr-defined]
    if path is None:
        pytest.skip(f"{program} is not installed")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until(check: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=0.5):
        return True
    return False


class Redis:
    """One redis-server."""

    def __init__(self, folder: Path, *options: str, port: int | None = None, plain: bool = True) -> None:
        self.folder = folder
        self.port = port or free_port()
        folder.mkdir(parents=True, exist_ok=True)
        listening = ["--port", str(self.port)] if plain else []
        self._command = [need("redis-server"), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        self._command += ["--enable-debug-command", "yes", *listening, *options]
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_until(lambda: answers(self.port))

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(10)

    def command(self, *arguments: str | bytes | int) -> Any:
        redis = pytest.importorskip("redis")
        with redis.Redis(port=self.port, socket_timeout=5) as client:
            return client.execute_command(*arguments)


@contextlib.contextmanager
def start_redis(folder: Path, *options: str, plain: bool = True, port: int | None = None) -> Iterator[Redis]:
    pytest.importorskip("redis")
    server = Redis(folder, *options, plain=plain, port=port)
    try:
        yield server
    finally:
        server.resume()
        server.kill()


class HostileServer:
    """Answers the handshake-free RESP2 of one client with what a test chooses, for each command name."""

    def __init__(self, answers: dict[bytes, Callable[[list[bytes]], bytes | Iterator[bytes]]]) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.num_sent = 0
        self._is_closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._is_closed = True
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError, IndexError), connection, connection.makefile("rb") as file:
            while line := file.readline():
                arguments = []
                for _ in range(int(line[1:])):
                    size = int(file.readline()[1:])
                    arguments.append(file.read(size + 2)[:-2])
                answer = self._answers.get(arguments[0], lambda _: b"+OK\r\n")(arguments)
                for part in [answer] if isinstance(answer, bytes) else answer:
                    if self._is_closed:
                        return
                    connection.sendall(part)
                    self.num_sent += len(part)
