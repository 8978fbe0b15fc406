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
import functools
import logging
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.values.files import open_regular

__all__ = [
    "BIG_FLAG",
    "BRANCH_FLAG",
    "DATA_FILE",
    "LEAF_FLAG",
    "LOCK_FILE",
    "MAX_DEPTH",
    "NODE_BYTES",
    "OVERFLOW_FLAG",
    "PAGE_HEADER",
    "PAGE_HEADER_BYTES",
    "TREE_BYTES",
    "CutShortError",
    "DataFile",
    "LeafValue",
    "Meta",
    "Tree",
    "find_leaf",
    "newest_meta",
    "open_store_file",
    "overflow_pages",
    "require",
    "sync_file",
    "translated",
]

DATA_FILE = "data.mdb"
LOCK_FILE = "lock.mdb"
PAGE_HEADER_BYTES = 16
PAGE_HEADER = struct.Struct("<QHHI")  # page number, unused, flags, pages of a value
BRANCH_FLAG, LEAF_FLAG, OVERFLOW_FLAG = 1, 2, 4  # of a page
BIG_FLAG = 1  # of a node: its value lies on pages of its own
NODE_BYTES = 8
MAX_DEPTH = 32

_META_READS = 3
_META_FLAG = 8
_META_MAGIC = 0xBEEFC0DE
_META_VERSION = 1
# magic, version, map address, map size | free list's tree | tree of databases | last page, transaction
_META = struct.Struct("<IIQQ48s48sQQ")
_USUAL_PAGE_BYTES = 4096
_MIN_PAGE_BYTES, _MAX_PAGE_BYTES = 512, 32768
_WORD = struct.Struct("<H")
_PAGE = struct.Struct("<QHHHH")  # page number, unused, flags, end of the pointers, begin of the nodes
_CHILD = struct.Struct("<HHHH")  # a child's page in three parts, or length and flags of a value; length of the key
_TREE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth | branch, leaf and overflow pages | entries, root
TREE_BYTES = _TREE.size
_MAX_FILE_BYTES = (1 << 63) - 1  # a damaged page number may point beyond every file
_COMPARED_BYTES = 64  # of a value, to check whether a page is the one that its header says

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class CutShortError(StoreError):
    """The data file has become shorter while it was open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meta:
    """One committed state of the file."""

    page_bytes: int
    transaction: int
    last_page: int
    free_tree: bytes
    main_tree: bytes

    @classmethod
    def unpack(cls, raw: bytes, page: int) -> Meta:
        """Return the state that meta page 0 or 1 holds. Raises CorruptBlockError unless it is sound."""
        if len(raw) < PAGE_HEADER_BYTES + _META.size:
            raise CorruptBlockError("its meta pages are cut short")
        number, _, flags, _ = PAGE_HEADER.unpack_from(raw)
        magic, version, _, _, free_tree, main_tree, last_page, transaction = _META.unpack_from(raw, PAGE_HEADER_BYTES)
        own_bytes = int.from_bytes(free_tree[:4], "little")
        sane = _MIN_PAGE_BYTES <= own_bytes <= _MAX_PAGE_BYTES and own_bytes & (own_bytes - 1) == 0
        named = (number, flags, magic, version) == (page, _META_FLAG, _META_MAGIC, _META_VERSION)
        # A transaction is written to the page of its parity.
        if not (sane and named and (transaction == 0 or transaction % 2 == page)) or last_page >= 1 << 48:
            raise CorruptBlockError("its meta pages are damaged")
        return cls(
            page_bytes=own_bytes,
            transaction=transaction,
            last_page=last_page,
            free_tree=free_tree,
            main_tree=main_tree,
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """One database as its descriptor says."""

    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    value_pages: int
    entries: int
    root: int

    @classmethod
    def unpack(cls, packed: bytes) -> Tree:
        """Return the tree of a 48-byte descriptor."""
        return cls(*_TREE.unpack(packed)[1:])


@dataclass(frozen=True, slots=True)
class LeafValue:
    """A node of a leaf. held: the value, or the number of the page where a big one begins."""

    key: bytes
    size: int
    held: bytes
    is_big: bool

    def read(self, fd: int, page_bytes: int) -> bytes:
        """Return the value, wherever it lies; shorter where the file ends."""
        if not self.is_big:
            return self.held
        offset = int.from_bytes(self.held, "little") * page_bytes + PAGE_HEADER_BYTES
        return os.pread(fd, self.size, offset) if offset < os.fstat(fd).st_size else b""


class DataFile:
    """An open data file. Thread-safe. Raises CorruptBlockError if it is shorter than it says, OSError.

    opened_bytes: how long it was when it was opened.
    """

    def __init__(self, path: Path, *, read_only: bool) -> None:
        self.path = path
        # Not the lock file: closing any descriptor of that would drop LMDB's own locks.
        self.fd: int = open_store_file(path, os.O_RDONLY if read_only else os.O_RDWR)
        self._memory = ThreadMemory()
        try:
            meta = newest_meta(self.fd)
            self._page_bytes = meta.page_bytes
            self.opened_bytes: int = os.fstat(self.fd).st_size
            if (meta.last_page + 1) * meta.page_bytes > self.opened_bytes:
                raise CorruptBlockError("it is cut short")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the descriptor. May be called twice."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
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
        """Ask the system to read values into its cache; missing ones are passed over."""
        for key in keys:
            with contextlib.suppress(OSError):
                value = self.open_value(database, key)
                if isinstance(value, FileRecord):
                    value.fetch_ahead()

    def is_in_memory(self, database: bytes, key: bytes) -> bool:
        """Return whether reading a value takes no disk; True for a missing value."""
        try:
            value = self.open_value(database, key)
        except OSError:
            return True
        return value.is_in_memory() if isinstance(value, FileRecord) else True

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


def open_store_file(path: Path, flags: int = os.O_RDONLY) -> int:
    """Open a store's own file: a regular file in the store's directory, never a symbolic link. Never waits.

    Raises StoreError for a FIFO, a socket, a device, a directory or a symbolic link, OSError.
    """
    return open_regular(path, flags, follow_links=False)


def sync_file(path: Path) -> None:
    """Return when a file, or a directory's list of files, is on the disk. Raises OSError, StoreError for a FIFO."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path.is_dir() else open_store_file(path)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def newest_meta(fd: int) -> Meta:
    """Return the state that LMDB would use. Raises CorruptBlockError unless both meta pages are sound.

    Another process may write them meanwhile: pages that do not fit together are read again.
    """
    for _ in range(_META_READS - 1):
        with contextlib.suppress(CorruptBlockError):
            return _read_metas(fd)
    return _read_metas(fd)


