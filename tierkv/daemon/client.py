"""A blocking connection to the daemon, for any number of threads.

Whoever waits for an answer reads the socket for everybody, one thread at a time: a single thread pays for no
hand-over, and a request that takes long stands in nobody's way.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
import weakref
from pathlib import Path
from typing import TypeVar

from tierkv.daemon.answers import AnswerCheck, WrongAnswerError, plain_text
from tierkv.daemon.messages import EvictionNotice, Failure, Hello, Message, Status, StatusReport, Welcome
from tierkv.daemon.protocol import FrameReader, ProtocolError, frame, parse_body
from tierkv.errors import DaemonError, DaemonGoneError
from tierkv.values.checks import check_seconds

__all__ = ["CONNECT_TIMEOUT_S", "TIMEOUT_S", "DaemonClient"]

TIMEOUT_S = 10.0
CONNECT_TIMEOUT_S = 5.0
_READ_BYTES = 256 << 10
_MOST_DESCRIPTORS = 16  # taken from a greeting, to be closed: the slab's is the only one that may come
_LONGEST_WAIT_S = 3600.0  # of one system call, which takes milliseconds as an int
_CREDENTIALS = struct.Struct("iII")
_SOON_S = 0.05

Answer = TypeVar("Answer", bound=Message)


class DaemonClient:
    """One connection. Everything that the daemon gave to it goes back when it is closed, or its process dies.

    hello: names the namespace, or nothing for a client that only asks and steers.
    welcome: the daemon's answer. descriptor: the slab's, the caller's to close; None without a namespace.
    last_eviction: the newest that the daemon has told of.
    Nothing is sent to a daemon of another user than the own one or root, and no answer is returned that cannot be:
    see `AnswerCheck`. A process that is forked from this one has no use of the connection, and does not keep it open.
    Raises DaemonGoneError where nobody answers, DaemonError where the daemon refuses, or is another user's.
    """

    def __init__(self, path: Path, hello: Hello | None = None, *, timeout_s: float = TIMEOUT_S) -> None:
        self.path = path
        self.boot = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        self.last_eviction = 0
        self.descriptor: int | None = None
        self._timeout_s = check_seconds("timeout_s", timeout_s, may_be_zero=False)
        self._pid = os.getpid()
        self._has_lied = False
        self._reader = FrameReader()
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._is_reading = False
        self._waiting: set[int] = set()
        self._answers: dict[int, Message] = {}
        self._last_number = 0
        self._failure: str | None = None
        self._socket = _connect(path)
        _CLIENTS.add(self)
        try:
            self.welcome = self._greet(hello or Hello())
            self._check = AnswerCheck.of(hello or Hello(), self.welcome)
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

    @property
    def failure(self) -> str | None:
        """What has gone wrong, if anything has."""
        return self._failure

    @property
    def has_lied(self) -> bool:
        """Whether the daemon has answered what cannot be: it is not worth asking again."""
        return self._has_lied

    def has_hung_up(self) -> bool:
        """Tell, without waiting and without reading, whether the other end is closed."""
        self._require_own_process()
        if self._failure is not None:
            return True
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return bool(poller.poll(0))

    def call(self, message: Message, expected: type[Answer], *, timeout_s: float | None = None) -> Answer:
        """Send a request and return its answer. Raises DaemonError if it is refused, DaemonGoneError otherwise.

        After a timeout, and after an interrupt, the connection is of no use any more: an answer might still come.
        """
        if timeout_s is not None:
            check_seconds("timeout_s", timeout_s)
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        number = self._send(message, wants_answer=True)
        answer = self._receive(number, deadline)
        assert answer is not None
        return self._checked(message, answer, expected)

    def _checked(self, message: Message, answer: Message, expected: type[Answer]) -> Answer:
        if isinstance(answer, Failure):
            said = plain_text(answer.message)
            if answer.is_fatal:
                self._fail(said)
            raise DaemonError(said)
        if not isinstance(answer, expected):
            raise self.disbelieve(f"{type(answer).__name__} came for {type(message).__name__}")
        try:
            self._check.check(message, answer)
        except WrongAnswerError as exc:
            raise self.disbelieve(str(exc)) from exc
        return answer

    def disbelieve(self, why: str) -> DaemonGoneError:
        """End the connection to a daemon that has answered what cannot be; return the error to raise."""
        self._has_lied = True
        return self._fail(why)

    def call_long(self, message: Message, expected: type[Answer], *, timeout_s: float) -> Answer:
        """Do as `call`, for what may take long: while no answer comes, ask the daemon whether it is alive.

        Raises DaemonGoneError soon after the daemon stops answering, not only after `timeout_s`.
        """
        deadline = time.monotonic() + check_seconds("timeout_s", timeout_s)
        number = self._send(message, wants_answer=True)
        try:
            while True:
                at = min(deadline, time.monotonic() + self._timeout_s)
                answer = self._receive(number, at, may_return=at < deadline)
                if answer is not None:
                    return self._checked(message, answer, expected)
                self.call(Status(), StatusReport)
        except (DaemonError, OSError):
            raise
        except BaseException:
            self._fail("a call was interrupted")
            raise
        finally:
            self._forget(number)

    def read_waiting(self) -> None:
        """Take in what the daemon has sent unasked, without waiting for more. Raises DaemonGoneError."""
        self._require_own_process()
        until = time.monotonic() + _SOON_S  # a daemon that sends without end keeps nobody here
        while self._failure is None and self._has_input(0) and time.monotonic() < until:
            with self._changed:
                if self._is_reading:  # whoever reads takes it in
                    self._changed.wait(_SOON_S)
                    return
                self._is_reading = True
            try:
                self._read_some(time.monotonic() + _SOON_S)
            except (DaemonError, OSError):
                raise
            except BaseException:  # part of a message may be lost
                self._fail("a call was interrupted")
                raise
            finally:
                with self._changed:
                    self._is_reading = False
                    self._changed.notify_all()

    def _has_input(self, timeout_s: float) -> bool:
        try:
            return _is_readable(self._socket, min(timeout_s, _LONGEST_WAIT_S))
        except (OSError, ValueError) as exc:  # another thread has closed it
            raise self._fail(_why(exc)) from exc

    def _forget(self, number: int) -> None:
        """Wait for the answer to a request no more."""
        with self._changed:
            self._waiting.discard(number)
            self._answers.pop(number, None)

    def post(self, message: Message) -> None:
        """Send a message that has no answer. Raises DaemonGoneError."""
        self._send(message, wants_answer=False)

    def close(self) -> None:
        """End the connection. May be called twice. Does nothing in a forked process, where it is closed already."""
        if os.getpid() != self._pid:
            return
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
        self._send_bytes(_framed(hello, number=1, boot=0))
        deadline = time.monotonic() + max(self._timeout_s, CONNECT_TIMEOUT_S)
        descriptors: list[int] = []
        try:
            number, self.boot, body = self._read_greeting(deadline, descriptors)
            answer = parse_body(body)
            if isinstance(answer, Failure) and number in (0, 1):  # 0: before it has read the greeting
                raise DaemonError(f"the daemon at {self.path} refused: {plain_text(answer.message)}")
            if number != 1:
                raise self.disbelieve(f"answer {number} came for request 1")
            if not isinstance(answer, Welcome):
                raise self.disbelieve(f"{type(answer).__name__} came for Hello")
            if len(descriptors) != bool(hello.namespace):
                raise self.disbelieve(f"{len(descriptors)} descriptors came for Hello")
            self.descriptor = descriptors.pop() if descriptors else None
            return answer
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _read_greeting(self, deadline: float, descriptors: list[int]) -> tuple[int, int, bytes]:
        """Return the first frame; `descriptors` gets all that came with it, for the caller to close."""
        while True:
            try:
                self._socket.settimeout(min(_left(deadline), _LONGEST_WAIT_S))
                data, received, flags, _ = socket.recv_fds(
                    self._socket, _READ_BYTES, _MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as exc:
                raise self._fail(_why(exc)) from exc
            descriptors += received
            if flags & socket.MSG_CTRUNC or len(descriptors) > _MOST_DESCRIPTORS:
                raise self.disbelieve("more descriptors came than a slab has")
            if not data:
                raise self._fail("it closed the connection")
            self.bytes_received += len(data)
            self._reader.feed(data)
            if (cut := self._cut()) is not None:
                return cut

    def _cut(self) -> tuple[int, int, bytes] | None:
        try:
            return self._reader.next()
        except ProtocolError as exc:
            self.disbelieve(str(exc))
            raise DaemonError(f"the daemon at {self.path} speaks another protocol: {exc}") from exc

    def _send(self, message: Message, *, wants_answer: bool) -> int:
        self._require_own_process()
        if self._failure is not None:
            raise self._gone()
        number = 0
        if wants_answer:
            with self._changed:
                number = self._last_number % 0xFFFF + 1
                while number in self._waiting:
                    number = number % 0xFFFF + 1
                self._last_number = number
                self._waiting.add(number)
        try:
            self._send_bytes(_framed(message, number=number, boot=self.boot))
        except BaseException:
            with self._changed:
                self._waiting.discard(number)
            raise
        return number

    def _send_bytes(self, data: bytearray) -> None:
        with self._sending:
            if self._failure is not None:  # of the sender before: nobody else waits as long once more
                raise self._gone()
            try:
                self._socket.settimeout(min(self._timeout_s, _LONGEST_WAIT_S))
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
                            raise self._gone()
                        if not self._is_reading:
                            break
                        if not self._changed.wait(max(deadline - time.monotonic(), 0)):
                            if may_return:
                                is_awaited = True
                                return None
                            raise self._fail("it did not answer in time")
                    self._is_reading = True
                try:
                    if not may_return:
                        self._read_some(deadline)
                    elif (left := deadline - time.monotonic()) > 0 and self._has_input(left):
                        self._read_some(time.monotonic() + _SOON_S)
                    else:
                        is_awaited = True
                        return None
                finally:
                    with self._changed:
                        self._is_reading = False
                        self._changed.notify_all()
        except (DaemonError, OSError):
            raise
        except BaseException:  # such as an interrupt: nobody would take the answer, and give back what it lends
            self._fail("a call was interrupted")
            raise
        finally:
            if not is_awaited:
                self._forget(number)

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
                raise self.disbelieve("another daemon answered")
            try:
                answer = parse_body(body)
            except ProtocolError as exc:
                raise self.disbelieve(str(exc)) from exc
            with self._changed:
                if number in self._waiting:
                    self._answers[number] = answer
                elif not number and isinstance(answer, EvictionNotice):
                    self.last_eviction = max(self.last_eviction, answer.number)
                elif isinstance(answer, Failure) and answer.is_fatal:
                    raise self._fail(plain_text(answer.message))

    def _wait_readable(self, deadline: float) -> bytes:
        """Return the next bytes. Does not touch the socket's timeout, which belongs to the senders."""
        while not _is_readable(self._socket, min(_left(deadline), _LONGEST_WAIT_S)):
            pass
        return self._socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)

    def _require_own_process(self) -> None:
        if os.getpid() != self._pid:
            raise DaemonGoneError("a connection to the daemon cannot be used in a forked process")

    def _gone(self) -> DaemonGoneError:
        return DaemonGoneError(f"the daemon at {self.path} is gone: {self._failure}")

    def _fail(self, why: str) -> DaemonGoneError:
        with self._changed:
            self._failure = self._failure or why
            self._changed.notify_all()
        return self._gone()


