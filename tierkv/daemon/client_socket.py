"""The client's socket: connect to a daemon of the own user, and wait for it no longer than until a deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import time
import weakref
from pathlib import Path

from tierkv.daemon.host import peer_of
from tierkv.errors import DaemonError, DaemonGoneError

__all__ = ["CONNECT_TIMEOUT_S", "connect", "is_readable", "reason_of", "seconds_left"]

CONNECT_TIMEOUT_S = 5.0


def connect(path: Path) -> socket.socket:
    """Return a socket that is connected to the daemon. Raises DaemonGoneError if no daemon answers.

    Raises DaemonError if the daemon belongs to another user: a daemon decides what is computed with.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(os.fspath(path))
    except (OSError, ValueError) as exc:
        connection.close()
        raise DaemonGoneError(
            f"no daemon answers at {path}: {reason_of(exc)}", hint="tierkv daemon start --detach starts one"
        ) from exc
    try:
        _require_own_user(connection, path)
        connection.set_inheritable(False)
        _SOCKETS.add(connection)
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


def _require_own_user(connection: socket.socket, path: Path) -> None:
    _, uid = peer_of(connection)
    if uid not in (0, os.geteuid()):
        raise DaemonError(
            f"the daemon at {path} belongs to user {uid}, not to user {os.geteuid()} or to root",
            hint="choose a socket in a folder that only you can write to",
        )


_SOCKETS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_forked_process() -> None:
    """Close the sockets that this process has inherited: else the parent's connections would not end with the parent.

    Takes no lock and sends nothing: the connection is the parent's.
    """
    for connection in list(_SOCKETS):
        with contextlib.suppress(OSError):
            connection.close()


os.register_at_fork(after_in_child=_close_in_forked_process)
