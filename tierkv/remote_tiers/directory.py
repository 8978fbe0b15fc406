"""DirectoryClient: records as files in a directory that several machines share, such as NFS or Lustre.

LMDB is not safe there. A file is written beside its place and renamed, so no reader sees half of it; what a crash of
the file server leaves half written does not match its checksum. Every call runs on a thread of its own: the kernel may
never end a call to a file server that is gone.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import socket
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from tierkv.errors import RemoteError, RemoteRefusedError
from tierkv.remote_tiers.call_threads import CallThreads
from tierkv.remote_tiers.directory_sweep import TEMPORARY, Sweeper
from tierkv.remote_tiers.protocol import (
    DESCRIPTION_FILE,
    FORMAT_FOLDER,
    MOST_NAMESPACES,
    Deadline,
    RemoteDamageError,
    RemoteKey,
    namespace_folder,
)
from tierkv.remote_tiers.record_memory import RecordMemory
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codec import Bytes
from tierkv.values.block import BlockHash
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES

__all__ = ["DirectoryClient"]

Result = TypeVar("Result")

_MOST_THREADS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)


class DirectoryClient:
    """Satisfies `RemoteClient`. The directory must be there: a place where nothing is mounted is not filled.

    With the option `max_bytes` one of the machines that write removes the files that were used longest ago.
    """

    def __init__(self, url: RemoteUrl) -> None:
        self._root = Path(url.path)
        self._least_free = int(url.number("min_free_bytes", 0))
        self._threads = CallThreads(_MOST_THREADS, name="tierkv-remote-dir")
        own = secrets.token_hex(8)  # process ids are those of a container, and one process may have several clients
        self._names = (f"{socket.gethostname()}-{os.getpid()}-{own}-{number}" for number in itertools.count())
        most_bytes = int(url.number("max_bytes", 0))
        self._memory = RecordMemory()
        self._sweeper = Sweeper(self._root, most_bytes=most_bytes) if most_bytes else None

    def ping(self, deadline: Deadline) -> None:
        """Look at the directory."""

        def look() -> None:
            if not stat.S_ISDIR(os.stat(self._root).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory")

        self._call(look, deadline)

    def prefix(self, keys: Sequence[RemoteKey], deadline: Deadline) -> int:
        """Look for the last file, then by bisection: parents are written first, and removed last."""
        paths = [self._root / key.path() for key in keys]
        return self._call(lambda: _num_present(paths), deadline) if paths else 0

    def read(self, key: RemoteKey, deadline: Deadline, *, most_bytes: int) -> Bytes | None:
        """Read a file into memory of its own. A late read keeps that memory until it ends."""
        path = self._root / key.path()
        size = self._call(lambda: _size_of(path), deadline)
        if size is None:
            return None
        if size > most_bytes:
            raise RemoteDamageError(f"a file of {size} bytes is longer than any record of this layout")
        deadline.allow_bytes(size)
        memory = self._memory.take(size)
        return self._call(lambda: _read(path, memory), deadline)

    def write(self, key: RemoteKey, record: Bytes, deadline: Deadline, *, replace: bool) -> bool:
        """Write a file beside its place and rename it. Two writers of one key write the same record."""
        path = self._root / key.path()
        temporary = path.with_name(f"{TEMPORARY}{next(self._names)}")

        def put() -> bool:
            if not replace and path.exists():
                return False
            if self._least_free:
                free = os.statvfs(self._root)
                if free.f_bavail * free.f_frsize < self._least_free + record.size:
                    raise OSError(errno.ENOSPC, "less is free than min_free_bytes")
            path.parent.parent.parent.mkdir(exist_ok=True)  # not the root itself: see the class
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(temporary, path, record.data)
            return True

        is_written = self._call(put, deadline)
        if self._sweeper and is_written:
            self._sweeper.note_written(record.size)
        return is_written

    def touch(self, keys: Sequence[RemoteKey], deadline: Deadline) -> None:
        """Set the files' times, the last file first: parents are used later than their children."""
        paths = [self._root / key.path() for key in reversed(keys)]

        def set_times() -> None:
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(path, follow_symlinks=False)

        self._call(set_times, deadline)

    def describe(self, namespace: BlockHash, description: bytes, deadline: Deadline) -> None:
        """Write namespace.json beside the namespace's records."""
        folder = self._root / namespace_folder(namespace)
        temporary = folder / f"{TEMPORARY}{next(self._names)}"

        def put() -> None:
            if (folder / DESCRIPTION_FILE).exists():
                return
            folder.parent.mkdir(exist_ok=True)
            folder.mkdir(exist_ok=True)
            _write(temporary, folder / DESCRIPTION_FILE, memoryview(description))

        self._call(put, deadline)

    def descriptions(self, deadline: Deadline) -> list[bytes]:
        """Read namespace.json of each namespace."""

        def read() -> list[bytes]:
            found = []
            for path in itertools.islice(
                sorted((self._root / FORMAT_FOLDER).glob("*/" + DESCRIPTION_FILE)), MOST_NAMESPACES
            ):
                memory = np.empty(DESCRIPTION_LIMIT_BYTES, dtype=np.uint8)
                with contextlib.suppress(RemoteDamageError, PermissionError):  # others may write in the directory
                    text = _read(path, memory) if _size_of(path) else None
                    found += [] if text is None else [text.tobytes()]
            return found

        return self._call(read, deadline)

    def close(self) -> None:
        """Let all threads end."""
        if self._sweeper:
            self._sweeper.close()
        self._threads.close()

    def _call(self, work: Callable[[], Result], deadline: Deadline) -> Result:
        """Run file operations on a thread, for as long as the deadline allows."""
        try:
            return self._threads.call(work, left_s=deadline.left_s)
        except OSError as exc:
            if exc.errno in _FULL:
                raise RemoteRefusedError("the shared directory is full", code="FULL") from exc
            if exc.errno in _DENIED:
                raise RemoteRefusedError("the shared directory does not allow that", code="DENIED") from exc
            raise RemoteError(f"the shared directory cannot be used: {exc.strerror}") from exc


def _num_present(paths: Sequence[Path]) -> int:
    """Return how many leading files are there, as far as files are missing from the end only."""
    low, high = 0, len(paths)  # the first `low` are there, those from `high` on are not
    at = high - 1
    while low < high:
        if paths[at].exists():
            low = at + 1
        else:
            high = at
        at = (low + high) // 2
    return low


def _write(temporary: Path, path: Path, data: memoryview) -> None:
    """Write a new file and rename it. Follows no symbolic link at its place: strangers may write in the directory."""
    with open(temporary, "xb", buffering=0) as file:
        try:
            while data:
                data = data[file.write(data) :]
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def _size_of(path: Path) -> int | None:
    try:
        status = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise RemoteDamageError("a record's place in the shared directory has no regular file")
    return status.st_size


def _read(path: Path, memory: Bytes) -> Bytes | None:
    """Return the file's first bytes in `memory`, less than it takes where the file ends sooner."""
    size = memory.size
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        found = 0
        while found < size:
            count = os.preadv(fd, [memory[found:].data], found)
            if not count:
                break
            found += count
    finally:
        os.close(fd)
    return memory[:found]
