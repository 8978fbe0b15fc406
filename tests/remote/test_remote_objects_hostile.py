"""Object stores that lie: every lie costs an error or a miss, and no memory."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tierkv.errors import RemoteError
from tierkv.remote_tiers.protocol import CallTime, Deadline, RemoteClient, RemoteKey
from tierkv.remote_tiers.remotes import open_client
from tierkv.remote_tiers.urls import RemoteUrl

KEY = RemoteKey(bytes(16), bytes(16))
PIECE = b"x" * (1 << 16)
COMMON = "ETag: a\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n"
HUGE = f"Content-Length: {10**12}\r\n"


def head(status: str, *lines: str) -> bytes:
    return f"HTTP/1.1 {status}\r\n{COMMON}{''.join(lines)}\r\n".encode()


LIES = {
    "a refusal of a terabyte": head("403 Forbidden", HUGE),
    "an error of a terabyte": head("500 Oops", HUGE),
    "an absence of a terabyte": head("404 Not Found", HUGE),
    "an object of a terabyte": head("200 OK", HUGE),
    "a part of a terabyte": head("206 Partial Content", HUGE, f"Content-Range: bytes 0-{10**12 - 1}/{10**12}\r\n"),
    "more than the part": head("206 Partial Content", HUGE, "Content-Range: bytes 0-99/100\r\n"),
    "another part": head("206 Partial Content", "Content-Length: 100\r\n", "Content-Range: bytes 7-106/200\r\n"),
    "no length": head("200 OK", "Transfer-Encoding: chunked\r\n"),
    "two lengths": head("200 OK", "Transfer-Encoding: chunked\r\n", "Content-Length: 10\r\n"),
    "a negative length": head("200 OK", "Content-Length: -1\r\n"),
    "no object": head("200 OK", "Content-Length: 0\r\n"),
    "a head without end": b"HTTP/1.1 200 OK\r\nX: ",
    "another protocol": b"+OK\r\n\r\n",
    "an endless promise": head("100 Continue"),
    "no body": head("206 Partial Content", "Content-Length: 100\r\n", "Content-Range: bytes 0-99/100\r\n"),
}


@contextlib.contextmanager
def hostile(lie: str) -> Iterator[RemoteClient]:
    """A client of a server that answers each request so, then sends bytes for ever."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            request = b""
            while b"\r\n\r\n" not in request:
                request += connection.recv(1 << 16)
            connection.sendall(LIES[lie])
            while lie != "no body":
                connection.sendall(LIES[lie] if lie == "an endless promise" else PIECE)
            connection.recv(1)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    where = f"http://127.0.0.1:{listener.getsockname()[1]}"
    client = open_client(RemoteUrl.parse(f"s3://bucket/folder?endpoint={where}&allow_http=true&region=us-east-1"))
    try:
        yield client
    finally:
        client.close()
        listener.close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "key")


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_object_store_costs_no_memory_and_ends_no_process(lie: str) -> None:
    """obstore alone takes memory for the body of a refusal, and ends the process where that is too much."""
    with hostile(lie) as client:
        before = resident_bytes()

        def deadline() -> Deadline:
            return Deadline(CallTime(base_s=0.5))

        for _ in range(3):
            begin = time.monotonic()
            found = None
            with contextlib.suppress(RemoteError):
                found = client.read(KEY, deadline(), most_bytes=1000)
            assert found is None
            with contextlib.suppress(RemoteError):
                client.prefix([KEY] * 4, deadline())
            with contextlib.suppress(RemoteError):
                client.write(KEY, np.zeros(100, dtype=np.uint8), deadline(), replace=False)
            assert time.monotonic() - begin < 5.0
        assert resident_bytes() - before < 64 << 20


def test_a_bucket_that_is_not_there_takes_no_records() -> None:
    with hostile("an absence of a terabyte") as client, pytest.raises(RemoteError):
        client.write(KEY, np.zeros(100, dtype=np.uint8), Deadline(CallTime(base_s=0.5)), replace=False)
