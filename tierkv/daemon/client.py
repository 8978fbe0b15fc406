"""A blocking connection to the daemon, for any number of threads.

A thread that waits for its answer reads the socket, and takes in the answers of the other threads too. One thread at a
time reads. So a single thread pays for no hand-over, and a slow request delays no other.
"""

from __future__ import annotations

import os
import select
import threading
import time
from pathlib import Path
from typing import TypeVar

from tierkv.daemon.answers import AnswerCheck, WrongAnswerError, plain_text
from tierkv.daemon.client_socket import (
    CONNECT_TIMEOUT_S,
    LONGEST_WAIT_S,
    MOST_DESCRIPTORS,
    connect,
    is_readable,
    reason_of,
    receive,
    receive_greeting,
)
from tierkv.daemon.eviction_messages import EvictionNotice
from tierkv.daemon.messages import Failure, Hello, Message, Status, StatusReport, Welcome
from tierkv.daemon.protocol import FrameReader, ProtocolError, frame, parse_body
from tierkv.errors import DaemonError, DaemonGoneError
from tierkv.values.checks import check_seconds

__all__ = ["TIMEOUT_S", "DaemonClient"]

TIMEOUT_S = 10.0
_SOON_S = 0.05
Answer = TypeVar("Answer", bound=Message)


