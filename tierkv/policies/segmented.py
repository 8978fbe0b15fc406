"""Policies of two segments, new blocks and proven ones, that remember the hashes of evicted blocks.

Each tier has an order of its own. It learns which blocks the tier holds (`add`, `remove_all`) and orders those that
may be evicted. It reads from the block how often it was used since.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tierkv.index.eviction_policy import CacheBlock, EvictionOrder
from tierkv.policies.scores import LRUPolicy
from tierkv.values.block import BlockHash

__all__ = ["AdaptiveLRUPolicy", "S3FIFOPolicy"]

_NEW, _PROVEN = 0, 1


@dataclass(slots=True)
class _Member:
    """A block that the tier holds. count: its uses already counted. pushed: the serial of its last push."""

    segment: int
    serial: int
    count: int
    pushed: int = 0


_Item: TypeAlias = tuple[float, int, int, CacheBlock, int]  # key, negated depth, serial, block, stamp


class _SegmentedOrder:
    """Base of both: the members, a heap for each segment, and the hashes of evicted blocks (ghosts)."""

    def __init__(self) -> None:
        self._members: dict[BlockHash, _Member] = {}
        self._sizes = [0, 0]
        self._heaps: tuple[list[_Item], list[_Item]] = ([], [])
        self._ghosts: tuple[OrderedDict[BlockHash, None], OrderedDict[BlockHash, None]] = (OrderedDict(), OrderedDict())
        self._serial = 0

    def add(self, block: CacheBlock) -> None:
        """Add a block to the segment that `_segment_of_new` chooses."""
        segment = self._segment_of_new(block)
        self._serial += 1
        self._members[block.block_hash] = _Member(segment, self._serial, block.access_count)
        self._sizes[segment] += 1

    def remove_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember evicted blocks; a segment has at most as many ghosts as the tier has blocks."""
        for block in blocks:
            member = self._members.pop(block.block_hash)
            self._sizes[member.segment] -= 1
            ghosts = self._ghosts[member.segment]
            ghosts[block.block_hash] = None
            while len(ghosts) > max(len(self._members), 1):
                ghosts.popitem(last=False)

    def push(self, block: CacheBlock, stamp: int) -> None:
        """Push a block in its segment; its earlier push is outdated."""
        member = self._members[block.block_hash]
        self._note_uses(block, member)
        self._serial += 1
        member.pushed = self._serial
        item = (self._key(block, member), -block.depth, self._serial, block, stamp)
        heapq.heappush(self._heaps[member.segment], item)

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the block that goes next."""
        raise NotImplementedError

    def goes_first(self, block: CacheBlock) -> bool:
        """Return False: a pop may move other blocks, so this is unknown before the push."""
        return False

    def clear(self) -> None:
        """Forget every push; members and ghosts stay."""
        for heap in self._heaps:
            heap.clear()

    def __iter__(self) -> Iterator[tuple[CacheBlock, int]]:
        return (item[3:] for heap in self._heaps for item in heap if self._is_valid(item))

    def __len__(self) -> int:
        return len(self._heaps[_NEW]) + len(self._heaps[_PROVEN])

    def _segment_of_new(self, block: CacheBlock) -> int:
        raise NotImplementedError

    def _note_uses(self, block: CacheBlock, member: _Member) -> None:
        """Count the block's uses since the last push."""

    def _key(self, block: CacheBlock, member: _Member) -> float:
        """Return the block's key in its segment: the lowest goes first."""
        raise NotImplementedError

    def _is_valid(self, item: _Item) -> bool:
        member = self._members.get(item[3].block_hash)
        return member is not None and member.pushed == item[2]

    def _first(self, segment: int) -> _Item | None:
        """Drop the outdated items at the head of a segment, and return its first valid one."""
        heap = self._heaps[segment]
        while heap and not self._is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _take(self, segment: int) -> tuple[CacheBlock, int] | None:
        return heapq.heappop(self._heaps[segment])[3:] if self._first(segment) else None

    def _move(self, member: _Member, segment: int) -> None:
        self._sizes[member.segment] -= 1
        self._sizes[segment] += 1
        member.segment = segment


class S3FIFOPolicy(LRUPolicy):
    """New blocks enter a small queue; blocks used there move to the large queue, where each use buys a round.

    Source: S3-FIFO (Yang et al., SOSP 2023), with its constants: a tenth for the small queue, two uses for a
    promotion, at most three rounds. Leaf first: a block with children keeps its place and is passed over.
    """

    SMALL_SHARE = 0.1
    PROMOTION_USES = 2
    MOST_ROUNDS = 3

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return the two queues of a tier."""
        return _S3FIFOOrder()


class _S3FIFOOrder(_SegmentedOrder):
    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the next block; blocks with enough uses are promoted or get another round first."""
        while item := self._next():
            block, stamp = item[3:]
            member = self._members[block.block_hash]
            uses = min(block.access_count - member.count, S3FIFOPolicy.MOST_ROUNDS)
            heapq.heappop(self._heaps[member.segment])
            if uses < (S3FIFOPolicy.PROMOTION_USES if member.segment == _NEW else 1):
                return block, stamp
            was_new = member.segment == _NEW
            self._move(member, _PROVEN)
            member.count = block.access_count - (0 if was_new else uses - 1)
            self._serial += 1
            member.serial = self._serial
            self.push(block, stamp)
        return None

    def _next(self) -> _Item | None:
        small, large = self._first(_NEW), self._first(_PROVEN)
        is_small_full = self._sizes[_NEW] > S3FIFOPolicy.SMALL_SHARE * len(self._members)
        return small if small and (is_small_full or not large) else large

    def _segment_of_new(self, block: CacheBlock) -> int:
        return _PROVEN if self._ghosts[_NEW].pop(block.block_hash, _NEW) is None else _NEW

    def _key(self, block: CacheBlock, member: _Member) -> float:
        return member.serial


class AdaptiveLRUPolicy(LRUPolicy):
    """Two LRU lists, blocks used once and blocks used again; misses decide how long the first may be.

    A block that returns soon after its eviction from a list shows that the list was too short.
    Source: ARC (Megiddo and Modha, FAST 2003), leaf first: a block with children is passed over.
    """

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return the two lists of a tier."""
        return _AdaptiveOrder()


class _AdaptiveOrder(_SegmentedOrder):
    def __init__(self) -> None:
        super().__init__()
        self._target = 0.0  # how many blocks used once are worth keeping

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the oldest block of the list that is above its size."""
        first = _NEW if self._sizes[_NEW] > self._target else _PROVEN
        return self._take(first) or self._take(1 - first)

    def _segment_of_new(self, block: CacheBlock) -> int:
        once, again = self._ghosts
        if block.block_hash in once:
            self._target = min(self._target + max(1.0, len(again) / len(once)), len(self._members) + 1.0)
            del once[block.block_hash]
            return _PROVEN
        if block.block_hash in again:
            self._target = max(self._target - max(1.0, len(once) / len(again)), 0.0)
            del again[block.block_hash]
            return _PROVEN
        return _NEW

    def _note_uses(self, block: CacheBlock, member: _Member) -> None:
        if block.access_count > member.count:
            self._move(member, _PROVEN)

    def _key(self, block: CacheBlock, member: _Member) -> float:
        return block.last_access
