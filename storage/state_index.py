"""The rows of a state file in memory: which block lies where, and which blocks follow it. Reads nothing itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tierkv.errors import CorruptBlockError
from tierkv.storage.record import HEADER_BYTES, max_record_bytes
from tierkv.storage.state_format import ALIGN_BYTES, ROW
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.layout import BlockLayout

__all__ = ["StateEntry", "StateIndex"]

_RECORD_LIMIT_BYTES = (1 << 32) - 1  # a cold store holds no longer one

_Integers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A stored block's small record."""

    parent: BlockHash
    num_tokens: int
    offset: int
    size: int


class StateIndex:
    """The rows of one state file, checked. Rows have numbers, in the order of their blocks' hashes.

    packed: the rows as they are in the file. begin, end: where its records lie. layout: of its blocks.
    Raises CorruptBlockError unless every block is there once, in its place in the order, and every record lies apart
    from all others and is of a size that the layout allows. Parents may be missing, and chains may be rings.
    """

    def __init__(self, packed: bytes, *, begin: int, end: int, layout: BlockLayout) -> None:
        self._packed = packed
        self._rows = np.frombuffer(packed, dtype=ROW)
        raw = np.frombuffer(packed, dtype=np.uint8).reshape(len(self._rows), ROW.itemsize)
        self._keys = _Hashes.of(raw[:, :HASH_BYTES])
        if not self._keys.are_ascending():
            raise CorruptBlockError("its blocks are not in order, or one is there twice")
        self._check_records(begin, end, layout)
        parents = _Hashes.of(raw[:, HASH_BYTES : 2 * HASH_BYTES])
        self._by_parent = parents.order()
        self._parents = parents.taken(self._by_parent)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the row of a block, or None."""
        rows = self._keys.span_of(block_hash)
        return rows.start if rows else None

    def entry(self, row: int) -> StateEntry:
        """Return a row's small record."""
        fields = self._rows[row]
        return StateEntry(self.parent(row), int(fields["tokens"]), int(fields["offset"]), int(fields["size"]))

    def key(self, row: int) -> BlockHash:
        """Return the hash of a row's block."""
        return self._hash_at(row * ROW.itemsize)

    def parent(self, row: int) -> BlockHash:
        """Return the hash of the block before it, or the namespace digest."""
        return self._hash_at(row * ROW.itemsize + HASH_BYTES)

    def children(self, parent: BlockHash) -> Iterator[int]:
        """Yield the rows of the blocks that follow a block, or begin a namespace's chains."""
        for at in self._parents.span_of(parent):
            yield int(self._by_parent[at])

    def walk(self, namespace: BlockHash) -> Iterator[int]:
        """Yield every row once: chains from their beginnings, then what no chain leads to. Parents before children."""
        was_yielded = np.zeros(len(self), dtype=bool)
        stack = list(self.children(namespace))
        for left in range(-1, len(self)):
            if left >= 0 and not was_yielded[left]:
                stack.append(self._top_of(left, was_yielded))
            while stack:
                row = stack.pop()
                if not was_yielded[row]:
                    was_yielded[row] = True
                    yield row
                    stack += self.children(self.key(row))

    def _top_of(self, row: int, was_yielded: npt.NDArray[np.bool_]) -> int:
        """Return where the chain to a row begins, among those not yielded; of a ring, any of its rows."""
        passed = set()
        while row not in passed:
            passed.add(row)
            above = self.find(self.parent(row))
            if above is None or was_yielded[above]:
                break
            row = above
        return row

    def _check_records(self, begin: int, end: int, layout: BlockLayout) -> None:
        offsets, sizes, tokens = self._rows["offset"], self._rows["size"], self._rows["tokens"]
        if np.any((sizes > end) | (offsets < begin) | (offsets > end - np.minimum(sizes, end))):
            raise CorruptBlockError("its index points past its records")
        limit = min(max_record_bytes(layout), _RECORD_LIMIT_BYTES)
        if np.any((tokens < 1) | (tokens > layout.block_size) | (sizes < HEADER_BYTES) | (sizes > limit)):
            raise CorruptBlockError("its index has blocks of a size that their layout does not allow")
        if np.any(offsets % ALIGN_BYTES != 0):
            raise CorruptBlockError("its records do not begin on borders")
        order = np.argsort(offsets, kind="stable")
        if np.any(offsets[order][1:] < (offsets + sizes)[order][:-1]):
            raise CorruptBlockError("its records overlap")

    def _hash_at(self, start: int) -> BlockHash:
        return self._packed[start : start + HASH_BYTES]


class _Hashes:
    """Hashes as two integers each, so that all their bytes are compared."""

    def __init__(self, high: _Integers, low: _Integers) -> None:
        self._high = high
        self._low = low

    @classmethod
    def of(cls, raw: npt.NDArray[np.uint8]) -> _Hashes:
        """Return the hashes of an array of bytes [hashes, HASH_BYTES]."""
        halves = np.ascontiguousarray(raw).view(">u8").astype(np.uint64)
        return cls(np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1]))

    def are_ascending(self) -> bool:
        """Tell whether each is greater than the one before it."""
        high, low = self._high, self._low
        return bool(np.all((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] < low[1:]))))

    def order(self) -> npt.NDArray[np.intp]:
        """Return the numbers of the hashes, the smallest first."""
        order: npt.NDArray[np.intp] = np.lexsort((self._low, self._high))
        return order

    def taken(self, order: npt.NDArray[np.intp]) -> _Hashes:
        """Return the hashes in another order."""
        return _Hashes(self._high[order], self._low[order])

    def span_of(self, wanted: BlockHash) -> range:
        """Return where a hash lies; they must be in order."""
        high = np.uint64(int.from_bytes(wanted[:8], "big"))
        low = np.uint64(int.from_bytes(wanted[8:], "big"))
        first, last = (
            int(at) for at in (np.searchsorted(self._high, high), np.searchsorted(self._high, high, "right"))
        )
        if first == last:
            return range(0)
        lows = self._low[first:last]
        return range(first + int(np.searchsorted(lows, low)), first + int(np.searchsorted(lows, low, "right")))
