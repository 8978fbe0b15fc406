"""The daemon and the machine: socket, lock files, the users and processes at the other ends, memory."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import resource
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

from tierkv.errors import CapacityError, ConfigError, DaemonError, StoreError
from tierkv.values.files import open_regular
from tierkv.values.free_memory import memory_room
from tierkv.values.units import format_bytes
from tierkv.values.users import group_name

__all__ = [
    "NOT_WRITTEN",
    "STORE_LOCK",
    "LockFile",
    "check_folder",
    "check_memory",
    "check_reachable",
    "connections_that_fit",
    "exclusive_file",
    "listening_socket",
    "memory_of_process",
    "peer_of",
    "read_lock_file",
]

STORE_LOCK = "daemon.lock"
"""In a store's directory: held by the daemon that has the store; names its process and its socket."""

NOT_WRITTEN = "not written:"
"""Before a number of blocks, in the lock file of a daemon that has ended."""

_log = logging.getLogger(__name__)

_MAX_SOCKET_PATH_BYTES = 107
_BACKLOG = 128
_OWN_DESCRIPTORS = 256  # of store, state files, slab, and what Python opens
_CREDENTIALS = struct.Struct("iII")


class LockFile:
    """A lock file that this process holds. Its first line is the process id, further lines are notes."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def note(self, *lines: str) -> None:
        """Write these lines after the process id, in place of earlier ones. Any thread may call this."""
        data = "".join(f"{line}\n" for line in (str(os.getpid()), *lines)).encode()
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, data, 0)


@contextlib.contextmanager
def exclusive_file(path: Path, what: str) -> Iterator[LockFile]:
    """Hold a lock file until the process ends. Raises DaemonError with the id of another process that holds it.

    The file must be a regular file of this user: in a shared directory another user may have put something else there.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd = _open_locked(path, what)
    try:
        lock = LockFile(fd)
        lock.note()
        yield lock
    finally:
        os.close(fd)


def read_lock_file(path: Path) -> tuple[bool, list[str]]:
    """Return whether a process holds a lock file, and the file's lines; (False, []) without such a file."""
    try:
        fd = open_regular(path, follow_links=False)
    except (OSError, StoreError, ConfigError):
        return False, []
    try:
        lines = os.pread(fd, 8192, 0).decode(errors="surrogateescape").splitlines()
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True, lines
        return False, lines
    finally:
        os.close(fd)


def _open_locked(path: Path, what: str) -> int:
    """Open and lock a file. Try again if another process has replaced it meanwhile."""
    while True:
        try:
            fd = open_regular(path, os.O_RDWR | os.O_CREAT, follow_links=False, own=True)
        except StoreError as exc:
            raise DaemonError(f"the lock file cannot be used: {exc}", hint="remove it, or name another place") from exc
        except OSError as exc:
            raise DaemonError(f"{path} cannot be opened: {exc.strerror}") from exc
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, os.fstat(fd)):
                return fd
        except BlockingIOError as exc:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").split("\n")[0].strip() or "unknown"
            os.close(fd)
            raise DaemonError(
                f"{what} belongs to another daemon, process {holder}", hint="stop that one first"
            ) from exc
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _is_at(path: Path, state: os.stat_result) -> bool:
    """Return whether a path still names this file."""
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), state)
    except OSError:
        return False


