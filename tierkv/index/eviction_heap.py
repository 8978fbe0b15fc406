"""Blocks offered for eviction, kept in order: the lowest key first, of equals the deepest block.

Nearly all offers come in order or almost, since what is used later is offered later, and there may be one for each of
a million blocks. So they lie in columns, 24 bytes an offer, and only what comes far out of order goes to a heap of
tuples, which takes 136.
"""

from __future__ import annotations

import heapq
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import Generic, Protocol, TypeAlias, TypeVar

__all__ = ["Offers"]

_WINDOW = 1024
"""How far from the end of the columns an offer may still go: what it moves is some kilobytes."""


class HasDepth(Protocol):
    """What is offered: anything that knows how deep in its chain it lies, which does not change."""

    @property
    def depth(self) -> int: ...


Block = TypeVar("Block", bound=HasDepth)
_Offer: TypeAlias = "tuple[float, int, int, Block, int]"


class Offers(Generic[Block]):
    """A priority queue of (block, stamp) under a key; the stamp is only handed back. Of equals in all, any order.

    Nothing is ever taken out but the first: whoever offers a block again tells the offers apart by their stamps.
    """

    __slots__ = ("_blocks", "_heap", "_keys", "_serial", "_stamps", "_start")

    def __init__(self) -> None:
        self._keys = array("d")
        self._stamps = array("q")
        self._blocks: list[Block | None] = []
        self._start = 0  # what lies before it in the columns has been taken
        self._heap: list[_Offer[Block]] = []
        self._serial = 0

    def __len__(self) -> int:
        return len(self._keys) - self._start + len(self._heap)

    def __iter__(self) -> Iterator[tuple[Block, int]]:
        """Yield all in almost the order in which they would be taken."""
        for at in range(self._start, len(self._keys)):
            block = self._blocks[at]
            assert block is not None, "an offer that was not taken has its block"
            yield block, self._stamps[at]
        for offer in sorted(self._heap):
            yield offer[3], offer[4]

    def push(self, key: float, block: Block, stamp: int) -> None:
        """Offer a block."""
        keys = self._keys
        if not keys or key > keys[-1]:
            keys.append(key)
            self._stamps.append(stamp)
            self._blocks.append(block)
        else:
            self._push_before_end(key, block, stamp)

    def first(self) -> tuple[float, int] | None:
        """Return key and negated depth of the offer that goes next, or None."""
        heap = self._heap
        if not self._keys:
            return heap[0][:2] if heap else None
        key = self._keys[self._start]
        block = self._blocks[self._start]
        assert block is not None, "an offer that was not taken has its block"
        head = (key, -block.depth)
        return heap[0][:2] if heap and heap[0] < head else head

    def pop(self) -> tuple[Block, int] | None:
        """Take the offer that goes next."""
        heap, start = self._heap, self._start
        if not self._keys:
            return heapq.heappop(heap)[3:] if heap else None
        block = self._blocks[start]
        assert block is not None, "an offer that was not taken has its block"
        if heap and heap[0] < (self._keys[start], -block.depth):
            return heapq.heappop(heap)[3:]
        stamp = self._stamps[start]
        self._blocks[start] = None
        self._start = start + 1
        if self._start * 2 > len(self._keys):
            self._forget_taken()
        return block, stamp

    def is_before_all(self, key: float) -> bool:
        """Tell whether all that is offered has higher keys."""
        keys, heap = self._keys, self._heap
        return (not keys or key < keys[self._start]) and (not heap or key < heap[0][0])

    def clear(self) -> None:
        """Forget all."""
        self._start = len(self._keys)
        self._forget_taken()
        self._heap.clear()

    def _push_before_end(self, key: float, block: Block, stamp: int) -> None:
        keys, blocks = self._keys, self._blocks
        low = max(self._start, len(keys) - _WINDOW)
        at = bisect_right(keys, key, low)
        while at > low and keys[at - 1] == key and _depth(blocks[at - 1]) < block.depth:
            at -= 1
        if at == low > self._start:
            self._serial += 1
            heapq.heappush(self._heap, (key, -block.depth, self._serial, block, stamp))
            return
        keys.insert(at, key)
        self._stamps.insert(at, stamp)
        blocks.insert(at, block)

    def _forget_taken(self) -> None:
        """Free the columns' places of what was taken: when they are half of all, so that it costs next to nothing."""
        taken = slice(0, self._start)
        del self._keys[taken], self._stamps[taken], self._blocks[taken]
        self._start = 0


def _depth(block: HasDepth | None) -> int:
    assert block is not None, "an offer that was not taken has its block"
    return block.depth
