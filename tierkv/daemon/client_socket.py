"""The client's socket: connect to a daemon of the own user, and wait for it no longer than until a deadline."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
import time
from pathlib import Path

from tierkv.daemon.host import peer_of
from tierkv.errors import DaemonError, DaemonGoneError
from tierkv.values.users import group_name, user_name

__all__ = ["CONNECT_TIMEOUT_S", "connect", "is_readable", "reason_of", "seconds_left"]

CONNECT_TIMEOUT_S = 5.0


def connect(path: Path, *, daemon_user: int | None = None) -> socket.socket:
    """Return a socket that is connected to the daemon. Raises DaemonGoneError if no daemon answers.

    daemon_user: id of another user whose daemon may be used. Raises DaemonError if the daemon belongs to a further one,
    since a daemon decides what is computed with, or does not let this process in.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
    except (OSError, ValueError) as exc:
        connection.close()
        if isinstance(exc, PermissionError) and (owner := _owner_of(path)):
            raise DaemonError(owner, hint="tierkv daemon start --group lets a group in") from exc
        raise DaemonGoneError(
            f"no daemon answers at {path}: {reason_of(exc)}", hint="tierkv daemon start --detach starts one"
        ) from exc
    try:
        _require_trusted(connection, path, daemon_user)
        connection.set_inheritable(False)
    except BaseException:
        connection.close()
        raise
    return connection


def is_readable(connection: socket.socket, timeout_s: float, *, events: int = select.POLLIN) -> bool:
    """Wait for something to read, or for other events; return whether it came in time.

    Raises OSError if the socket is closed, as it is when another thread has lost the daemon.
    """
    poller = select.poll()
    try:
        poller.register(connection, events)
    except ValueError as exc:  # the descriptor of a closed socket is -1
        raise OSError(errno.EBADF, os.strerror(errno.EBADF)) from exc
    return bool(poller.poll(timeout_s * 1e3))


def seconds_left(deadline: float) -> float:
    """Return the seconds until a deadline of the monotonic clock. Raises TimeoutError once it is past."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def reason_of(exc: Exception) -> str:
    """Return why a call on the socket failed, in a few words."""
    if isinstance(exc, TimeoutError):
        return "it did not answer in time"
    return getattr(exc, "strerror", None) or str(exc)


def _require_trusted(connection: socket.socket, path: Path, daemon_user: int | None) -> None:
    _, uid = peer_of(connection)
    if uid not in (0, os.geteuid(), daemon_user):
        raise DaemonError(
            f"the daemon at {path} belongs to user {user_name(uid)}, and it decides what is computed with",
            hint=f"TIERKV_DAEMON_USER={user_name(uid)}, or daemon_user, uses it if you trust that user",
        )


def _owner_of(path: Path) -> str:
    """Return whose daemon lets this process not in; empty where that cannot be seen."""
    try:
        state = os.stat(path)
    except OSError:
        return ""
    group = f" and its group {group_name(state.st_gid)}" if state.st_mode & stat.S_IWGRP else ""
    return f"the daemon at {path} belongs to user {user_name(state.st_uid)}, and lets only that user{group} in"
