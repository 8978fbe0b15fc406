"""The process: connections with bounds on their number and their patience, and an end in time after a signal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from tierkv.serving.api_errors import ApiError
from tierkv.serving.limits import ServeLimits
from tierkv.serving.responses import json_bytes
from tierkv.serving.service import Service

__all__ = ["bind", "serve"]

_MAX_HEADER_BYTES = 32 << 10
_KEEP_ALIVE_S = 30
_SHARE_TO_DRAIN = 0.4  # of the time to stop: for running answers; the rest is for the engine, and to write blocks
_ANSWERS_S = 0.5  # for clients to read the ends of their answers
_LAST_S = 0.25
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_LOG = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """Return a bound socket that does not listen yet. Raises OSError."""
    (domain, kind, protocol, _, address), *_ = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    bound = socket.socket(domain, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except BaseException:
        bound.close()
        raise
    return bound


async def serve(app: ASGIApp, service: Service, bound: socket.socket) -> None:
    """Answer until SIGTERM or SIGINT, then end in the time that the limits allow.

    New requests are refused from the signal on. Running answers may end for a part of the time, then they end as they
    are. A second signal ends them at once. If the process lives when the time is over, it ends without more ado: what
    was not yet written to the store is then computed again.
    """
    config = uvicorn.Config(
        app,
        http=protocol_with(service.limits),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=min(service.limits.max_connections, 2048),
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
    )
    await _Server(config, service).serve(sockets=[bound])


class _Server(uvicorn.Server):
    """Uvicorn with our own reaction to signals."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._stopping: asyncio.Task[None] | None = None

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """React to the signals as long as the block runs."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._begin_stop)
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN if self.should_exit else signal.SIG_DFL)

    def _begin_stop(self) -> None:
        if self._stopping is not None:
            self.should_exit = self.force_exit = True
            return
        self._service.is_stopping = True
        stop_s = self._service.limits.stop_s
        timer = threading.Timer(max(stop_s - _LAST_S, _LAST_S), _end_process)
        timer.daemon = True
        timer.start()
        # No thread of Python runs any more while the interpreter ends: then the kernel keeps the time.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, stop_s)
        self._stopping = asyncio.create_task(self._stop())

    async def _stop(self) -> None:
        service = self._service
        try:
            if not await service.wait_idle(service.limits.stop_s * _SHARE_TO_DRAIN):
                _LOG.warning("%d requests end before their answers are complete", service.num_active)
            await asyncio.to_thread(service.engine.close, wait_s=0)
            await service.wait_idle(_ANSWERS_S)
        finally:
            self.should_exit = True


def _end_process() -> None:
    _LOG.error("the time to stop is over: blocks that were not written will be computed again")
    os._exit(1)


def protocol_with(limits: ServeLimits) -> type[asyncio.Protocol]:
    """Return a protocol that closes connections whose client is too slow, or that are too many."""

    class Protocol(H11Protocol):
        """HTTP/1.1. Uvicorn itself waits for ever for the headers of a request, and for a client that reads nothing."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._timer: asyncio.TimerHandle | None = None
            self._stall: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                transport.abort()
                return
            self._timer = self.loop.call_later(limits.header_s, transport.abort)

        def data_received(self, data: bytes) -> None:
            was_idle = not self._is_answering()
            super().data_received(data)
            if self._is_answering():
                self._end_timer()
            elif was_idle and self._timer is None and not self.transport.is_closing():  # a part of the next headers
                self._timer = self.loop.call_later(limits.header_s, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall = self.loop.call_later(limits.stall_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._end_stall()

        def connection_lost(self, exc: Exception | None) -> None:
            self._end_timer()
            self._end_stall()
            super().connection_lost(exc)

        def timeout_keep_alive_handler(self) -> None:
            if self.transport.get_write_buffer_size():
                self.transport.abort()  # to close would wait until the client has read the rest
            super().timeout_keep_alive_handler()

        def send_400_response(self, msg: str) -> None:
            if not self._is_answering():
                self.transport.write(_bad_request(msg))
            self.transport.close()

        def _is_answering(self) -> bool:
            cycle: RequestResponseCycle | None = self.cycle  # None before the first request
            return cycle is not None and not cycle.response_complete

        def _end_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _end_stall(self) -> None:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

    return Protocol


def _bad_request(reason: str) -> bytes:
    body = json_bytes(ApiError(400, reason, code="invalid_http").body())
    head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return f"{head}connection: close\r\n\r\n".encode() + body
