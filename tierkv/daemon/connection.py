"""One client of the daemon on its socket: frames, answers, errors, and when the connection is given up.

A client that breaks the protocol gets an error; if the stream itself is lost, nothing more is read from it. But what
it has leased stays its own until it closes its end or dies: only then is it certain that it copies nothing any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Coroutine
from typing import Any, Protocol, TypeAlias

from tierkv.daemon.core import Connection, Core
from tierkv.daemon.host import peer_of
from tierkv.daemon.messages import Failure, Hello, Message
from tierkv.daemon.protocol import FrameReader, ProtocolError, frame, parse_body
from tierkv.errors import TierKVError

__all__ = ["Answer", "ClientConnection", "Host"]

_log = logging.getLogger(__name__)

_MAX_CLIENTS = 1024
_MAX_PENDING = 64  # requests of one connection that are being worked on

Answer: TypeAlias = Message | None


class Host(Protocol):
    """What a connection needs of the server. hello_s: so long may a client take to say hello."""

    core: Core
    boot: int
    hello_s: float
    clients: set[ClientConnection]
    bytes_received: int
    bytes_sent: int

    def answer(self, client: ClientConnection, message: Message) -> Answer | Coroutine[Any, Any, Answer]:
        """Return the answer to a message, or what will come up with it."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something beside, and keep it alive."""

    def tell_news(self) -> None:
        """Wake who waits for news of a block."""

    def end_loads(self, connection: Connection) -> None:
        """Close the state files that this client alone had loaded."""


class ClientConnection(asyncio.Protocol):
    """One connection as the loop sees it: frames in, answers out, errors told."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.connection: Connection = host.core.connect()
        self.is_greeted = False
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader()
        self._is_lost = False  # its stream makes no sense any more
        self._is_paused = False
        self._pending = 0
        self._since = time.monotonic()
        self._descriptor: int | None = None

    # asyncio calls these

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        with transport.get_extra_info("socket").dup() as peer:
            pid, uid = peer_of(peer)
        if uid != os.getuid() or len(self.host.clients) >= _MAX_CLIENTS:
            why = f"user {uid} is not the owner of this daemon" if uid != os.getuid() else "too many clients"
            _log.warning("process %d was refused: %s", pid, why)
            self._send(0, Failure(message=why, is_fatal=True))
            transport.close()
            return
        self.host.clients.add(self)

    def data_received(self, data: bytes) -> None:
        self.host.bytes_received += len(data)
        if self._is_lost or self not in self.host.clients:
            return
        self._reader.feed(data)
        self._process()

    def pause_writing(self) -> None:
        self._is_paused = True
        if self._transport:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._is_paused = False
        if self._transport:
            self._transport.resume_reading()
            self._process()

    def connection_lost(self, exc: Exception | None) -> None:
        self.host.clients.discard(self)
        self.host.core.disconnect(self.connection)
        self.host.end_loads(self.connection)
        self.host.tell_news()

    # the server calls these

    def hand_over(self, descriptor: int | None) -> None:
        """Send this descriptor with the next answer."""
        self._descriptor = descriptor

    def push(self, message: Message) -> None:
        """Send something that the client has not asked for."""
        self._send(0, message)

    def check_alive(self) -> None:
        """Close the connection of somebody who connects and says nothing."""
        if not self.is_greeted and time.monotonic() - self._since > self.host.hello_s:
            self.close()

    def close(self) -> None:
        """End the connection; what the client holds is taken back."""
        if self._transport:
            self._transport.abort()

    # parts

    def _process(self) -> None:
        while not (self._is_lost or self._is_paused):
            number = 0
            try:
                if (cut := self._reader.next()) is None:
                    return
                number, boot, body = cut
                message = parse_body(body)
                if boot != self.host.boot and not (isinstance(message, Hello) and not self.is_greeted):
                    raise ProtocolError("this message is meant for a daemon that has ended", is_fatal=True)
                if self._pending >= _MAX_PENDING:
                    raise ProtocolError(f"more than {_MAX_PENDING} requests at once")
                answer = self.host.answer(self, message)
            except TierKVError as exc:
                self._refuse(number, exc)
                continue
            if isinstance(answer, Message):
                self._send(number, answer)
            elif answer is not None:
                self._pending += 1
                self.host.spawn(self._finish(number, answer))

    async def _finish(self, number: int, answer: Coroutine[Any, Any, Answer]) -> None:
        try:
            result = await answer
            if result is not None:
                self._send(number, result)
        except TierKVError as exc:
            self._refuse(number, exc)
        finally:
            self._pending -= 1

    def _send(self, number: int, message: Message) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        data = frame(message, number=number, boot=self.host.boot)
        self.host.bytes_sent += len(data)
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            self._send_with_descriptor(data, descriptor)
        else:
            self._transport.write(data)

    def _send_with_descriptor(self, data: bytearray, descriptor: int) -> None:
        assert self._transport is not None
        if self._transport.get_write_buffer_size():
            raise ProtocolError("the answer to Hello must come first", is_fatal=True)
        with self._transport.get_extra_info("socket").dup() as peer:
            try:
                sent = socket.send_fds(peer, [data], [descriptor])
            except OSError as exc:
                raise ProtocolError(f"the slab could not be handed over: {exc}", is_fatal=True) from exc
        if sent < len(data):
            self._transport.write(data[sent:])

    def _refuse(self, number: int, why: TierKVError) -> None:
        is_fatal = isinstance(why, ProtocolError) and why.is_fatal
        self.host.core.counters["refused_messages"] += 1
        _log.info("refused a message of %s: %s", self.connection.client or "a client", why)
        self._send(number, Failure(message=str(why)[:1000], is_fatal=is_fatal))
        if not is_fatal:
            return
        self._is_lost = True
        if not (self.connection.leases or self.connection.reservations) and self._transport:
            self._transport.close()
