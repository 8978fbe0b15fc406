"""Connecting to a daemon from the command line: TIERKV_DAEMON_USER names another user whose daemon may be used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from tierkv.daemon.client import TIMEOUT_S, DaemonClient
from tierkv.daemon.messages import Hello
from tierkv.errors import ConfigError
from tierkv.values.users import user_id

__all__ = ["named_daemon_user", "open_client"]


def open_client(socket: Path, hello: Hello | None = None, *, timeout_s: float = TIMEOUT_S) -> DaemonClient:
    """Connect to a daemon of this user, of root, or of the user that the environment names."""
    return DaemonClient(socket, hello, timeout_s=timeout_s, daemon_user=named_daemon_user(os.environ))


def named_daemon_user(environment: Mapping[str, str]) -> int | None:
    """Return the id of the user that TIERKV_DAEMON_USER names; None if it is unset or empty. Raises ConfigError."""
    text = environment.get("TIERKV_DAEMON_USER")
    try:
        return user_id(text) if text else None
    except ConfigError as exc:
        raise ConfigError(f"TIERKV_DAEMON_USER: {exc}") from exc
