"""Writing a state file: beside its place, synced, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xxhash

from tierkv.background.call_thread import CallThread
from tierkv.errors import ConfigError, StoreError
from tierkv.storage.lmdb_file import sync_file
from tierkv.storage.record import parse_record
from tierkv.storage.state_format import ALIGN_BYTES, MAGIC, ROW, ROW_LIMIT, StateHeader
from tierkv.values.block import BlockHash
from tierkv.values.files import check_path, open_regular, translated_errors
from tierkv.values.namespace import parse_description

__all__ = ["WRITE_WAIT_S", "SavedState", "write_state_file"]

_UNFINISHED_MAGIC = b"TKVSAVE\0"  # where a finished file has MAGIC; files that begin otherwise are never removed
_UNFINISHED_NAME = re.compile(r"\.tierkv-save-[0-9a-f]{32}")
_ATTEMPTS = 16
_SYNC_BYTES = 64 << 20  # so that no call to the system takes as long as the whole file does

WRITE_WAIT_S = 60.0
"""How long a disk may take for one write or sync."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """The result of a save. left_out: records that were damaged, or of another format."""

    blocks: int
    file_bytes: int
    left_out: int = 0


def write_state_file(
    path: Path,
    *,
    namespace: BlockHash,
    description: bytes,
    records: Iterable[bytes],
    calls: CallThread | None = None,
) -> SavedState:
    """Write records into one file, atomically: beside the target, synced, then renamed over it.

    records: each is checked as a reader checks it. Left out are damaged records, those of another format or namespace,
    those whose codec does not fit the namespace, and repeated blocks. calls: the thread that waits for the disk; by
    default a new one.
    Raises StoreError if the file cannot be written, also where the disk does not answer; the target is then unchanged.
    It may be missing or a regular file; anything else, a symbolic link too, is refused. Raises ConfigError if `path` is
    no path. A later save removes the unfinished files of saves that were killed.
    """
    path = check_path(path)
    with ExitStack() as stack:
        stack.enter_context(translated_errors(f"cannot write {path}"))
        lossy_codec = _lossy_codec_of(namespace, description)
        path = path.absolute()
        calls = calls or stack.enter_context(CallThread(f"cannot write {path}", wait_s=WRITE_WAIT_S))
        unfinished = calls.call(partial(_Unfinished.beside, path), undo=_Unfinished.remove)
        try:
            writer = _Writer(unfinished, namespace, description, lossy_codec)
            calls.call(writer.begin)
            for record in records:
                calls.call(partial(writer.add, record))
            saved = calls.call(writer.finish)
            calls.call(unfinished.sync)
            calls.call(partial(unfinished.replace, path))
        except BaseException:
            calls.clean_up(unfinished.remove)
            raise
        return saved


def _lossy_codec_of(namespace: BlockHash, description: bytes) -> str:
    """Return the codec that a description names. Raises StoreError unless the namespace's digest is computed of it."""
    try:
        parsed = parse_description(description)
    except ConfigError as exc:
        raise StoreError(f"the namespace {namespace.hex()} cannot be saved: {exc}") from exc
    if parsed.digest != namespace:
        raise StoreError(
            f"the namespace {namespace.hex()} cannot be saved: its description is that of another namespace"
        )
    return parsed.lossy_codec


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


class _Unfinished:
    """A file beside the target, locked for as long as this process writes it. Every method may wait for the disk."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path
        self.size = 0
        self._synced = 0

    @classmethod
    def beside(cls, target: Path) -> _Unfinished:
        """Make one, and remove those of killed saves. Raises StoreError for a target that must not be replaced."""
        _check_target(target)
        _remove_unfinished(target.parent)
        for _ in range(_ATTEMPTS):
            path = target.parent / f".tierkv-save-{secrets.token_hex(16)}"
            unfinished = cls(
                os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), path
            )
            try:
                _lock(unfinished._fd)
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


def _remove_unfinished(directory: Path) -> None:
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
        if os.pread(fd, len(MAGIC), 0) in (b"", _UNFINISHED_MAGIC, MAGIC):
            os.unlink(path)
    finally:
        os.close(fd)


def _lock(fd: int) -> None:
    """Lock a file. Raises BlockingIOError where another process has it; a file system without locks has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as exc:
        if exc.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise


class _Writer:
    """Writes the parts of a state file in order."""

    def __init__(self, file: _Unfinished, namespace: BlockHash, description: bytes, lossy_codec: str) -> None:
        self._file = file
        self._namespace = namespace
        self._description = description
        self._lossy_codec = lossy_codec
        self._rows: dict[BlockHash, tuple[bytes, bytes, int, int, int, int]] = {}
        self._left_out = 0

    def begin(self) -> None:
        """Write a header that says that the file is not finished, and the description."""
        self._file.append(_UNFINISHED_MAGIC.ljust(ALIGN_BYTES, b"\0"))
        self._file.append(self._description)
        self._pad()

    def add(self, record: bytes) -> None:
        """Write a record, if it is sound."""
        try:
            parsed = parse_record(record, lossy_codec=self._lossy_codec)
        except StoreError:
            self._left_out += 1
            return
        info = parsed.info
        if info.namespace != self._namespace:
            self._left_out += 1
            return
        if info.block_hash in self._rows:
            return
        if len(self._rows) == ROW_LIMIT:
            raise StoreError(f"a state file has at most {ROW_LIMIT} blocks")
        row = (info.block_hash, info.parent, self._file.size, parsed.stored_bytes, info.num_tokens, 0)
        self._rows[info.block_hash] = row
        self._file.append(parsed.data.data)
        self._pad()

    def finish(self) -> SavedState:
        """Write the index, and the header last."""
        index_offset = self._file.size
        index = np.array(sorted(self._rows.values()), dtype=ROW).tobytes()
        self._file.append(index)
        header = StateHeader(
            file_bytes=self._file.size,
            description_bytes=len(self._description),
            index_offset=index_offset,
            rows=len(self._rows),
            namespace=self._namespace,
            checksum=xxhash.xxh3_64_intdigest(self._description + index),
        )
        self._file.write_at(header.pack(), 0)
        return SavedState(len(self._rows), header.file_bytes, self._left_out)

    def _pad(self) -> None:
        self._file.append(b"\0" * (-self._file.size % ALIGN_BYTES))
