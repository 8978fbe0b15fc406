"""A blocking connection to the daemon, for any number of threads.

Whoever waits for an answer reads the socket for everybody, one thread at a time: a single thread pays for no
hand-over, and a request that takes long stands in nobody's way.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from pathlib import Path
from typing import TypeVar

from tierkv.daemon.messages import EvictionNotice, Failure, Hello, Message, Status, StatusReport, Welcome
from tierkv.daemon.protocol import FrameReader, ProtocolError, frame, parse_body
from tierkv.errors import DaemonError, DaemonGoneError

__all__ = ["CONNECT_TIMEOUT_S", "TIMEOUT_S", "DaemonClient"]

TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
_READ_BYTES = 256 << 10
_SOON_S = 0.05

Answer = TypeVar("Answer", bound=Message)


class DaemonClient:
    """One connection. Everything that the daemon gave to it goes back when it is closed, or its process dies.

    hello: names the namespace, or nothing for a client that only asks and steers.
    welcome: the daemon's answer. descriptor: the slab's, the caller's to close; None without a namespace.
    last_eviction: the newest that the daemon has told of.
    Raises DaemonGoneError where nobody answers, DaemonError where the daemon refuses.
    """

    def __init__(self, path: Path, hello: Hello | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self.path = path
        self.boot = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.last_eviction = 0
        self.descriptor: int | None = None
        self._timeout_s = timeout_s
        self._pid = os.getpid()
        self._reader = FrameReader()
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._is_reading = False
        self._waiting: set[int] = set()
        self._answers: dict[int, Message] = {}
        self._last_number = 0
        self._failure: str | None = None
        self._socket = _connect(path)
        try:
            self.welcome = self._greet(hello or Hello())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DaemonClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_alive(self) -> bool:
        """False once something has gone wrong: every further call fails."""
        return self._failure is None

    def has_hung_up(self) -> bool:
        """Tell, without waiting and without reading, whether the other end is closed."""
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return bool(poller.poll(0))

    def call(self, message: Message, expected: type[Answer], *, timeout_s: float | None = None) -> Answer:
        """Send a request and return its answer. Raises DaemonError if it is refused, DaemonGoneError otherwise.

        After a timeout the connection is of no use any more: an answer might still come.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        number = self._send(message, wants_answer=True)
        answer = self._receive(number, deadline)
        assert answer is not None
        return self._checked(message, answer, expected)

    def _checked(self, message: Message, answer: Message, expected: type[Answer]) -> Answer:
        if isinstance(answer, Failure):
            if answer.is_fatal:
                self._fail(answer.message)
            raise DaemonError(answer.message)
        if not isinstance(answer, expected):
            raise self._fail(f"{type(answer).__name__} came for {type(message).__name__}")
        return answer

    def call_long(self, message: Message, expected: type[Answer], *, timeout_s: float) -> Answer:
        """Do as `call`, for what may take long: while no answer comes, ask the daemon whether it is alive.

        Raises DaemonGoneError soon after the daemon stops answering, not only after `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        number = self._send(message, wants_answer=True)
        try:
            while True:
                at = min(deadline, time.monotonic() + self._timeout_s)
                answer = self._receive(number, at, may_return=at < deadline)
                if answer is not None:
                    return self._checked(message, answer, expected)
                self.call(Status(), StatusReport)
        finally:
            with self._changed:
                self._waiting.discard(number)
                self._answers.pop(number, None)

    def read_waiting(self) -> None:
        """Take in what the daemon has sent unasked, without waiting for more. Raises DaemonGoneError."""
        while self._failure is None and self._has_input():
            with self._changed:
                if self._is_reading:  # whoever reads takes it in
                    self._changed.wait(_SOON_S)
                    return
                self._is_reading = True
            try:
                self._read_some(time.monotonic() + _SOON_S)
            finally:
                with self._changed:
                    self._is_reading = False
                    self._changed.notify_all()

    def _has_input(self) -> bool:
        try:
            return _is_readable(self._socket, 0)
        except (OSError, ValueError) as exc:  # another thread has closed it
            raise self._fail(_why(exc)) from exc

    def post(self, message: Message) -> None:
        """Send a message that has no answer. Raises DaemonGoneError."""
        self._send(message, wants_answer=False)

    def close(self) -> None:
        """End the connection. May be called twice."""
        with self._changed:
            self._failure = self._failure or "the connection was closed"
            self._changed.notify_all()
        self._socket.close()
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    def take_descriptor(self) -> int:
        """Return the slab's descriptor; whoever takes it closes it."""
        assert self.descriptor is not None, "the daemon hands it over once, to who named a namespace"
        descriptor, self.descriptor = self.descriptor, None
        return descriptor

    def _greet(self, hello: Hello) -> Welcome:
        """Say hello; the answer may carry a descriptor."""
        self._send_bytes(frame(hello, number=1, boot=0))
        deadline = time.monotonic() + max(self._timeout_s, CONNECT_TIMEOUT_S)
        while True:
            try:
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-3))
                data, descriptors, _, _ = socket.recv_fds(self._socket, _READ_BYTES, 1)
            except OSError as exc:
                raise self._fail(_why(exc)) from exc
            if descriptors:
                self.descriptor = descriptors[0]
                os.set_inheritable(self.descriptor, False)
            if not data:
                raise self._fail("it closed the connection")
            self.bytes_received += len(data)
            self._reader.feed(data)
            cut = self._cut()
            if cut is None:
                continue
            _, self.boot, body = cut
            answer = parse_body(body)
            if isinstance(answer, Failure):
                raise DaemonError(f"the daemon at {self.path} refused: {answer.message}")
            if not isinstance(answer, Welcome):
                raise self._fail(f"{type(answer).__name__} came for Hello")
            if hello.namespace and self.descriptor is None:
                raise self._fail("it kept its slab to itself")
            return answer

    def _cut(self) -> tuple[int, int, bytes] | None:
        try:
            return self._reader.next()
        except ProtocolError as exc:
            self._fail(str(exc))
            raise DaemonError(f"the daemon at {self.path} speaks another protocol: {exc}") from exc

    def _send(self, message: Message, *, wants_answer: bool) -> int:
        if os.getpid() != self._pid:
            raise DaemonGoneError("a connection to the daemon cannot be used in a forked process")
        if self._failure is not None:
            raise DaemonGoneError(f"the daemon at {self.path} is gone: {self._failure}")
        number = 0
        if wants_answer:
            with self._changed:
                number = self._last_number % 0xFFFF + 1
                while number in self._waiting:
                    number = number % 0xFFFF + 1
                self._last_number = number
                self._waiting.add(number)
        try:
            self._send_bytes(frame(message, number=number, boot=self.boot))
        except BaseException:
            with self._changed:
                self._waiting.discard(number)
            raise
        return number

    def _send_bytes(self, data: bytearray) -> None:
        with self._sending:
            try:
                self._socket.settimeout(self._timeout_s)
                self._socket.sendall(data)
                self.bytes_sent += len(data)
            except OSError as exc:
                raise self._fail(_why(exc)) from exc

    def _receive(self, number: int, deadline: float, *, may_return: bool = False) -> Message | None:
        """Wait for one answer; read for everybody while nobody else does.

        may_return: return None when the time is over, with the answer still awaited, instead of failing.
        """
        is_awaited = False
        try:
            while True:
                with self._changed:
                    while True:
                        if number in self._answers:
                            return self._answers.pop(number)
                        if self._failure is not None:
                            raise DaemonGoneError(f"the daemon at {self.path} is gone: {self._failure}")
                        if not self._is_reading:
                            break
                        if not self._changed.wait(max(deadline - time.monotonic(), 0)):
                            if may_return:
                                is_awaited = True
                                return None
                            raise self._fail("it did not answer in time")
                    self._is_reading = True
                try:
                    if may_return and not _is_readable(self._socket, max(deadline - time.monotonic(), 0)):
                        is_awaited = True
                        return None
                    self._read_some(deadline)
                finally:
                    with self._changed:
                        self._is_reading = False
                        self._changed.notify_all()
        finally:
            if not is_awaited:
                with self._changed:
                    self._waiting.discard(number)

    def _read_some(self, deadline: float) -> None:
        try:
            data = self._wait_readable(deadline)
        except OSError as exc:
            raise self._fail(_why(exc)) from exc
        if not data:
            raise self._fail("it closed the connection")
        self.bytes_received += len(data)
        self._reader.feed(data)
        while (cut := self._cut()) is not None:
            number, boot, body = cut
            if boot != self.boot:
                raise self._fail("another daemon answered")
            try:
                answer = parse_body(body)
            except ProtocolError as exc:
                raise self._fail(str(exc)) from exc
            with self._changed:
                if number in self._waiting:
                    self._answers[number] = answer
                elif isinstance(answer, EvictionNotice):
                    self.last_eviction = max(self.last_eviction, answer.number)
                elif isinstance(answer, Failure) and answer.is_fatal:
                    raise self._fail(answer.message)

    def _wait_readable(self, deadline: float) -> bytes:
        """Return the next bytes. Does not touch the socket's timeout, which belongs to the senders."""
        left = deadline - time.monotonic()
        if left <= 0 or not _is_readable(self._socket, left):
            raise TimeoutError
        return self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)

    def _fail(self, why: str) -> DaemonGoneError:
        with self._changed:
            self._failure = self._failure or why
            self._changed.notify_all()
        return DaemonGoneError(f"the daemon at {self.path} is gone: {self._failure}")


def _connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
    except (OSError, ValueError) as exc:
        connection.close()
        raise DaemonGoneError(
            f"no daemon answers at {path}: {_why(exc)}", hint="tierkv daemon start --detach starts one"
        ) from exc
    with contextlib.suppress(OSError):
        connection.set_inheritable(False)
    return connection


def _is_readable(connection: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(timeout_s * 1e3))


def _why(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "it did not answer in time"
    return getattr(exc, "strerror", None) or str(exc)
