"""SignedObjects: gets and puts objects of S3 over connections of its own, by URLs that obstore signs.

obstore receives the body of a refusal whole. A server that announces a terabyte of it ends the process. Here no body is
longer than the caller allows, and a value is received into the memory that the caller keeps.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.http_wire import Answer, HttpWire
from tierkv.remote_tiers.protocol import Deadline, RemoteDamageError
from tierkv.remote_tiers.record_memory import RecordMemory
from tierkv.storage.codec import Bytes

__all__ = ["SignedObjects"]

_SIGNED_FOR = timedelta(minutes=5)
_MOST_IDLE = 32
_DENIED = (401, 403)
_EXISTS = (409, 412)
_EXPECTED = {"GET": (200, 206, 404, 416), "PUT": (200, 201, *_EXISTS)}


class SignedObjects:
    """Satisfies `ObjectTransfer`. Thread-safe. store: of obstore, which has the address and the credentials."""

    def __init__(self, obstore: Any, store: Any) -> None:
        self._obstore = obstore
        self._store = store
        self._memory = RecordMemory()
        self._tls: ssl.SSLContext | None = None
        self._lock = threading.Lock()
        self._idle: list[HttpWire] = []
        self._is_closed = False

    def get(
        self, path: str, *, start: int, num_bytes: int, most_bytes: int, deadline: Deadline
    ) -> tuple[int, Bytes] | None:
        """Return an object's size and its bytes from `start` on; see `ObjectTransfer`."""
        wanted = {"Range": f"bytes={start}-{start + num_bytes - 1}"}
        with self._asked("GET", path, wanted, deadline) as (wire, answer):
            if answer.status == 404:
                return None
            if answer.status == 416:
                raise RemoteDamageError("an object is shorter than any record")
            size, length = _sizes(answer, start)
            if not 0 < size <= most_bytes or length != min(num_bytes, size - start):
                raise RemoteDamageError(f"an object of {size} bytes is no record of this layout")
            if not start:
                deadline.allow_bytes(size)
            memory = self._memory.take(length)
            wire.receive_into(memory.data, deadline)
            return size, memory

    def put(self, path: str, record: Bytes, *, replace: bool, deadline: Deadline) -> bool:
        """Create an object; see `ObjectTransfer`."""
        condition = {} if replace else {"If-None-Match": "*"}
        with self._asked("PUT", path, condition, deadline, body=record) as (_, answer):
            return answer.status not in _EXISTS

    def close(self) -> None:
        """Close all connections that are not in use. May be called twice."""
        with self._lock:
            self._is_closed = True
            wires, self._idle = self._idle, []
        for wire in wires:
            wire.close()

    @contextlib.contextmanager
    def _asked(
        self, method: str, path: str, headers: Mapping[str, str], deadline: Deadline, *, body: Bytes | None = None
    ) -> Iterator[tuple[HttpWire, Answer]]:
        """Send a request; yield what answers it. The connection is kept if the body is received, or short.

        Raises RemoteError, and RemoteRefusedError where the server does not allow it.
        """
        url = urlsplit(self._obstore.sign(self._store, method, path, _SIGNED_FOR))
        wire = self._take_idle() or self._connect(url.scheme, url.hostname or "", url.port, deadline)
        may_be_kept = False
        try:
            answer = wire.ask(method, f"{url.path}?{url.query}", {"Host": url.netloc, **headers}, deadline, body=body)
            if answer.status in _DENIED:
                raise RemoteRefusedError("the object store does not allow that", code="PermissionDenied")
            if answer.status not in _EXPECTED[method]:
                raise RemoteError(f"the object store answers with status {answer.status}")
            yield wire, answer
            is_read = method == "GET" and answer.status in (200, 206)
            may_be_kept = is_read or wire.skip_body(answer, deadline)
        finally:
            if not may_be_kept or not self._keep(wire):
                wire.close()

    def _take_idle(self) -> HttpWire | None:
        while True:
            with self._lock:
                wire = self._idle.pop() if self._idle else None
            if wire is None or not wire.is_stale():
                return wire
            wire.close()

    def _keep(self, wire: HttpWire) -> bool:
        with self._lock:
            if self._is_closed or wire.unread or len(self._idle) >= _MOST_IDLE:
                return False
            self._idle.append(wire)
            return True

    def _connect(self, scheme: str, host: str, port: int | None, deadline: Deadline) -> HttpWire:
        is_tls = scheme == "https"
        try:
            connected = socket.create_connection((host, port or (443 if is_tls else 80)), timeout=deadline.left_s())
        except OSError as exc:
            raise RemoteError(f"the object store cannot be reached: {type(exc).__name__}") from None
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if is_tls:
                connected.settimeout(deadline.left_s())
                connected = self._tls_context().wrap_socket(connected, server_hostname=host)
        except OSError as exc:
            connected.close()
            raise RemoteError(f"the object store speaks no TLS that is trusted: {type(exc).__name__}") from None
        return HttpWire(connected)

    def _tls_context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = ssl.create_default_context()
            return self._tls


def _sizes(answer: Answer, start: int) -> tuple[int, int]:
    """Return the size of an object, and of the part that follows. Raises RemoteError where the answer lacks them."""
    length, part = answer.num_bytes, answer.range
    if length is None:
        raise RemoteError("the object store does not say how long an object is")
    if answer.status == 200 and start == 0:
        return length, length
    if part is None or part[0] != start or part[1] - part[0] + 1 != length or part[1] >= part[2]:
        raise RemoteError("the object store sends another part than it was asked for")
    return part[2], length
