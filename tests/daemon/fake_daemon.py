"""A program that speaks as a daemon does and answers as a test wants: in threads of the test's own process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path

from tierkv.daemon.eviction_messages import Evictions, EvictionsSince
from tierkv.daemon.messages import Done, Failure, Found, Hello, Match, Message, Status, Welcome
from tierkv.daemon.protocol import FrameReader, frame, parse_body

__all__ = ["NUM_SLOTS", "FakeDaemon", "found", "numbers", "sealed_memory"]

NUM_SLOTS = 64
SLOT_BYTES = 4096
SEALS = 0x7  # against sealing, shrinking, growing

Answer = Callable[[Message], Message | bytes]


def sealed_memory(size: int = NUM_SLOTS * SLOT_BYTES, seals: int = SEALS) -> int:
    """Return a descriptor of anonymous memory with these content digests."""
    memory = os.memfd_create("fake", os.MFD_ALLOW_SEALING)
    os.ftruncate(memory, size)
    if seals:
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, seals)
    return memory


def numbers(*values: int) -> bytes:
    return array("I", values).tobytes()


def found(slots: bytes = b"", **fields: object) -> Found:
    plain = {"partial_block": None, "cursor": 0, "claim": 0, "is_computing": False, "miss": ""}
    return Found(slots=slots, **{**plain, **fields})  # type: ignore[arg-type]


def honest(message: Message) -> Message:
    """Return what a daemon with nothing in it says."""
    if isinstance(message, Match):
        return found()
    return Failure(message="no", is_fatal=False) if isinstance(message, Status) else Done()


def nothing_evicted(message: Message) -> Message:
    return Evictions(log=1, number=0, is_complete=True, evictions=[])


class FakeDaemon:
    """One socket; `answer` gives a message, or raw bytes to send. Context manager.

    slab_bytes, descriptors: what the welcome says, and what comes with it. chunk_s: how long each byte takes.
    evictions: the answer to who asks what was evicted. received: every other message; received_bytes: how much came
    at all.
    """

    def __init__(
        self,
        path: Path,
        answer: Answer = honest,
        *,
        slab_bytes: int = NUM_SLOTS * SLOT_BYTES,
        descriptors: Callable[[], list[int]] = lambda: [sealed_memory()],
        welcome: Callable[[Message], Message | bytes] | None = None,
        number: Callable[[int], int] = lambda number: number,
        chunk_s: float = 0.0,
        evictions: Answer = nothing_evicted,
    ) -> None:
        self.path = path
        self.boot = 77
        self.answer = answer
        self._evictions = evictions
        self.received: list[Message] = []
        self.received_bytes = 0
        self.num_greeted = 0
        self._slab_bytes = slab_bytes
        self._descriptors = descriptors
        self._welcome = welcome
        self._number = number
        self._chunk_s = chunk_s
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(8)
        self._start(self._accept)

    def __enter__(self) -> FakeDaemon:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (self._server, *self._connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(10)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._server.accept()
                self._connections.append(connection)
                self._start(self._serve, connection)

    def _serve(self, connection: socket.socket) -> None:
        reader = FrameReader()
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 20):
                self.received_bytes += len(data)
                reader.feed(data)
                while cut := reader.next():
                    number, _, body = cut
                    message = parse_body(body)
                    if isinstance(message, EvictionsSince):
                        self._send(connection, self._evictions(message), number)
                        continue
                    self.received.append(message)
                    if isinstance(message, Hello):
                        self._greet(connection, message, number)
                    elif number:
                        self._send(connection, self.answer(message), number)

    def _greet(self, connection: socket.socket, hello: Hello, number: int) -> None:
        self.num_greeted += 1
        own = Welcome(pid=os.getpid(), slab_bytes=self._slab_bytes, store="", has_cold=False)
        said = self._welcome(own) if self._welcome else own
        descriptors = self._descriptors() if hello.namespace else []
        data = said if isinstance(said, bytes) else bytes(frame(said, number=self._number(number), boot=self.boot))
        if descriptors:
            socket.send_fds(connection, [data[:1]], descriptors)
            data = data[1:]
            for each in descriptors:
                os.close(each)
        self._dribble(connection, data)

    def _send(self, connection: socket.socket, said: Message | bytes, number: int) -> None:
        if not isinstance(said, bytes):
            said = bytes(frame(said, number=self._number(number), boot=self.boot))
        self._dribble(connection, said)

    def _dribble(self, connection: socket.socket, data: bytes) -> None:
        if not self._chunk_s:
            connection.sendall(data)
            return
        for at in range(len(data)):
            connection.sendall(data[at : at + 1])
            time.sleep(self._chunk_s)
