"""The client's socket: connect to a daemon of the own user, and wait for it no longer than until a deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import stat
import time
import weakref
from pathlib import Path

from tierkv.daemon.host import peer_of
from tierkv.errors import DaemonError, DaemonGoneError
from tierkv.values.users import group_name, user_name

__all__ = [
    "CONNECT_TIMEOUT_S",
    "LONGEST_WAIT_S",
    "MOST_DESCRIPTORS",
    "connect",
    "is_readable",
    "reason_of",
    "receive",
    "receive_greeting",
    "seconds_left",
]

CONNECT_TIMEOUT_S = 5.0
MOST_DESCRIPTORS = 16
"""That are read from a greeting, so that they can be closed: the slab's and those of the lease flags may come."""

LONGEST_WAIT_S = 3600.0
"""Of one system call, which takes milliseconds as an int."""

_READ_BYTES = 256 << 10
_OPEN: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def connect(path: Path, *, timeout_s: float = CONNECT_TIMEOUT_S, daemon_user: int | None = None) -> socket.socket:
    """Return a socket that is connected to the daemon. Raises DaemonGoneError if no daemon answers in time.

    daemon_user: id of another user whose daemon may be used. Raises DaemonError if the daemon belongs to a further one,
    since a daemon decides what is computed with, or does not let this process in.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout_s)
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
        _OPEN.add(connection)
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
    return bool(poller.poll(min(timeout_s, LONGEST_WAIT_S) * 1e3))


def seconds_left(deadline: float) -> float:
    """Return the seconds until a deadline of the monotonic clock. Raises TimeoutError once it is past."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def receive(connection: socket.socket, deadline: float) -> bytes:
    """Return the next bytes. Leaves the socket's timeout alone: it belongs to the senders."""
    while not is_readable(connection, seconds_left(deadline)):
        pass
    return connection.recv(_READ_BYTES, socket.MSG_DONTWAIT)


def receive_greeting(connection: socket.socket, deadline: float) -> tuple[bytes, list[int], bool]:
    """Wait for bytes; return them, the descriptors that came with them, and whether more descriptors came.

    Raises OSError, and TimeoutError after the deadline of the monotonic clock.
    """
    connection.settimeout(min(seconds_left(deadline), LONGEST_WAIT_S))
    data, descriptors, flags, _ = socket.recv_fds(connection, _READ_BYTES, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
    return data, descriptors, bool(flags & socket.MSG_CTRUNC)


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


def _close_in_forked_process() -> None:
    """Close the sockets that this process has inherited: else the parent's connections would not end with the parent.

    Takes no lock and sends nothing: the connection is the parent's.
    """
    for connection in list(_OPEN):
        with contextlib.suppress(OSError):
            connection.close()


os.register_at_fork(after_in_child=_close_in_forked_process)