def _upwards(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Yield a directory and those above it, with their states. Raises DaemonError."""
    at = folder.resolve()
    for each in (at, *at.parents):
        try:
            state = os.stat(each)
        except OSError as exc:
            raise DaemonError(f"{each} cannot be used for a socket: {exc.strerror}") from exc
        yield each, state


def check_reachable(folder: Path, group: int) -> None:
    """Raise DaemonError unless a group may pass through a directory and those above it."""
    for each, state in _upwards(folder):
        if not (state.st_mode & stat.S_IXOTH or (state.st_gid == group and state.st_mode & stat.S_IXGRP)):
            raise DaemonError(
                f"the group {group_name(group)} cannot reach {folder}: it may not pass through {each}",
                hint="name a socket in a directory of the group, such as one of mode 0750",
            )


def check_folder(folder: Path) -> None:
    """Raise DaemonError if every user may replace files in a directory; warn if another user or a group may."""
    at = folder.resolve()
    for each, state in _upwards(folder):
        if state.st_uid not in (0, os.geteuid()):
            _log.warning("user %d owns %s and may replace files there", state.st_uid, each)
        if state.st_mode & stat.S_ISVTX:
            continue
        if state.st_mode & stat.S_IWOTH and each == at:
            raise DaemonError(
                f"every user may replace files in {each}", hint=f"chmod o-w {each}, or name another place with --socket"
            )
        if state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            _log.warning("other users may replace files in %s (mode %o)", each, stat.S_IMODE(state.st_mode))


@contextlib.contextmanager
def listening_socket(path: Path, *, group: int | None = None) -> Iterator[tuple[socket.socket, LockFile]]:
    """Listen on a UNIX socket that only its owner may use, or a group too. The socket of a dead daemon is replaced.

    Yields the lock file of the socket too. Raises DaemonError if a daemon uses the path or other users could replace
    the file, ConfigError for a path that no socket can have.
    """
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket's path is longer than {_MAX_SOCKET_PATH_BYTES} bytes: {path}",
            hint="name another with --socket",
        )
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    check_folder(path.parent)
    mode = 0o600 if group is None else 0o660
    if group is not None:
        check_reachable(path.parent, group)
    with exclusive_file(path.with_name(path.name + ".lock"), f"the socket {path}") as lock:
        _remove_stale(path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        mine: os.stat_result | None = None
        try:
            os.fchmod(listener.fileno(), 0o600)  # Linux creates the file with the mode of the socket
            listener.bind(os.fspath(path))
            mine = os.stat(path, follow_symlinks=False)
            if group is not None:
                os.chown(path, -1, group, follow_symlinks=False)
            if stat.S_IMODE(mine.st_mode) != mode:
                os.chmod(path, mode)  # before any client can connect
            mine = os.stat(path, follow_symlinks=False)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            yield listener, lock
        except OSError as exc:
            raise DaemonError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
        finally:
            listener.close()
            if mine and _is_at(path, mine):
                path.unlink(missing_ok=True)


def _remove_stale(path: Path) -> None:
    """Remove the socket of a dead daemon of this user. Raises DaemonError for anything else at that path."""
    try:
        state = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise DaemonError(f"{path} cannot be looked at: {exc.strerror}") from exc
    if not stat.S_ISSOCK(state.st_mode):
        raise DaemonError(f"{path} exists and is no socket", hint="name another with --socket")
    if state.st_uid != os.geteuid():
        raise DaemonError(f"{path} is the socket of user {state.st_uid}", hint="name another with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            pass  # such as a full queue of connections: the listener lives
    raise DaemonError(f"a process listens on {path}", hint="stop that one first")


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return (process id, user id) of the other end, as the kernel knows them."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(packed)
    return pid, uid


def connections_that_fit() -> int:
    """Return how many connections may be open: each takes three descriptors, and files take some."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 20
    return max(1, (soft - min(_OWN_DESCRIPTORS, soft // 2)) // 3)


def check_memory(warm_bytes: int) -> None:
    """Raise CapacityError if a slab of that size does not fit the memory left on this machine or control group."""
    room = memory_room()
    if warm_bytes > room.free_bytes:
        raise CapacityError(
            f"a warm tier of {format_bytes(warm_bytes)} does not fit: {room.limited_by} leaves "
            f"{format_bytes(room.free_bytes)} of memory",
            hint="lower --warm; --warm 50% takes half of what is left",
        )


def memory_of_process() -> int:
    """Return the bytes of this process's own memory, without the slab; 0 if they are not known."""
    return _read_kib(Path("/proc/self/status"), "RssAnon")


def _read_kib(path: Path, field: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
    return 0
