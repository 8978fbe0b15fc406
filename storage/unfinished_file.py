"""A file that is written beside its place, synced, then renamed: a reader sees the old file or the whole new one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from pathlib import Path

from tierkv.errors import StoreError
from tierkv.storage.lmdb_file import sync_file
from tierkv.values.files import open_regular

__all__ = ["BACKUP_MAGIC", "STATE_MAGIC", "UNFINISHED_MAGIC", "WRITE_WAIT_S", "UnfinishedFile", "remove_unfinished"]

STATE_MAGIC = b"TKVSTATE"
BACKUP_MAGIC = b"TKVBACK\0"
UNFINISHED_MAGIC = b"TKVSAVE\0"
"""Where a finished file has one of the others; files that begin otherwise are never removed."""

WRITE_WAIT_S = 60.0
"""How long a disk may take for one write or sync."""

_FINISHED = (STATE_MAGIC, BACKUP_MAGIC)
_UNFINISHED_NAME = re.compile(r"\.tierkv-save-[0-9a-f]{32}")
_ATTEMPTS = 16
_SYNC_BYTES = 64 << 20  # so that no call to the system takes as long as the whole file does


def _check_target(path: Path) -> None:
    """Raise StoreError unless a path is free or names a regular file: nothing else is replaced."""
    try:
        mode = os.stat(path, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise StoreError(f"{path} is a symbolic link", hint="save to the path that it points to")
    if not stat.S_ISREG(mode):
        kind = "a directory" if stat.S_ISDIR(mode) else "a FIFO, a socket or a device"
        raise StoreError(f"{path} is {kind}, not a regular file")


class UnfinishedFile:
    """A file beside the target, locked for as long as this process writes it. Every method may wait for the disk."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self.size = 0
        self._synced = 0

    @classmethod
    def beside(cls, target: Path) -> UnfinishedFile:
        """Make one, and remove those of killed saves. Raises StoreError for a target that must not be replaced."""
        _check_target(target)
        remove_unfinished(target.parent)
        for _ in range(_ATTEMPTS):
            path = target.parent / f".tierkv-save-{secrets.token_hex(16)}"
            unfinished = cls(
                os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path
            )
            try:
                lock_file(unfinished._fd)
                if os.fstat(unfinished._fd).st_nlink:  # another save may have removed it before it was locked
                    return unfinished
            except BlockingIOError:  # or is about to
                pass
            except BaseException:
                unfinished.remove()
                raise
            os.close(unfinished._fd)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    def append(self, data: bytes | memoryview) -> None:
        """Write at the end, and sync now and then, so that `sync` never takes long."""
        self.write_at(data, self.size)
        self.size += len(data)
        if self.size - self._synced > _SYNC_BYTES:
            self._synced = self.size
            os.fdatasync(self._fd)

    def write_at(self, data: bytes | memoryview, at: int) -> None:
        """Write bytes where they belong."""
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self._fd, view, at)
            view = view[written:]
            at += written

    def sync(self) -> None:
        """Return when all is on the disk."""
        os.fsync(self._fd)

    def replace(self, target: Path) -> None:
        """Take the target's place, and close."""
        _check_target(target)
        os.replace(self._path, target)
        with contextlib.suppress(PermissionError):  # a directory that may be written to and not read
            sync_file(target.parent)
        os.close(self._fd)

    def remove(self) -> None:
        """Close and delete it."""
        os.close(self._fd)
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def remove_unfinished(directory: Path) -> None:
    """Remove the unfinished files of killed saves from a directory. Others, and those that cannot be removed, stay.

    An unfinished file has a name that only saves give, is a regular file of this user with one name, is not locked, and
    is empty or begins as an unfinished or a finished state file does.
    """
    with contextlib.suppress(OSError), os.scandir(directory) as found:
        for each in found:
            if _UNFINISHED_NAME.fullmatch(each.name):
                with contextlib.suppress(OSError, StoreError):
                    _remove_if_unfinished(directory / each.name)


def _remove_if_unfinished(path: Path) -> None:
    fd = open_regular(path, follow_links=False, own=True)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.pread(fd, len(UNFINISHED_MAGIC), 0) in (b"", UNFINISHED_MAGIC, *_FINISHED):
            os.unlink(path)
    finally:
        os.close(fd)


def lock_file(fd: int) -> None:
    """Lock a file. Raises BlockingIOError where another process has it; a file system without locks has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as exc:
        if exc.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise
