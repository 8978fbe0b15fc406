"""A priority queue for blocks that may be evicted: the lowest key first, of equal keys the deepest block.

A block that is used later is pushed later, so nearly all keys come in order. There may be a million. They lie in
sorted columns, 20 bytes each; only a key that comes far out of order goes to a heap of tuples, 136 bytes each.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

from tierkv.values.untracked import untrack

__all__ = ["STAMP_MASK", "EvictionHeap"]

STAMP_MASK = 0xFFFF_FFFF
"""The bits of a stamp: 4 bytes an item, so a block's 4 billion and first use has the stamp of its first."""

_WINDOW = 1024
"""How far from the end of the columns a key may be inserted: that moves a few kilobytes."""


class HasDepth(Protocol):
    """An item of the heap; its depth in its chain does not change."""

    @property
    def depth(self) -> int: ...


Block = TypeVar("Block", bound=HasDepth)
_HeapItem: TypeAlias = "tuple[float, int, int, Block, int]"  # key, negated depth, serial, block, stamp


class EvictionHeap(Generic[Block]):
    """A priority queue of (block, stamp) by key. Items that are equal in key and depth come in any order.

    Only the first item can be taken out. Stamps distinguish the items of a block that was pushed again.
    """

    __slots__ = ("_blocks", "_heap", "_keys", "_serial", "_stamps", "_start")

    def __init__(self) -> None:
        self._keys = array("d")
        self._stamps = array("I")
        self._blocks: list[Block | None] = []
        untrack(self._blocks)
        self._start = 0  # the columns' items before it have been taken
        self._heap: list[_HeapItem[Block]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._keys) - self._start + len(self._heap)

    def __iter__(self) -> Iterator[tuple[Block, int]]:
        """Yield all items, roughly in order."""
        for at in range(self._start, len(self._keys)):
            yield _present(self._blocks[at]), self._stamps[at]
        for item in sorted(self._heap):
            yield item[3], item[4]

    def push(self, key: float, block: Block, stamp: int) -> None:
        """Add a block."""
        keys = self._keys
        if not keys or key > keys[-1]:
            keys.append(key)
            self._stamps.append(stamp)
            self._blocks.append(block)
        else:
            self._push_before_end(key, block, stamp)

    def first(self) -> tuple[float, int] | None:
        """Return key and negated depth of the first item, or None."""
        heap = self._heap
        if not self._keys:
            return heap[0][:2] if heap else None
        block = self._blocks[self._start]
        assert block is not None, "an item that was not taken has its block"
        first = (self._keys[self._start], -block.depth)
        return heap[0][:2] if heap and heap[0] < first else first

    def pop(self) -> tuple[Block, int] | None:
        """Take the first item, or return None."""
        heap, start = self._heap, self._start
        if not self._keys:
            return heapq.heappop(heap)[3:] if heap else None
        block = self._blocks[start]
        assert block is not None, "an item that was not taken has its block"
        if heap and heap[0] < (self._keys[start], -block.depth):
            return heapq.heappop(heap)[3:]
        stamp = self._stamps[start]
        self._blocks[start] = None
        self._start = start + 1
        if self._start * 2 > len(self._keys):
            self._drop_taken()
        return block, stamp

    def is_before_all(self, key: float) -> bool:
        """Return whether all items have higher keys."""
        keys, heap = self._keys, self._heap
        return (not keys or key < keys[self._start]) and (not heap or key < heap[0][0])

    def clear(self) -> None:
        """Drop all items."""
        self._start = len(self._keys)
        self._drop_taken()
        self._heap.clear()

    def _push_before_end(self, key: float, block: Block, stamp: int) -> None:
        keys, blocks = self._keys, self._blocks
        low = max(self._start, len(keys) - _WINDOW)
        at = bisect_right(keys, key, low)
        while at > low and keys[at - 1] == key and _present(blocks[at - 1]).depth < block.depth:
            at -= 1
        if at == low > self._start:
            self._serial += 1
            heapq.heappush(self._heap, (key, -block.depth, self._serial, block, stamp))
            return
        keys.insert(at, key)
        self._stamps.insert(at, stamp)
        blocks.insert(at, block)

    def _drop_taken(self) -> None:
        """Free the places of taken items. `pop` does so when they are half of all, so the cost a pop is small."""
        taken = slice(0, self._start)
        del self._keys[taken], self._stamps[taken], self._blocks[taken]
        self._start = 0


def _present(block: Block | None) -> Block:
    assert block is not None, "an item that was not taken has its block"
    return block