_CLIENTS: weakref.WeakSet[DaemonClient] = weakref.WeakSet()


def _close_in_forked_process() -> None:
    """Close the sockets that this process has inherited: what the parent's end held would not go back with it.

    Takes no lock and says nothing to the daemon: the connection is the parent's.
    """
    for client in list(_CLIENTS):
        with contextlib.suppress(OSError):
            client._socket.close()


os.register_at_fork(after_in_child=_close_in_forked_process)


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
    try:
        _require_own_user(connection, path)
        connection.set_inheritable(False)
    except BaseException:
        connection.close()
        raise
    return connection


def _require_own_user(connection: socket.socket, path: Path) -> None:
    """Raise DaemonError unless the other end is a process of this user or of root: it decides what is computed with."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    if uid not in (0, os.geteuid()):
        raise DaemonError(
            f"the daemon at {path} belongs to user {uid}, not to user {os.geteuid()} or to root",
            hint="choose a socket in a folder that only you can write to",
        )


def _framed(message: Message, *, number: int, boot: int) -> bytearray:
    """Return a message as it goes over the socket. Raises DaemonError for one that cannot be said."""
    try:
        return frame(message, number=number, boot=boot)
    except (TypeError, ValueError, OverflowError) as exc:  # such as a path that is not Unicode
        raise DaemonError(f"{type(message).__name__} cannot be sent: {str(exc)!a}") from exc


def _left(deadline: float) -> float:
    """Return the seconds until then. Raises TimeoutError once it is past: for the whole answer, not for each byte."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _is_readable(connection: socket.socket, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(connection, select.POLLIN)
    return bool(poller.poll(timeout_s * 1e3))


def _why(exc: Exception) -> str:
    if isinstance(exc, TimeoutError):
        return "it did not answer in time"
    return getattr(exc, "strerror", None) or str(exc)
