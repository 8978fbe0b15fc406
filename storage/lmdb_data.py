"""The data file of an open environment, beside LMDB's map: whole values by plain reads, and its length.

A page that lies behind the end of a mapped file ends the process that touches it with SIGBUS. So the file's length is
compared before each transaction, and values, which are nearly all of the file, are not read through the map: a file
that is cut short while it is open costs misses. What LMDB reads through its map, meta and trees, it reads within
microseconds after that comparison; a cut in between cannot be survived.

Plain reads cost a copy, which page faults do not; who reads several values asks to have the next ones fetched ahead.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.lmdb_file import PAGE_HEADER, PAGE_HEADER_BYTES, newest_meta, open_store_file
from tierkv.storage.lmdb_values import OVERFLOW_FLAG, find_leaf, overflow_pages
from tierkv.storage.planes import Bytes
from tierkv.storage.record_source import FileRecord, ThreadMemory

__all__ = ["CutShortError", "DataFile"]

_MAX_FILE_BYTES = (1 << 63) - 1  # where no file goes on, a damaged page number may point
_COMPARED_BYTES = 64  # of a value, to tell whether a page is the one that its header says

_logger = logging.getLogger(__name__)


class CutShortError(StoreError):
    """The data file has become shorter while it was open."""


class DataFile:
    """An open data file. Thread-safe. Raises CorruptBlockError if it is shorter than it says, OSError."""

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        # Not the lock file: closing any descriptor of that would drop LMDB's own locks.
        self.fd = open_store_file(path, os.O_RDONLY if read_only else os.O_RDWR)
        self._memory = ThreadMemory()
        try:
            meta = newest_meta(self.fd)
            self._page_bytes = meta.page_bytes
            self._known_bytes = os.fstat(self.fd).st_size
            if (meta.last_page + 1) * meta.page_bytes > self._known_bytes:
                raise CorruptBlockError("it is cut short")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the descriptors back. May be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            with contextlib.suppress(OSError):  # of a disk that has gone: the descriptor is closed all the same
                os.close(fd)

    def require_whole(self) -> None:
        """Raise CutShortError if the file is shorter than it has been: LMDB never makes it so."""
        known = self._known_bytes  # read first: another thread may see the file grow
        size = os.fstat(self.fd).st_size
        if size < known:
            raise CutShortError(
                f"{self.path} was cut from {known} to {size} bytes while it was open",
                hint="close the store everywhere; opening it again saves what is whole",
            )
        if size > known:
            self._known_bytes = size

    def require_sound_end(self) -> None:
        """Raise CorruptBlockError if the file says that it is longer than it is: then it must not be mapped anew."""
        meta = newest_meta(self.fd)
        if (meta.last_page + 1) * meta.page_bytes > os.fstat(self.fd).st_size:
            raise CorruptBlockError(f"{self.path} counts pages that it does not have")

    def is_at_its_path(self) -> bool:
        """Tell whether the path still names this file, and not one that another process has put in its place."""
        try:
            return os.path.samestat(os.fstat(self.fd), self.path.stat())
        except OSError:
            return False

    def read_value(self, database: bytes, key: bytes, *, max_bytes: int) -> Bytes | None:
        """Return a committed value, cut where the file ends; in memory of this thread, valid until its next call.

        None where plain reads do not find it, or find it longer than `max_bytes`: the map has the last word. Only
        within a read transaction, which keeps the value's pages from being used again.
        """
        value = self.open_value(database, key, max_bytes=max_bytes)
        return value.read_whole() if isinstance(value, FileRecord) else value

    def open_value(self, database: bytes, key: bytes, *, max_bytes: int | None = None) -> FileRecord | Bytes | None:
        """Return a committed value, a large one unread. Otherwise, and how long it is valid, as `read_value`."""
        try:
            leaf = find_leaf(self.fd, database, key)
        except (KeyError, CorruptBlockError):
            return None
        if not leaf.is_big:
            return np.frombuffer(leaf.held, dtype=np.uint8)
        if max_bytes is not None and leaf.size > max_bytes:
            return None
        offset = int.from_bytes(leaf.held, "little") * self._page_bytes + PAGE_HEADER_BYTES
        if offset + leaf.size > _MAX_FILE_BYTES:
            return None
        return FileRecord(self.fd, offset=offset, size=leaf.size, memory=self._memory)

    def fetch_values(self, database: bytes, keys: Sequence[bytes]) -> None:
        """Ask the system to read values into its cache; those that are not there are passed over."""
        for key in keys:
            with contextlib.suppress(OSError):
                value = self.open_value(database, key)
                if isinstance(value, FileRecord):
                    value.fetch_ahead()

    def is_in_memory(self, database: bytes, key: bytes) -> bool:
        """Tell whether reading a value takes no disk; True of one that is not there."""
        try:
            value = self.open_value(database, key)
        except OSError:
            return True
        return value.is_in_memory() if isinstance(value, FileRecord) else True

    def mend_value(self, database: bytes, key: bytes, value: memoryview | None) -> None:
        """Compare the header of a value's pages with what it must be, and write it anew if it differs.

        value: what `get` returned, or None where LMDB refused the page. Only within a write transaction,
        and only for a value that it has not changed: the file has what the last commit left there.
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
