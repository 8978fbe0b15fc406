"""Answers over HTTP: JSON, or server-sent events as they come, both only as long as the client is there."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import ExitStack, aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from tierkv.serving.api_errors import ApiError, failed

__all__ = [
    "ClientGoneError",
    "EventStream",
    "end_tasks",
    "error_response",
    "json_bytes",
    "read_body",
    "while_connected",
]

_PING_S = 15.0  # proxies close a connection on which nothing comes for a minute
_DISCARD_S = 2.0
_DISCARD_TIMES = 4  # as much as the limit
_T = TypeVar("_T")
_LOG = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """The client has closed its connection."""


async def read_body(request: Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """Return the body of a request. Raises ApiError for one that is too large or too slow, or of another type."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site cannot send this without being asked for leave
        raise ApiError(400, "the Content-Type must be application/json", code="invalid_content_type")
    body = bytearray()
    try:
        await asyncio.wait_for(_read_into(body, request, max_bytes), timeout_s)
    except asyncio.TimeoutError:
        reason = f"the request did not come within {timeout_s:g} s"
        raise ApiError(408, reason, code="request_timeout", headers={"Connection": "close"}) from None
    except ClientDisconnect:
        raise ClientGoneError from None
    if len(body) > max_bytes:
        await _discard(request, max_bytes * _DISCARD_TIMES)
        reason = f"the request is larger than {max_bytes:,} bytes"
        raise ApiError(413, reason, code="request_too_large", headers={"Connection": "close"})
    return bytes(body)


async def while_connected(request: Request, answer: Coroutine[Any, Any, _T]) -> _T:
    """Return what a coroutine returns; cancel it when the client is gone. Raises ClientGoneError then."""
    task = asyncio.create_task(answer)
    gone = asyncio.create_task(_wait_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        await end_tasks(task, gone)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks, and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, one for each JSON value, and [DONE]. An error becomes the last event.

    resources: closed at the end, also where the client is gone before the first event. before_last: called before the
    last event, after which a client may ask again.
    """

    media_type = "text/event-stream"

    def __init__(self, values: AsyncGenerator[dict[str, Any], None], resources: ExitStack) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._values = values
        self._resources = resources
        self.before_last: Callable[[], None] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, as an ASGI application."""
        with self._resources:
            sending = asyncio.create_task(self._send(send))
            gone = asyncio.create_task(_wait_gone(receive))
            try:
                await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
                if sending.done():
                    sending.result()
            finally:
                await end_tasks(sending, gone)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        events: asyncio.Queue[bytes] = asyncio.Queue(1)  # the engine's stream holds what the client does not read yet
        writing = asyncio.create_task(self._write_events(events))
        taking: asyncio.Task[bytes] | None = None
        try:
            while True:
                taking = taking or asyncio.create_task(events.get())
                # Not wait_for: before Python 3.12 it swallows a cancellation that comes together with the event.
                done, _ = await asyncio.wait({taking}, timeout=_PING_S)
                event = b": the answer is not ready\n\n"
                if done:
                    event, taking = taking.result(), None
                await send({"type": "http.response.body", "body": event, "more_body": bool(event)})
                if not event:
                    return
        finally:
            await end_tasks(writing, *([taking] if taking else []))

    async def _write_events(self, events: asyncio.Queue[bytes]) -> None:
        """Put every event into a queue, and an empty one behind the last."""
        last = b"[DONE]"
        try:
            async with aclosing(self._values) as values:
                async for value in values:
                    await events.put(b"data: " + json_bytes(value) + b"\n\n")
        except Exception as exc:  # noqa: BLE001 - the status has been sent: the error is an event
            if not isinstance(exc, ApiError):
                _LOG.error("an answer failed", exc_info=exc)
            last = json_bytes(failed(exc).body())
        if self.before_last:
            self.before_last()
        await events.put(b"data: " + last + b"\n\n")
        await events.put(b"")


def json_bytes(value: Any) -> bytes:
    """Return JSON in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def error_response(error: ApiError) -> Response:
    """Return an error as its client sees it."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _wait_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_into(body: bytearray, request: Request, max_bytes: int) -> None:
    async for part in request.stream():
        body += part
        if len(body) > max_bytes:
            return


async def _discard(request: Request, num_bytes: int) -> None:
    """Read on and forget, for a while: a client that is still sending would not read the error."""

    async def read() -> None:
        left = num_bytes
        while left > 0:
            message = await request.receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return

    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), _DISCARD_S)
