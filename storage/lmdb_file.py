"""The data file of an LMDB 0.9 environment, read without LMDB: its meta pages, single values, and its length.

LMDB maps the file. A page beyond the end of a mapped file ends the process that touches it with SIGBUS, and so may a
damaged tree. So the file is checked before LMDB maps it (lmdb_tree.py), and its length is compared before each
transaction. Values, which are nearly all of the file, are read with plain reads: a file that is cut short while it is
open costs misses. LMDB reads meta and trees through its map within microseconds after the comparison; a cut in
between cannot be survived.

Plain reads cost a copy, which page faults do not; a caller that reads several values has the next ones fetched ahead.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.lmdb_format import (
    OVERFLOW_FLAG,
    PAGE_HEADER,
    PAGE_HEADER_BYTES,
    newest_meta,
    overflow_pages,
    translated,
)
from tierkv.storage.lmdb_search import TreeSearch, find_leaf
from tierkv.storage.record_source import FileRecord, PageCacheMap, ThreadMemory
from tierkv.values.files import open_regular

__all__ = ["DATA_FILE", "LOCK_FILE", "CutShortError", "DataFile", "open_store_file", "sync_file"]

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
_MAX_FILE_BYTES = (1 << 63) - 1  # a damaged page number may point beyond every file
_COMPARED_BYTES = 64  # of a value, to check whether a page is the one that its header says

_logger = logging.getLogger(__name__)


class CutShortError(StoreError):
    """The data file has become shorter while it was open."""


class DataFile:
    """An open data file. Thread-safe. Raises CorruptBlockError if it is shorter than it says, OSError.

    opened_bytes: how long it was when it was opened.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        # Not the lock file: closing any descriptor of that would drop LMDB's own locks.
        self.fd: int = open_store_file(path, os.O_RDONLY if read_only else os.O_RDWR)
        self._ahead_fd = self.fd
        self._page_cache = PageCacheMap(self.fd)
        self._memory = ThreadMemory()
        self._search: TreeSearch | None = None
        try:
            meta = newest_meta(self.fd)
            self._page_bytes = meta.page_bytes
            self.opened_bytes: int = os.fstat(self.fd).st_size
            if (meta.last_page + 1) * meta.page_bytes > self.opened_bytes:
                raise CorruptBlockError("it is cut short")
            self._ahead_fd = _open_again(path, self.fd)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        self._page_cache.close()
        both = {self.fd, self._ahead_fd} - {-1}
        self.fd = self._ahead_fd = -1
        for fd in both:
            with contextlib.suppress(OSError):  # of a disk that has gone: the descriptor is closed all the same
                os.close(fd)

    def require_sound_end(self) -> None:
        """Raise CorruptBlockError if the file says that it is longer than it is: then it must not be mapped anew."""
        meta = newest_meta(self.fd)
        if (meta.last_page + 1) * meta.page_bytes > os.fstat(self.fd).st_size:
            raise CorruptBlockError(f"{self.path} counts pages that it does not have")

    def is_at_its_path(self) -> bool:
        """Return whether the path still names this file, and not a file that another process has put in its place."""
        try:
            return os.path.samestat(os.fstat(self.fd), self.path.stat())
        except OSError:
            return False

    def read_value(self, database: bytes, key: bytes, *, max_bytes: int) -> Bytes | None:
        """Return a committed value, cut where the file ends; in memory of this thread, valid until its next call.

        None where plain reads do not find it, or find it longer than `max_bytes`: the caller then asks LMDB. Only
        within a read transaction, which keeps the value's pages from being used again.
        """
        value = self.open_value(database, key, max_bytes=max_bytes)
        return value.read_whole() if isinstance(value, FileRecord) else value

    def open_value(self, database: bytes, key: bytes, *, max_bytes: int | None = None) -> FileRecord | Bytes | None:
        """Return a committed value, a large one unread. Otherwise, and how long it is valid, as `read_value`."""
        return self.open_values(database, [key], max_bytes=max_bytes)[0]

    def open_values(
        self, database: bytes, keys: Iterable[bytes], *, max_bytes: int | None = None
    ) -> list[FileRecord | Bytes | None]:
        """Return values of one committed state, each as `open_value` does; it costs little more than one of them."""
        try:
            search = self._newest_search()
        except CorruptBlockError:
            return [None for _ in keys]
        return [self._open_value(search, database, key, max_bytes) for key in keys]

    def fetch_values(self, database: bytes, keys: Sequence[bytes]) -> None:
        """Ask the system to read values into its cache, in their order in the file; missing ones are passed over.

        Asks for no other one where the first and the last of them are in memory.
        """
        values = self._open_noted(database, keys)
        found = [each for each in values if isinstance(each, FileRecord)]
        found.sort(key=lambda each: each.offset)
        with contextlib.suppress(OSError):
            is_missing = [each.fetch_ahead() for each in found[:1] + found[1:][-1:]]
            for each in found[1:-1] if any(is_missing) else ():
                each.fetch_ahead()

    def forget_values(self, database: bytes, keys: Sequence[bytes]) -> None:
        """Ask the system to drop large values from its cache."""
        for value in self.open_values(database, keys):
            if isinstance(value, FileRecord):
                value.forget_pages()

    def is_in_memory(self, database: bytes, key: bytes) -> bool:
        """Return whether reading a value takes no disk, judged by its middle; True for a missing value.

        It looks where the state that was read last has the value, so the question takes no disk either.
        """
        search = self._search
        value = None if search is None else self._open_value(search, database, key, None)
        value = self.open_value(database, key) if value is None else value
        return self._page_cache.is_in_memory(value.middle) if isinstance(value, FileRecord) else True

    def repair_value_header(self, database: bytes, key: bytes, value: memoryview | None) -> None:
        """Compare the header of a value's pages with what it must be, and write it anew if it differs.

        value: the result of `get`, or None where LMDB refused the page. Only within a write transaction,
        and only for a value that it has not changed: the file has the state of the last commit.
        """
        page_bytes = self._page_bytes
        if value is not None:
            header = np.frombuffer(value, dtype=np.uint8).ctypes.data - PAGE_HEADER_BYTES
            page, _, flags, pages = PAGE_HEADER.unpack(ctypes.string_at(header, PAGE_HEADER_BYTES))
            if (flags, pages) == (OVERFLOW_FLAG, overflow_pages(len(value), page_bytes)) and page < 1 << 48:
                start = os.pread(self.fd, _COMPARED_BYTES, page * page_bytes + PAGE_HEADER_BYTES)
                if start == bytes(value[:_COMPARED_BYTES]):
                    return
        try:
            leaf = find_leaf(self.fd, database, key)
        except (KeyError, CorruptBlockError, OSError) as exc:
            raise StoreError(f"{self.path}: a damaged value cannot be found: {exc}") from exc
        if not leaf.is_big:
            return
        first_page = int.from_bytes(leaf.held, "little")
        sound = PAGE_HEADER.pack(first_page, 0, OVERFLOW_FLAG, overflow_pages(leaf.size, page_bytes))
        os.pwrite(self.fd, sound, first_page * page_bytes)
        _logger.warning("%s: the page header of value %s was damaged", self.path, key.hex())

    def _open_noted(self, database: bytes, keys: Sequence[bytes]) -> list[FileRecord | Bytes | None]:
        """Return values of the state that was read last, if it has all of them; else of the newest.

        For advice alone: the state may be an old one, whose pages have been used again.
        """
        search = self._search
        if search is not None:
            values = [self._open_value(search, database, key, None) for key in keys]
            if all(each is not None for each in values):
                return values
        return self.open_values(database, keys)

    @translated
    def _newest_search(self) -> TreeSearch:
        """Return the search of the newest state, with the pages that earlier calls have read."""
        meta = newest_meta(self.fd)
        search = self._search
        if search is None or search.meta != meta:
            search = self._search = TreeSearch(self.fd, meta)
        return search

    def _open_value(
        self, search: TreeSearch, database: bytes, key: bytes, max_bytes: int | None
    ) -> FileRecord | Bytes | None:
        try:
            leaf = search.find(database, key)
        except (KeyError, CorruptBlockError):
            return None
        if not leaf.is_big:
            return np.frombuffer(leaf.held, dtype=np.uint8)
        if max_bytes is not None and leaf.size > max_bytes:
            return None
        offset = int.from_bytes(leaf.held, "little") * self._page_bytes + PAGE_HEADER_BYTES
        if offset + leaf.size > _MAX_FILE_BYTES:
            return None
        memory, ahead_fd = self._memory, self._ahead_fd
        return FileRecord(self.fd, offset=offset, size=leaf.size, memory=memory, ahead_fd=ahead_fd)


def open_store_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a store's own file: a regular file in the store's directory, never a symbolic link. Never waits.

    Raises StoreError for a FIFO, a socket, a device, a directory or a symbolic link, OSError.
    """
    return open_regular(path, flags, follow_links=False)


def _open_again(path: Path, fd: int) -> int:
    """Return a second descriptor of an open file, with a read-ahead of its own; the first one where that fails."""
    try:
        again = open_store_file(path)
    except (OSError, StoreError):
        return fd
    if os.path.samestat(os.fstat(again), os.fstat(fd)):
        return again
    os.close(again)  # another process has put another file at this path
    return fd


def sync_file(path: Path) -> None:
    """Return when a file, or a directory's list of files, is on the disk. Raises OSError, StoreError for a FIFO."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path.is_dir() else open_store_file(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
