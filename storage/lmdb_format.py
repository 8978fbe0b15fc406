"""The pages of an LMDB 0.9 data file, read without LMDB: its two meta pages, and the descriptors of its trees."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from tierkv.errors import CorruptBlockError

__all__ = [
    "BIG_FLAG",
    "BRANCH_FLAG",
    "LEAF_FLAG",
    "MAX_DEPTH",
    "NODE_BYTES",
    "OVERFLOW_FLAG",
    "PAGE_HEADER",
    "PAGE_HEADER_BYTES",
    "TREE_BYTES",
    "Meta",
    "Tree",
    "newest_meta",
    "overflow_pages",
    "require",
    "translated",
]

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
_TREE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth | branch, leaf and overflow pages | entries, root
TREE_BYTES = _TREE.size

Result = TypeVar("Result")


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
