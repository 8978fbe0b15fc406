"""Errors in the shape of OpenAI's API, and which error of the engine becomes which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tierkv.errors import CapacityError, ClosedError, ConfigError, QueueFullError, TierKVError

__all__ = ["ApiError", "failed", "refused", "shutting_down", "too_busy"]

_RETRY_S = "1"
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class ApiError(Exception):
    """An answer with an HTTP status of 400 or more. param: the field that is wrong. code: a word for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers: dict[str, str] = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the JSON object."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        if self.status == 429:
            kind = "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def too_busy(reason: str) -> ApiError:
    """Return the error of a full queue."""
    return ApiError(429, reason, code="rate_limit_exceeded", headers={"Retry-After": _RETRY_S})


def shutting_down() -> ApiError:
    """Return the error of a server that is about to end."""
    headers = {"Retry-After": _RETRY_S, "Connection": "close"}
    return ApiError(503, "the server is shutting down", code="shutting_down", headers=headers)


def refused(error: TierKVError) -> ApiError:
    """Return the answer to a request that the engine has refused."""
    if isinstance(error, QueueFullError):
        return too_busy(str(error))
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="context_length_exceeded")
    return ApiError(400, str(error)) if isinstance(error, ConfigError) else failed(error)


def failed(error: Exception) -> ApiError:
    """Return the answer to a request that failed while it was computed. What is no error of tierkv's stays inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClosedError):
        return shutting_down()
    if isinstance(error, TierKVError):
        return ApiError(500, str(error), code="model_failed")
    return ApiError(500, "the server failed to answer; its log says why", code="internal_error")
