"""The HTTP interface: which path does what, the checks before it, and how errors look."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tierkv.errors import ConfigError
from tierkv.metrics.exposition import exposition
from tierkv.profiling.metrics import metrics_of, status_of
from tierkv.profiling.prefixes import PrefixTable
from tierkv.serving.api_errors import ApiError, failed
from tierkv.serving.chat import chat
from tierkv.serving.completions import completions
from tierkv.serving.page import page_routes
from tierkv.serving.responses import ClientGoneError, EventStream, error_response, read_body
from tierkv.serving.service import Service
from tierkv.values.hosts import is_local_host

__all__ = ["make_app"]

_Answer = Callable[[Service, Request, bytes, ExitStack], Awaitable[Response]]
_PREFIXES = 10
_OPEN_PATHS = ("/", "/health")
_LOG = logging.getLogger(__name__)


def make_app(service: Service, *, api_key: str | None = None, needs_local_host: bool = False) -> ASGIApp:
    """Return the application.

    api_key: what clients send as a bearer token; without it every client that reaches the port may ask.
    needs_local_host: refuse requests that came under a name of another machine. A page of another site could make its
    own name lead to this machine, and so read answers.
    """
    table = PrefixTable()
    service.cache.add_observer(table)
    routes = [
        *page_routes(),
        Route("/health", _health(service)),
        Route("/status", _status(service, table)),
        Route("/metrics", _metrics(service)),
        Route("/v1/models", _models(service)),
        Route("/v1/models/{name:path}", _one_model(service)),
        Route("/v1/chat/completions", _generation(service, chat), methods=["POST"]),
        Route("/v1/completions", _generation(service, completions), methods=["POST"]),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _unexpected})
    return _Gate(app, service, api_key=api_key, needs_local_host=needs_local_host)


class _Gate:
    """What every request passes first: the checks of its host, its origin and its key. Counts statuses of /v1."""

    def __init__(self, app: ASGIApp, service: Service, *, api_key: str | None, needs_local_host: bool) -> None:
        self._app = app
        self._service = service
        self._key = api_key.encode() if api_key is not None else None
        self._needs_local_host = needs_local_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        app: ASGIApp = self._app
        try:
            self._check(scope)
        except ApiError as exc:
            app = error_response(exc)
            self._service.refusals.add(exc, scope["path"], (scope.get("client") or ("",))[0])

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._service.monitor.statuses[message["status"]] += 1
            await send(message)

        try:
            await app(scope, receive, counted if scope["path"].startswith("/v1/") else send)
        except asyncio.CancelledError:
            if not self._service.is_stopping:  # else the time is over, and the connection is closed
                raise

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1")
        if self._needs_local_host and not is_local_host(host):
            raise ApiError(
                403, f"this server answers under local names only, not as {host[:200]!a}; an API key lifts this"
            )
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin and _without_scheme(origin) != host.lower():
            raise ApiError(403, f"pages of {origin[:200]!a} may not use this server")
        if self._key is None or scope["path"] in _OPEN_PATHS or scope["path"].startswith("/page/"):
            return
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            reason = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise ApiError(401, reason, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _generation(service: Service, answer: _Answer) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        with ExitStack() as resources:
            try:
                answered = resources.enter_context(service.one_request())
                body = await read_body(request, max_bytes=service.max_body_bytes, timeout_s=service.limits.body_s)
                response = await answer(service, request, body, resources)
            except ApiError as exc:
                service.refusals.add(exc, request.url.path, request.client.host if request.client else "")
                return error_response(exc)
            except ClientGoneError:
                return Response(status_code=499)  # it is not sent: the connection is closed
            except Exception as exc:  # noqa: BLE001 - the engine's errors, and bugs
                _LOG.error("an answer failed", exc_info=exc)
                return error_response(failed(exc))
            if isinstance(response, EventStream):
                response.before_last = answered
            return response

    return respond


def _health(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        state = "stopping" if service.is_stopping else "ok"
        return JSONResponse({"status": state}, status_code=503 if service.is_stopping else 200)

    return respond


def _status(service: Service, table: PrefixTable) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        uptime_s = time.monotonic() - service.started
        # The store's sizes come from the disk, or from a daemon.
        status = await anyio.to_thread.run_sync(
            lambda: status_of(service.cache, table, count=_PREFIXES, uptime_s=uptime_s)
        )
        serving = {
            **service.monitor.status(),
            "active": service.num_active,
            "engine": asdict(service.engine.stats()),
        }
        return JSONResponse({**status, "serving": serving}, headers={"Cache-Control": "no-store"})

    return respond


def _metrics(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        counted = list(service.monitor.metrics(asdict(service.engine.stats())))
        try:
            text, kind = await anyio.to_thread.run_sync(lambda: exposition((*metrics_of(service.cache), *counted)))
        except ConfigError as exc:  # without prometheus-client
            return error_response(ApiError(501, str(exc), code="not_installed"))
        return Response(text, media_type=kind)

    return respond


def _models(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_model(service)]})

    return respond


def _one_model(service: Service) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        try:
            service.check_model(request.path_params["name"])
        except ApiError as exc:
            return error_response(exc)
        return JSONResponse(_model(service))

    return respond


def _model(service: Service) -> dict[str, Any]:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "tierkv",
        "max_model_len": service.room,
    }


async def _http_error(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)
    reasons = {404: f"there is no {request.url.path[:200]!a}", 405: f"not with {request.method[:20]!a}"}
    error = ApiError(exc.status_code, reasons.get(exc.status_code, exc.detail), headers=exc.headers)
    return error_response(error)


async def _unexpected(request: Request, exc: Exception) -> Response:
    return error_response(failed(exc))  # the server logs the exception itself


def _without_scheme(origin: str) -> str:
    return origin.lower().partition("://")[2]
