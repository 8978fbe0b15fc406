"""Single values of an LMDB 0.9 data file, found with plain reads: to mend one, to fetch one ahead, to salvage."""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from tierkv.errors import CorruptBlockError
from tierkv.storage.lmdb_file import PAGE_HEADER_BYTES, Meta, newest_meta
from tierkv.storage.planes import Bytes

__all__ = [
    "BIG_FLAG",
    "BRANCH_FLAG",
    "LEAF_FLAG",
    "MAX_DEPTH",
    "NODE_BYTES",
    "OVERFLOW_FLAG",
    "TREE_BYTES",
    "LeafValue",
    "Tree",
    "find_leaf",
    "iter_leaf_values",
    "overflow_pages",
    "require",
    "translated",
]

BRANCH_FLAG, LEAF_FLAG, OVERFLOW_FLAG = 1, 2, 4  # of a page
BIG_FLAG = 1  # of a node: its value lies on pages of its own
NODE_BYTES = 8
MAX_DEPTH = 32
_WORD = struct.Struct("<H")
_PAGE = struct.Struct("<QHHHH")  # page number, unused, flags, end of the pointers, begin of the nodes
_CHILD = struct.Struct("<HHHH")  # a child's page in three parts, or length and flags of a value; length of the key
_NODE = struct.Struct("<IHH")  # length of the value, flags, length of the key
_TREE = struct.Struct("<IHHQQQQQ")  # pad, flags, depth | branch, leaf and overflow pages | entries, root
TREE_BYTES = _TREE.size

Result = TypeVar("Result")


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


def translated(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function raise CorruptBlockError where a damaged number led it astray."""

    @functools.wraps(function)
    def call(*args: object) -> Result:
        try:
            return function(*args)
        except (ValueError, IndexError, OverflowError, OSError, struct.error) as exc:
            raise CorruptBlockError(f"its trees are damaged: {exc}") from exc

    return call


@dataclass(frozen=True, slots=True)
class LeafValue:
    """A node of a leaf: what it holds is its value, or the number of the page where that begins."""

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


@translated
def find_leaf(fd: int, database: bytes, key: bytes) -> LeafValue:
    """Return where a value of the committed state lies. Raises CorruptBlockError, or KeyError if there is none."""
    meta = newest_meta(fd)
    tree = _descend(fd, meta, Tree.unpack(meta.main_tree), database)
    require(len(tree.held) == TREE_BYTES, "a database without a descriptor")
    return _descend(fd, meta, Tree.unpack(tree.held), key)


def iter_leaf_values(chunk: Bytes, page_bytes: int) -> Iterator[LeafValue]:
    """Yield what can be read of the leaves among some pages, which may be anything."""
    kinds = chunk.view("<u2").reshape(-1, page_bytes // 2)[:, 5]
    for row in np.flatnonzero(kinds == LEAF_FLAG).tolist():
        page = chunk[row * page_bytes : (row + 1) * page_bytes].tobytes()
        lower = min(int.from_bytes(page[12:14], "little"), page_bytes)
        for at in np.frombuffer(page[PAGE_HEADER_BYTES : lower & ~1], dtype="<u2").tolist():
            if at + NODE_BYTES > page_bytes:
                continue
            size, flags, key_bytes = _NODE.unpack_from(page, at)
            start = at + NODE_BYTES + key_bytes
            held = page[start : start + (8 if flags & BIG_FLAG else size)]
            yield LeafValue(page[at + NODE_BYTES : start], size, held, bool(flags & BIG_FLAG))


def overflow_pages(value_bytes: int, page_bytes: int) -> int:
    """Return how many pages a value of this length takes, LMDB's header included."""
    return (PAGE_HEADER_BYTES - 1 + value_bytes) // page_bytes + 1


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
    """Return where the last of a page's nodes begins, which are sorted, whose key is not above; else the first node."""
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


def require(condition: bool, problem: str) -> None:
    """Raise CorruptBlockError unless the condition holds."""
    if not condition:
        raise CorruptBlockError(problem)
