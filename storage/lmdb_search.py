"""Single values of an LMDB data file, found by plain reads. A search keeps the pages that it has read."""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from dataclasses import dataclass

from tierkv.storage.lmdb_format import (
    BIG_FLAG,
    BRANCH_FLAG,
    LEAF_FLAG,
    MAX_DEPTH,
    NODE_BYTES,
    PAGE_HEADER_BYTES,
    TREE_BYTES,
    Meta,
    Tree,
    newest_meta,
    require,
    translated,
)

__all__ = ["LeafValue", "TreeSearch", "find_leaf"]

_PAGE = struct.Struct("<QHHHH")  # page number, unused, flags, end of the pointers, begin of the nodes
_CHILD = struct.Struct("<HHHH")  # a child's page in three parts, or length and flags of a value; length of the key
_MOST_PAGES = 1024  # that a search keeps


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


@dataclass(frozen=True, slots=True, eq=False)
class _Nodes:
    """A page of a tree: its bytes, and where each node begins, in the order of the keys."""

    page: bytes
    starts: tuple[int, ...]
    keys: list[bytes]


class TreeSearch:
    """Finds values of one committed state. It reads each page once, so many keys cost few reads. Thread-safe.

    A state's pages stay as they are while a read transaction is open that began when the state was the newest, or
    earlier. So a search is used only within a transaction that began before `newest_meta` returned `meta`.
    """

    def __init__(self, fd: int, meta: Meta) -> None:
        self.meta = meta
        self._fd = fd
        self._trees: dict[bytes, Tree] = {}
        self._pages: dict[int, _Nodes] = {}

    @translated
    def find(self, database: bytes, key: bytes) -> LeafValue:
        """Return where a value lies. Raises CorruptBlockError, or KeyError if there is none."""
        tree = self._trees.get(database)
        if tree is None:
            leaf = self._descend(Tree.unpack(self.meta.main_tree), database)
            require(len(leaf.held) == TREE_BYTES, "a database without a descriptor")
            tree = self._trees[database] = Tree.unpack(leaf.held)
        return self._descend(tree, key)

    def _descend(self, tree: Tree, key: bytes) -> LeafValue:
        number = tree.root
        require(tree.depth <= MAX_DEPTH, "a tree is too deep")
        for level in range(tree.depth):
            is_leaf = level == tree.depth - 1
            nodes = self._pages.get(number) or self._read(number)
            require(_is_leaf(nodes.page) == is_leaf, "a page is another page")
            found = bisect_right(nodes.keys, key, 1) - 1  # the first key of a branch page is the lowest of all
            page, at = nodes.page, nodes.starts[found]
            low, high, flags, key_bytes = _CHILD.unpack_from(page, at)
            if not is_leaf:
                number = low | high << 16 | flags << 32
                continue
            if nodes.keys[found] == key:
                size, start, is_big = low | high << 16, at + NODE_BYTES + key_bytes, bool(flags & BIG_FLAG)
                return LeafValue(key, size, page[start : start + (8 if is_big else size)], is_big)
        raise KeyError(key)

    def _read(self, number: int) -> _Nodes:
        page = os.pread(self._fd, self.meta.page_bytes, number * self.meta.page_bytes)
        own, _, flags, lower, _ = _PAGE.unpack_from(page)
        require(own == number and flags in (BRANCH_FLAG, LEAF_FLAG), "a page is another page")
        starts = struct.unpack_from(f"<{(lower - PAGE_HEADER_BYTES) // 2}H", page, PAGE_HEADER_BYTES)
        key_bytes = [page[at + 6] | page[at + 7] << 8 for at in starts]
        keys = [page[at + NODE_BYTES : at + NODE_BYTES + size] for at, size in zip(starts, key_bytes, strict=True)]
        if len(self._pages) >= _MOST_PAGES:
            self._pages.clear()
        nodes = self._pages[number] = _Nodes(page, starts, keys)
        return nodes


def find_leaf(fd: int, database: bytes, key: bytes) -> LeafValue:
    """Return where a value of the committed state lies. Raises CorruptBlockError, or KeyError if there is none."""
    return _newest(fd).find(database, key)


@translated
def _newest(fd: int) -> TreeSearch:
    return TreeSearch(fd, newest_meta(fd))


def _is_leaf(page: bytes) -> bool:
    return page[10] == LEAF_FLAG
