"""The children table: which blocks follow a block, sorted so that the longest common run of tokens is found at once.

Each child of a parent has a row: the parent, the child's first 16 token ids, its hash. LMDB keeps keys sorted: among
any number of children, the child that shares most tokens with a query stands beside the query's own place. Children
that agree in all 16 have another row one level deeper: there the parent is replaced by a hash of the parent and the
tokens so far, and the row has the next 16. So 300 prompts that part after a shared 144 tokens cost ten steps, and a
lone child has a single row.

Key: node 16 | token ids, big-endian, zeros behind 64 | how many of them 1 | level 1 | child 16. No value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import xxhash

from tierkv.errors import CorruptBlockError
from tierkv.storage.lmdb_env import Database, ReadTransaction, WriteTransaction
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash, common_run

__all__ = ["CHILD_ROW_BYTES", "ChildRow", "ChildrenTable", "TokenReader"]

LEVEL_TOKENS = 16
_LEVEL_BYTES = LEVEL_TOKENS * TOKEN_BYTES
CHILD_ROW_BYTES = HASH_BYTES + _LEVEL_BYTES + 2 + HASH_BYTES
_NODE_SEED = 1  # a node's hash must never be the hash of a block

TokenReader = Callable[[BlockHash], "bytes | None"]


class ChildRow(NamedTuple):
    """One key, taken apart. tokens: little-endian again, at most LEVEL_TOKENS of them."""

    node: bytes
    tokens: bytes
    level: int
    child: BlockHash

    @classmethod
    def unpack(cls, key: bytes | memoryview) -> ChildRow:
        """Return the row of a key. Raises CorruptBlockError if no row has this key."""
        key = bytes(key)
        if len(key) != CHILD_ROW_BYTES:
            raise CorruptBlockError(f"a row of the children table of {len(key)} bytes")
        tokens_end = HASH_BYTES + _LEVEL_BYTES
        tokens = _swap(key[HASH_BYTES:tokens_end])[: key[tokens_end] * TOKEN_BYTES]
        row = cls(key[:HASH_BYTES], tokens, key[tokens_end + 1], key[-HASH_BYTES:])
        if row.key != key:
            raise CorruptBlockError("a row of the children table has not as many token ids as it says")
        return row

    @property
    def prefix(self) -> bytes:
        """The bytes that children with the same tokens at this level have in common."""
        count = len(self.tokens) // TOKEN_BYTES
        return self.node + _swap(self.tokens).ljust(_LEVEL_BYTES, b"\0") + bytes([count, self.level])

    @property
    def key(self) -> bytes:
        """The bytes that are stored."""
        return self.prefix + self.child


@dataclass(frozen=True, slots=True)
class ChildrenTable:
    """The table within one transaction."""

    txn: ReadTransaction | WriteTransaction
    database: Database

    def iter_children(self, parent: BlockHash) -> Iterator[BlockHash]:
        """Yield the hashes of the blocks that are listed under `parent`."""
        return (key[-HASH_BYTES:] for key in self._iter_keys(parent) if len(key) == CHILD_ROW_BYTES)

    def insert(self, parent: BlockHash, tokens: bytes, child: BlockHash, read_tokens: TokenReader) -> None:
        """Add a child. read_tokens: called for a child that agrees with this one in all tokens of a level."""
        level = 0
        while True:
            row = _row_of(parent, tokens, child, level)
            self.txn.put(row.key, b"", db=self.database)
            others = [key[-HASH_BYTES:] for key in self._first_keys(row.prefix, 3) if key[-HASH_BYTES:] != child]
            if not others or len(row.tokens) < _LEVEL_BYTES:
                return
            level += 1
            if len(others) == 1:  # more than one have their deeper rows already
                other_tokens = read_tokens(others[0])
                if other_tokens is not None:
                    self.txn.put(_row_of(parent, other_tokens, others[0], level).key, b"", db=self.database)

    def remove(self, parent: BlockHash, child: BlockHash) -> None:
        """Remove a child by its hash alone."""
        node, tokens, level = parent, b"", 0
        while True:
            keys = [key for key in self._iter_keys(node) if key[-HASH_BYTES:] == child]
            for key in keys:
                self.txn.delete(key, db=self.database)
            found = [row for row in map(_unpack_or_none, keys) if row and len(row.tokens) == _LEVEL_BYTES]
            if not found:  # only children that agree in all tokens of a level have a row in the next
                return
            tokens += found[0].tokens
            level += 1
            node = _node(parent, tokens, level)

    def remove_all(self, parent: BlockHash) -> None:
        """Remove every row at `parent`, whatever it says. Deeper rows stay until the table is rebuilt."""
        for key in list(self._iter_keys(parent)):
            self.txn.delete(key, db=self.database)

    def remove_known(self, parent: BlockHash, tokens: bytes, child: BlockHash) -> bool:
        """Remove a child whose tokens are known: no search. Return whether it was there."""
        for level in range(len(tokens) // _LEVEL_BYTES + 1):
            if not self.txn.delete(_row_of(parent, tokens, child, level).key, db=self.database):
                return level > 0
        return True

    def find_longest_run(
        self, parent: BlockHash, tokens: bytes, read_tokens: TokenReader
    ) -> tuple[BlockHash, bytes, int] | None:
        """Return (child, its tokens, how many of them lead `tokens` too), or None where no child shares the first."""
        best: ChildRow | None = None
        level = 0
        while True:
            wanted = _row_of(parent, tokens, bytes(HASH_BYTES), level)
            near = max(self._neighbours(wanted), key=lambda row: common_run(row.tokens, wanted.tokens), default=None)
            if near is None or (level and not wanted.tokens):
                best = best or near
                break
            if best is None or common_run(near.tokens, wanted.tokens):
                best = near
            if common_run(near.tokens, wanted.tokens) < LEVEL_TOKENS:
                break
            level += 1
        found = read_tokens(best.child) if best else None
        if best is None or found is None:
            return None
        run = common_run(found, tokens)
        return (best.child, found, run) if run else None

    def _neighbours(self, wanted: ChildRow) -> Iterator[ChildRow]:
        """Yield the rows of the same node on both sides of the place of `wanted`."""
        near: list[bytes] = []
        with self.txn.cursor(db=self.database) as cursor:
            found = cursor.set_range(wanted.key)
            if found:
                near.append(bytes(cursor.key()))
            if cursor.prev() if found else cursor.last():
                near.append(bytes(cursor.key()))
        for key in near:
            row = _unpack_or_none(key) if key[:HASH_BYTES] == wanted.node else None
            if row:
                yield row

    def _iter_keys(self, prefix: bytes) -> Iterator[bytes]:
        with self.txn.cursor(db=self.database) as cursor:
            more = cursor.set_range(prefix)
            while more:
                key = bytes(cursor.key())
                if not key.startswith(prefix):
                    return
                yield key
                more = cursor.next()

    def _first_keys(self, prefix: bytes, count: int) -> list[bytes]:
        return [key for key, _ in zip(self._iter_keys(prefix), range(count), strict=False)]


def _unpack_or_none(key: bytes) -> ChildRow | None:
    """Return the row of a key; None for a damaged key, which `check` reports and a repair removes."""
    try:
        return ChildRow.unpack(key)
    except CorruptBlockError:
        return None


def _row_of(parent: BlockHash, tokens: bytes, child: BlockHash, level: int) -> ChildRow:
    start = level * _LEVEL_BYTES
    return ChildRow(_node(parent, tokens[:start], level), tokens[start : start + _LEVEL_BYTES], level, child)


def _node(parent: BlockHash, tokens: bytes, level: int) -> bytes:
    return parent if level == 0 else xxhash.xxh3_128_digest(parent + tokens, seed=_NODE_SEED)


def _swap(tokens: bytes) -> bytes:
    """Turn token ids from little-endian, as blocks have them, to big-endian, as they sort; or back."""
    return bytes(np.frombuffer(tokens, dtype="<u4").byteswap().data)
