"""What the daemon needs of the machine: its socket, its locks, its peers' uids, and how much memory there is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from tierkv.errors import CapacityError, ConfigError, DaemonError

__all__ = [
    "check_memory",
    "connections_that_fit",
    "exclusive_file",
    "listening_socket",
    "memory_of_process",
    "peer_of",
]

_MAX_SOCKET_PATH_BYTES = 107
_BACKLOG = 128
_OWN_DESCRIPTORS = 256  # of store, state files, slab, and what Python opens
GIB = 1 << 30


@contextlib.contextmanager
def exclusive_file(path: Path, what: str) -> Iterator[None]:
    """Hold a lock file alone; it dies with the process. Raises DaemonError that names the process that has it."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise DaemonError(f"{path} cannot be opened: {exc.strerror}") from exc
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            raise DaemonError(
                f"{what} belongs to another daemon, process {holder}", hint="stop that one first"
            ) from exc
        os.truncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def listening_socket(path: Path) -> Iterator[socket.socket]:
    """Listen on a UNIX socket that its owner alone may use; a socket file left by a dead daemon is replaced.

    Raises DaemonError if a living daemon has it, ConfigError for a path that no socket can have.
    """
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise ConfigError(
            f"the socket's path is longer than {_MAX_SOCKET_PATH_BYTES} bytes: {path}",
            hint="name another with --socket",
        )
    with exclusive_file(path.with_name(path.name + ".lock"), f"the socket {path}"):
        if path.exists() and not path.is_socket():
            raise DaemonError(f"{path} is there and is no socket", hint="name another with --socket")
        path.unlink(missing_ok=True)  # whoever made it is dead: the lock is ours
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o177)
            try:
                listener.bind(os.fspath(path))
            finally:
                os.umask(before)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            yield listener
        except OSError as exc:
            raise DaemonError(f"cannot listen on {path}: {exc.strerror or exc}") from exc
        finally:
            listener.close()
            path.unlink(missing_ok=True)


def peer_of(connection: socket.socket) -> tuple[int, int]:
    """Return (process id, user id) of who is at the other end, as the kernel knows it."""
    packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, _ = struct.unpack("3i", packed)
    return pid, uid


def connections_that_fit() -> int:
    """Return how many connections may be open: two descriptors each, and some are left for files."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1 << 20
    return max(1, (soft - min(_OWN_DESCRIPTORS, soft // 2)) // 2)


def check_memory(warm_bytes: int) -> None:
    """Raise CapacityError if a slab of that size does not fit what this machine, or this control group, has left."""
    available = min(_available_bytes())
    if warm_bytes > available:
        raise CapacityError(
            f"a warm tier of {warm_bytes / GIB:.1f} GiB does not fit: {available / GIB:.1f} GiB of memory are left",
            hint="lower --warm",
        )


def memory_of_process() -> int:
    """Return bytes of memory that are this process's alone, without the slab; 0 where the system does not tell."""
    return _read_kib(Path("/proc/self/status"), "RssAnon")


def _available_bytes() -> list[int]:
    found = [_read_kib(Path("/proc/meminfo"), "MemAvailable") or 1 << 62]
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):
        found.append(int(limit.read_text()) - int(used.read_text()))
    return found


def _read_kib(path: Path, field: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) << 10
    return 0
