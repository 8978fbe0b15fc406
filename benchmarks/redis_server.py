"""A Redis server for a benchmark, and as much of its protocol as benchmarks need."""

from __future__ import annotations

import io
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from tierkv.errors import DaemonGoneError

__all__ = ["Resp", "redis_server", "wait_for"]


@contextmanager
def redis_server(server: str) -> Iterator[int]:
    """Run a server, and yield its port. server: the program."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    command = [server, "--port", str(port), "--save", "", "--appendonly", "no", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: Resp(port).close())
            yield port
        finally:
            process.terminate()


class Resp:
    """As much of Redis' protocol as is needed; values are received into memory that is there already."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._file = io.BufferedReader(socket.SocketIO(self._socket, "r"), buffer_size=1 << 20)

    def close(self) -> None:
        self._file.close()
        self._socket.close()

    def send(self, *words: bytes) -> None:
        parts = [b"*%d\r\n" % len(words)]
        for word in words:
            parts += [b"$%d\r\n" % len(word), word, b"\r\n"]
        self._socket.sendall(b"".join(parts))

    def line(self) -> bytes:
        answer = self._file.readline().rstrip()
        assert answer and not answer.startswith(b"-"), answer
        return answer

    def value_into(self, target: npt.NDArray[np.uint8]) -> None:
        assert int(self.line()[1:]) == len(target)
        view = memoryview(target)  # type: ignore[arg-type]
        while view:
            count = self._file.readinto(view)
            view = view[count:]
        self._file.readline()


def wait_for(attempt: Callable[[], None]) -> None:
    """Try again until a server answers. Raises TimeoutError."""
    for _ in range(400):
        try:
            attempt()
        except (DaemonGoneError, ConnectionError):
            time.sleep(0.05)
            continue
        return
    raise TimeoutError("a server did not come up")