class DaemonClient:
    """One connection. Everything that it holds in the daemon ends when it is closed, or when its process ends.

    hello: names the namespace, or nothing for a client that asks for status and the like.
    connect_s: how long to wait for the connection, 5 s by default; the greeting has so long, or `timeout_s` if longer.
    welcome: the daemon's answer. descriptor: the slab's, until `take_descriptor`; None without a namespace.
    flag_descriptors: of the generations and the lease flags, if the daemon has any for this connection.
    failure: why the connection has failed, if it has. last_eviction: the newest eviction that the daemon notified of.
    daemon_user: id of a user whose daemon is trusted, beside the own user's and root's. Nothing is sent to others.
    `AnswerCheck` has checked every answer that is returned. A forked process cannot use the connection, and does not
    keep it open. Raises DaemonGoneError if no daemon answers, DaemonError if the daemon refuses or belongs to another
    user.
    """

    def __init__(
        self,
        path: Path,
        hello: Hello | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        connect_s: float | None = None,
        daemon_user: int | None = None,
    ) -> None:
        self.path = path
        self.namespace: bytes = hello.namespace if hello else b""
        self.boot: int = 0
        self.bytes_sent: int = 0
        self.bytes_received: int = 0
        self.last_eviction: int = 0
        self.descriptor: int | None = None
        self.flag_descriptors: list[int] = []
        self._timeout_s = check_seconds("timeout_s", timeout_s, may_be_zero=False)
        self._pid = os.getpid()
        self._has_answered_wrongly = False
        self._reader = FrameReader()
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._is_reading = False
        self._waiting: set[int] = set()
        self._answers: dict[int, Message] = {}
        self._last_number = 0
        self.failure: str | None = None
        self._connect_s = check_seconds("connect_s", connect_s or CONNECT_TIMEOUT_S)
        self._socket = connect(path, timeout_s=self._connect_s, daemon_user=daemon_user)
        try:
            self.welcome: Welcome = self._greet(hello or Hello())
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
        """False once the connection has failed: every further call fails."""
        return self.failure is None

    @property
    def block_size(self) -> int:
        """Tokens of a whole block; 0 without a namespace."""
        return self._check.block_size

    @property
    def has_answered_wrongly(self) -> bool:
        """Whether the daemon has given an impossible answer: it is not to be used again."""
        return self._has_answered_wrongly

    def has_hung_up(self) -> bool:
        """Return whether the other end is closed. Does not wait, and reads nothing."""
        self._require_own_process()
        if self.failure is not None:
            return True
        try:
            return is_readable(self._socket, 0, events=select.POLLRDHUP)
        except OSError:  # another thread has closed the socket
            return True

    def call(self, message: Message, expected: type[Answer], *, timeout_s: float | None = None) -> Answer:
        """Send a request and return its answer. Raises DaemonError if it is refused, DaemonGoneError otherwise.

        After a timeout or an interrupt the connection cannot be used any more: the answer might still come.
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
            raise self.reject_answer(f"{type(answer).__name__} came for {type(message).__name__}")
        try:
            self._check.check(message, answer)
        except WrongAnswerError as exc:
            raise self.reject_answer(str(exc)) from exc
        return answer

    def reject_answer(self, why: str) -> DaemonGoneError:
        """End the connection to a daemon that has given an impossible answer; return the error to raise."""
        self._has_answered_wrongly = True
        return self._fail(why)

    def call_long(self, message: Message, expected: type[Answer], *, timeout_s: float) -> Answer:
        """Do as `call`, for a request that may take long: while no answer comes, ask the daemon for its status.

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
        """Read what the daemon has sent without being asked. Does not wait for more. Raises DaemonGoneError."""
        self._require_own_process()
        until = time.monotonic() + _SOON_S  # a daemon that sends without end keeps no caller here
        while self.failure is None and self._has_input(0) and time.monotonic() < until:
            with self._changed:
                if self._is_reading:  # another thread reads it
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
            return is_readable(self._socket, timeout_s)
        except OSError as exc:  # another thread has closed the socket
            raise self._fail(reason_of(exc)) from exc

    def _forget(self, number: int) -> None:
        """Drop the answer to a request, now or when it comes."""
        with self._changed:
            self._waiting.discard(number)
            self._answers.pop(number, None)

    def post(self, message: Message) -> None:
        """Send a message that has no answer. Raises DaemonGoneError."""
        self._send(message, wants_answer=False)

    def close(self) -> None:
        """End the connection. May be called twice. Does nothing in a forked process: there it is closed already."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self.failure = self.failure or "the connection was closed"
            self._changed.notify_all()
        self._socket.close()
        descriptors, self.flag_descriptors = self.flag_descriptors, []
        if self.descriptor is not None:
            descriptors.append(self.descriptor)
            self.descriptor = None
        for descriptor in descriptors:
            os.close(descriptor)

    def take_descriptor(self) -> int:
        """Return the slab's descriptor. The caller closes it."""
        assert self.descriptor is not None, "the daemon sends it once, to a client that named a namespace"
        descriptor, self.descriptor = self.descriptor, None
        return descriptor

    def _greet(self, hello: Hello) -> Welcome:
        """Send Hello and return the answer, which may carry a descriptor."""
        gone: DaemonGoneError | None = None
        try:
            self._send_bytes(frame(hello, number=1, boot=0))
        except DaemonGoneError as exc:  # a daemon that refuses the connection says why before it closes it
            gone = exc
        deadline = time.monotonic() + max(self._timeout_s, self._connect_s)
        descriptors: list[int] = []
        try:
            number, self.boot, body = self._read_greeting(deadline, descriptors)
            answer = parse_body(body)
            if isinstance(answer, Failure) and number in (0, 1):  # 0: before it has read the greeting
                raise DaemonError(f"the daemon at {self.path} refused: {plain_text(answer.message)}")
            if gone is not None:
                raise gone
            if number != 1:
                raise self.reject_answer(f"answer {number} came for request 1")
            if not isinstance(answer, Welcome):
                raise self.reject_answer(f"{type(answer).__name__} came for Hello")
            if len(descriptors) != (1 + 2 * bool(answer.flag_slots) if hello.namespace else 0):
                raise self.reject_answer(f"{len(descriptors)} descriptors came for Hello")
            if descriptors:
                self.descriptor, *self.flag_descriptors = descriptors
                descriptors = []
            return answer
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _read_greeting(self, deadline: float, descriptors: list[int]) -> tuple[int, int, bytes]:
        """Return the first frame; add the descriptors that came with it to `descriptors`, for the caller to close."""
        while True:
            try:
                data, received, is_cut = receive_greeting(self._socket, deadline)
            except OSError as exc:
                raise self._fail(reason_of(exc)) from exc
            descriptors += received
            if is_cut or len(descriptors) > MOST_DESCRIPTORS:
                raise self.reject_answer("more descriptors came than a slab has")
            if not data:
                raise self._fail("it closed the connection")
            self.bytes_received += len(data)
            self._reader.feed(data)
            if (cut := self._next_frame()) is not None:
                return cut

    def _next_frame(self) -> tuple[int, int, bytes] | None:
        try:
            return self._reader.next()
        except ProtocolError as exc:
            self.reject_answer(str(exc))
            raise DaemonError(f"the daemon at {self.path} speaks another protocol: {exc}") from exc

    def _send(self, message: Message, *, wants_answer: bool) -> int:
        self._require_own_process()
        if self.failure is not None:
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
            self._send_bytes(frame(message, number=number, boot=self.boot))
        except BaseException:
            with self._changed:
                self._waiting.discard(number)
            raise
        return number

    def _send_bytes(self, data: bytearray) -> None:
        with self._sending:
            if self.failure is not None:  # the sender before has failed: do not wait as long once more
                raise self._gone()
            try:
                self._socket.settimeout(min(self._timeout_s, LONGEST_WAIT_S))
                self._socket.sendall(data)
                self.bytes_sent += len(data)
            except OSError as exc:
                raise self._fail(reason_of(exc)) from exc

    def _receive(self, number: int, deadline: float, *, may_return: bool = False) -> Message | None:
        """Wait for one answer. While no other thread reads the socket, read it for all threads.

        may_return: when the time is over, return None instead of failing; the answer is still awaited.
        """
        is_awaited = False
        try:
            while True:
                with self._changed:
                    while True:
                        if number in self._answers:
                            return self._answers.pop(number)
                        if self.failure is not None:
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
        except BaseException:  # such as an interrupt: no caller would take the answer and return its leases
            self._fail("a call was interrupted")
            raise
        finally:
            if not is_awaited:
                self._forget(number)

    def _read_some(self, deadline: float) -> None:
        try:
            data = receive(self._socket, deadline)
        except OSError as exc:
            raise self._fail(reason_of(exc)) from exc
        if not data:
            raise self._fail("it closed the connection")
        self.bytes_received += len(data)
        self._reader.feed(data)
        while (cut := self._next_frame()) is not None:
            number, boot, body = cut
            if boot != self.boot:
                raise self.reject_answer("another daemon answered")
            try:
                answer = parse_body(body)
            except ProtocolError as exc:
                raise self.reject_answer(str(exc)) from exc
            with self._changed:
                if number in self._waiting:
                    self._answers[number] = answer
                elif not number and isinstance(answer, EvictionNotice):
                    self.last_eviction = max(self.last_eviction, answer.number)
                elif isinstance(answer, Failure) and answer.is_fatal:
                    raise self._fail(plain_text(answer.message))

    def _require_own_process(self) -> None:
        if os.getpid() != self._pid:
            raise DaemonGoneError("a connection to the daemon cannot be used in a forked process")

    def _gone(self) -> DaemonGoneError:
        return DaemonGoneError(f"the daemon at {self.path} is gone: {self.failure}")

    def _fail(self, why: str) -> DaemonGoneError:
        with self._changed:
            self.failure = self.failure or why
            self._changed.notify_all()
        return self._gone()