def _read_metas(fd: int) -> Meta:
    both = os.pread(fd, 2 * _USUAL_PAGE_BYTES, 0)
    first = Meta.unpack(both, 0)
    if first.page_bytes == _USUAL_PAGE_BYTES:
        second = Meta.unpack(both[_USUAL_PAGE_BYTES:], 1)
    else:
        second = Meta.unpack(os.pread(fd, PAGE_HEADER_BYTES + _META.size, first.page_bytes), 1)
    apart = abs(first.transaction - second.transaction)
    if second.page_bytes != first.page_bytes or apart > 1:
        raise CorruptBlockError("its meta pages contradict each other")
    return second if second.transaction > first.transaction else first


def overflow_pages(value_bytes: int, page_bytes: int) -> int:
    """Return how many pages a value of this length takes, LMDB's header included."""
    return (PAGE_HEADER_BYTES - 1 + value_bytes) // page_bytes + 1


def require(condition: bool, problem: str) -> None:
    """Raise CorruptBlockError unless the condition holds."""
    if not condition:
        raise CorruptBlockError(problem)


def translated(function: Callable[..., Result]) -> Callable[..., Result]:
    """Make a function raise CorruptBlockError for every error that a damaged number may cause."""

    @functools.wraps(function)
    def call(*args: object) -> Result:
        try:
            return function(*args)
        except (ValueError, IndexError, OverflowError, OSError, struct.error) as exc:
            raise CorruptBlockError(f"its trees are damaged: {exc}") from exc

    return call


@translated
def find_leaf(fd: int, database: bytes, key: bytes) -> LeafValue:
    """Return where a value of the committed state lies. Raises CorruptBlockError, or KeyError if there is none."""
    meta = newest_meta(fd)
    tree = _descend(fd, meta, Tree.unpack(meta.main_tree), database)
    require(len(tree.held) == TREE_BYTES, "a database without a descriptor")
    return _descend(fd, meta, Tree.unpack(tree.held), key)


def _descend(fd: int, meta: Meta, tree: Tree, key: bytes) -> LeafValue:
    number = tree.root
    require(tree.depth <= MAX_DEPTH, "a tree is too deep")
    for level in range(tree.depth):
        is_leaf = level == tree.depth - 1
        page = os.pread(fd, meta.page_bytes, number * meta.page_bytes)
        own, _, flags, lower, _ = _PAGE.unpack_from(page)
        require((own, flags) == (number, LEAF_FLAG if is_leaf else BRANCH_FLAG), "a page is another page")
        at = _last_not_above(page, lower, key)
        low, high, flags, key_bytes = _CHILD.unpack_from(page, at)
        if not is_leaf:
            number = low | high << 16 | flags << 32
            continue
        size, start = low | high << 16, at + NODE_BYTES + key_bytes
        if page[at + NODE_BYTES : start] == key:
            is_big = bool(flags & BIG_FLAG)
            return LeafValue(key, size, page[start : start + (8 if is_big else size)], is_big)
    raise KeyError(key)


def _last_not_above(page: bytes, lower: int, key: bytes) -> int:
    """Return where the last of a page's sorted nodes begins whose key is not above `key`; else the first node."""
    below, above = 0, (lower - PAGE_HEADER_BYTES) // 2  # the first key of a branch page counts as the lowest of all
    while above - below > 1:
        middle = (below + above) // 2
        (at,) = _WORD.unpack_from(page, PAGE_HEADER_BYTES + 2 * middle)
        (key_bytes,) = _WORD.unpack_from(page, at + NODE_BYTES - _WORD.size)
        if page[at + NODE_BYTES : at + NODE_BYTES + key_bytes] <= key:
            below = middle
        else:
            above = middle
    (found,) = _WORD.unpack_from(page, PAGE_HEADER_BYTES + 2 * below)
    return int(found)
