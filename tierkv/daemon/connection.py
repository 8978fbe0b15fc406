"""ClientConnection: one client of the daemon on its socket: frames, answers, errors, and the end of the connection.

A client that breaks the protocol gets an error. If its stream makes no sense any more, nothing more is read from it.
But it keeps its leases until it closes its end or its process ends: only then is it certain that it copies nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol, TypeAlias

from tierkv.daemon.core import Core
from tierkv.daemon.eviction_messages import EvictionDone
from tierkv.daemon.host import peer_of
from tierkv.daemon.limits import Limits
from tierkv.daemon.log_lines import LogLines, reason_of
from tierkv.daemon.members import groups_of_peer
from tierkv.daemon.messages import Abandon, Done, EndClaim, Failure, Hello, Message, Release, Wait
from tierkv.daemon.protocol import MAX_BODY_BYTES, FrameReader, ProtocolError, frame, parse_body, printable
from tierkv.daemon.values import Connection
from tierkv.errors import DaemonError, TierKVError
from tierkv.values.users import group_name, user_name

__all__ = ["Answer", "ClientConnection", "Host"]

_log = logging.getLogger(__name__)

_FRAMES_A_TURN = 64  # then other connections are served
_MESSAGE_CHARACTERS = 1000

Answer: TypeAlias = Message | None


class Host(Protocol):
    """What a connection needs of the server. hello_s: time for a client to send Hello. group: whose members may read.

    incomplete_bytes, num_requests: bytes of incomplete messages, and requests in work, of all clients.
    """

    core: Core
    limits: Limits
    boot: int
    hello_s: float
    group: int | None
    bytes_received: int
    bytes_sent: int
    incomplete_bytes: int
    num_requests: int

    def accept(self, client: ClientConnection, pid: int) -> None:
        """Accept a connection of a process. Raises TierKVError if there are too many."""

    def leave(self, client: ClientConnection) -> None:
        """Forget a connection, whether it was accepted or not."""

    def answer(self, client: ClientConnection, message: Message) -> Answer | Coroutine[Any, Any, Answer]: ...
    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]: ...
    @property
    def log_lines(self) -> LogLines: ...
    def unload_files(self, connection: Connection) -> None: ...


class ClientConnection(asyncio.Protocol):
    """One connection as the loop sees it: frames in, answers and errors out.

    slow: taken by each request that needs a thread. is_member: it belongs to another user, of the daemon's group.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.connection: Connection = host.core.connect()
        self.is_greeted: bool = False
        self.num_requests: int = 0  # in work
        self.slow: asyncio.Semaphore = asyncio.Semaphore(host.limits.slow_requests_of_client)
        self.heard_at: float = time.monotonic()
        self._since = self.heard_at
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader(host.limits.first_message_bytes)
        self._num_incomplete = 0  # bytes, in the host's count
        self._begun_at: float | None = None  # when the first byte of an incomplete message came
        self._unread_since: float | None = None
        self._is_accepted = False
        self._is_lost = False  # its stream makes no sense any more
        self._has_backlog = False
        self._is_reading = True
        self._waits: set[asyncio.Task[Any]] = set()
        self._descriptors: Sequence[int] = ()
        self._own_descriptors: Sequence[int] = ()
        self.is_member: bool = True  # until its user is known

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        with transport.get_extra_info("socket").dup() as peer:
            pid, uid = peer_of(peer)
            groups = groups_of_peer(peer)
        try:
            self.is_member = uid not in (0, os.geteuid())
            if self.is_member and self.host.group not in groups:
                raise DaemonError(self._why_not(uid))
            self.host.accept(self, pid)
            self._is_accepted = True
        except TierKVError as exc:
            self._count_refusal(f"process {pid}", str(exc), reason_of(exc))
            self._send(0, Failure(message=str(exc), is_fatal=True))
            transport.close()

    def _why_not(self, uid: int) -> str:
        """Return why a user may not connect."""
        owner, group = user_name(os.geteuid()), self.host.group
        if group is None:
            return f"the daemon belongs to user {owner}, and lets no other user in, such as {user_name(uid)}"
        return f"the daemon belongs to user {owner}, and user {user_name(uid)} is not in its group {group_name(group)}"

    def data_received(self, data: bytes) -> None:
        self.host.bytes_received += len(data)
        if self._is_lost or not self._is_accepted:
            return
        self.heard_at = time.monotonic()
        self._reader.feed(data)
        self._process()

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        self._update_reading()

    def resume_writing(self) -> None:
        self._unread_since = None
        self._update_reading()
        self._process()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_lost = True
        self._drop_input()
        self._drop_descriptors()
        for task in self._waits:
            task.cancel()
        self.host.core.disconnect(self.connection)
        self.host.unload_files(self.connection)
        self.host.leave(self)

    # the server calls these

    @property
    def num_unsent_bytes(self) -> int:
        """Bytes of answers that the client has not read."""
        return self._transport.get_write_buffer_size() if self._transport else 0

    def may_be_ended(self) -> bool:
        """Return whether the client copies nothing from or to the slab; then its lease flags end here.

        A client that may be copying keeps its connection.
        """
        held = self.connection
        if held.num_leases or held.num_fetching or held.reservations:
            return False
        return self.host.core.flag_leases.try_end(held)

    @property
    def is_idle(self) -> bool:
        """Whether the client named no namespace and has no request in work."""
        return self.connection.tenant is None and not self.num_requests and not self._reader.num_bytes

    def attach_descriptors(self, descriptors: Sequence[int], *, own: Sequence[int] = ()) -> None:
        """Send these descriptors with the next answer. own: those of them that are closed then."""
        self._descriptors, self._own_descriptors = descriptors, own

    def push(self, message: Message) -> None:
        """Send a message that is no answer."""
        self._send(0, message)

    def check_alive(self) -> None:
        """End a connection that sends no Hello, does not complete its message, or does not read its answers."""
        now, limits = time.monotonic(), self.host.limits
        if not self.is_greeted and now - self._since > self.host.hello_s:
            self.close()
        elif self._begun_at is not None and now - self._begun_at > limits.message_s:
            self._refuse(0, ProtocolError(f"a message was not complete in {limits.message_s:g} s", is_fatal=True))
        elif (self._is_lost or self.is_unread_for(limits.unread_s)) and self.may_be_ended():
            self.close()

    def is_unread_for(self, seconds: float) -> bool:
        """Return whether the client has left answers unread for so long."""
        return self._unread_since is not None and time.monotonic() - self._unread_since >= seconds

    def close(self) -> None:
        """End the connection, and with it everything that the client holds."""
        if self._transport:
            self._transport.abort()

    def refuse_and_close(self, why: str, *, reason: str) -> None:
        """Log and count what the client does wrong, and end the connection."""
        self._count_refusal(self.connection.client or "a client", why, reason)
        self.close()

    # messages

    def _process(self) -> None:
        """Answer complete messages, as many as fit one turn, while the client reads its answers."""
        self._has_backlog = False
        for _ in range(_FRAMES_A_TURN):
            if self._is_lost or self._unread_since is not None or not self._take_one():
                break
        else:
            self._has_backlog = True
            asyncio.get_running_loop().call_soon(self._continue)
        self._update_reading()
        self._count_incomplete()

    def _continue(self) -> None:
        if self._has_backlog:
            self._process()

    def _take_one(self) -> bool:
        """Answer the next complete message; False if there is none."""
        number = 0
        try:
            if (cut := self._reader.next()) is None:
                return False
            self._begun_at = None
            number, boot, body = cut
            message = parse_body(body)
            is_hello = isinstance(message, Hello)
            if boot != self.host.boot and not (is_hello and not self.is_greeted):
                raise ProtocolError("this message was sent to a daemon that has ended", is_fatal=True)
            if is_hello is self.is_greeted:
                raise ProtocolError("the first message, and no other, must be Hello")
            if self.num_requests >= self.host.limits.requests_of_client:
                raise ProtocolError(f"more than {self.num_requests} requests at once")
            if self.host.num_requests >= self.host.limits.requests:
                raise ProtocolError("more requests at once than this daemon takes")
            if is_hello:
                self._reader.max_body_bytes = MAX_BODY_BYTES
                self.is_greeted = True
            answer = self.host.answer(self, message)
            if answer is None or isinstance(answer, Message):
                self._reply(number, message, answer)
            else:
                self._begin(number, message, answer)
        except Exception as exc:  # noqa: BLE001 - the outermost place of a request: the client gets an answer
            self._refuse(number, exc)
        return True

    def _begin(self, number: int, message: Message, answer: Coroutine[Any, Any, Answer]) -> None:
        """Work on a request as a task. A Wait is cancelled when the connection ends."""
        self.num_requests += 1
        self.host.num_requests += 1
        task = self.host.spawn(self._finish(number, message, answer))
        if isinstance(message, Wait):
            self._waits.add(task)

        def end(_: object) -> None:  # also of a task that was cancelled before it began
            answer.close()
            self._waits.discard(task)
            self.num_requests -= 1
            self.host.num_requests -= 1

        task.add_done_callback(end)

    async def _finish(self, number: int, message: Message, answer: Coroutine[Any, Any, Answer]) -> None:
        try:
            self._reply(number, message, await answer)
        except Exception as exc:  # noqa: BLE001 - as in _take_one
            self._refuse(number, exc)

    def _reply(self, number: int, message: Message, answer: Answer) -> None:
        if answer is not None and number:
            self._send(number, answer)
        elif number and isinstance(message, Release | Abandon | EndClaim | EvictionDone):
            self._send(number, Done())

    def _send(self, number: int, message: Message) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = frame(message, number=number, boot=self.host.boot)
        self.host.bytes_sent += len(data)
        if self._descriptors:
            try:
                self._send_with_descriptors(data, self._descriptors)
            finally:
                self._drop_descriptors()
        else:
            self._transport.write(data)

    def _send_with_descriptors(self, data: bytearray, descriptors: Sequence[int]) -> None:
        assert self._transport is not None
        if self._transport.get_write_buffer_size():
            raise ProtocolError("the answer to Hello must come first", is_fatal=True)
        with self._transport.get_extra_info("socket").dup() as peer:
            try:
                sent = socket.send_fds(peer, [data], descriptors)
            except ConnectionError:  # the client has ended since its Hello: no message of it was wrong
                self.close()
                return
            except OSError as exc:
                raise ProtocolError(f"the slab's descriptor could not be sent: {exc}", is_fatal=True) from exc
        if sent < len(data):
            self._transport.write(data[sent:])

    def _drop_descriptors(self) -> None:
        for descriptor in self._own_descriptors:
            os.close(descriptor)
        self._descriptors = self._own_descriptors = ()

    def _refuse(self, number: int, why: Exception) -> None:
        """Answer that a request failed. After a fatal error nothing more is read from the client."""
        is_fatal = isinstance(why, ProtocolError) and why.is_fatal
        reason = reason_of(why)
        if not isinstance(why, TierKVError):
            _log.error("a request of %s failed", self.connection.client or "a client", exc_info=why)
            why = DaemonError(f"the daemon failed at this request: {type(why).__name__}")
        said = printable(str(why), _MESSAGE_CHARACTERS)
        self._count_refusal(self.connection.client or "a client", said, reason)
        self._drop_descriptors()
        self._send(number, Failure(message=said, is_fatal=is_fatal))
        if not is_fatal:
            return
        self._is_lost = True
        self._drop_input()
        if self._transport and self.may_be_ended():
            self._transport.close()

    def _count_refusal(self, client: str, why: str, reason: str) -> None:
        self.host.core.counters.add("refused_messages", reason=reason)
        self.host.log_lines.refused(client, why, reason=reason)

    # received bytes that are not answered yet

    def _update_reading(self) -> None:
        """Stop reading while answers are unread or received messages are not answered yet."""
        if self._transport is None or self._transport.is_closing():
            return
        should_read = self._unread_since is None and not self._has_backlog
        if should_read is not self._is_reading:
            self._is_reading = should_read
            (self._transport.resume_reading if should_read else self._transport.pause_reading)()

    def _count_incomplete(self) -> None:
        """Count the bytes of an incomplete message, and note when it began."""
        if self._is_lost:
            return
        num_bytes = self._reader.num_bytes
        self.host.incomplete_bytes += num_bytes - self._num_incomplete
        self._num_incomplete = num_bytes
        is_waiting = num_bytes and self._is_reading
        self._begun_at = (self._begun_at or time.monotonic()) if is_waiting else None
        if num_bytes and self.host.incomplete_bytes > self.host.limits.incomplete_bytes:
            self._refuse(0, ProtocolError("too many incomplete messages", is_fatal=True))

    def _drop_input(self) -> None:
        self._reader.clear()
        self._begun_at = None
        self.host.incomplete_bytes -= self._num_incomplete
        self._num_incomplete = 0
