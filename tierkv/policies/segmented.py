"""Policies of two segments, new blocks on probation beside proven ones, which remember what they evicted.

Both keep their own queue for each tier. A queue knows which blocks its tier holds (`add`, `remove_all`) and orders
those that may be evicted; how often a block was used since it knows from the block itself.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from tierkv.index.eviction import CacheBlock, EvictionOrder
from tierkv.policies.basic import LRUPolicy
from tierkv.values.block import BlockHash

__all__ = ["AdaptiveLRUPolicy", "S3FIFOPolicy"]

_NEW, _PROVEN = 0, 1


@dataclass(slots=True)
class _Member:
    """A block that the tier holds. count: its uses already taken into account; offer: its latest push."""

    segment: int
    serial: int
    count: int
    offer: int = 0


_Offer: TypeAlias = tuple[float, int, int, CacheBlock, int]


class _SegmentedQueue:
    """What both have in common: members, two heaps of offers, and ghosts of what was evicted."""

    def __init__(self) -> None:
        self._members: dict[BlockHash, _Member] = {}
        self._sizes = [0, 0]
        self._heaps: tuple[list[_Offer], list[_Offer]] = ([], [])
        self._ghosts: tuple[OrderedDict[BlockHash, None], OrderedDict[BlockHash, None]] = (OrderedDict(), OrderedDict())
        self._serial = 0

    def add(self, block: CacheBlock) -> None:
        """Put a new block on probation, and one that is remembered among the proven."""
        segment = self._segment_of_new(block)
        self._serial += 1
        self._members[block.block_hash] = _Member(segment, self._serial, block.access_count)
        self._sizes[segment] += 1

    def remove_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember blocks that left, each for as long as it takes as many others to leave as there are members."""
        for block in blocks:
            member = self._members.pop(block.block_hash)
            self._sizes[member.segment] -= 1
            ghosts = self._ghosts[member.segment]
            ghosts[block.block_hash] = None
            while len(ghosts) > max(len(self._members), 1):
                ghosts.popitem(last=False)

    def push(self, block: CacheBlock, stamp: int) -> None:
        """Offer a block in its segment; an earlier offer of it is void from now on."""
        member = self._members[block.block_hash]
        self._note_uses(block, member)
        self._serial += 1
        member.offer = self._serial
        offer = (self._key(block, member), -block.depth, self._serial, block, stamp)
        heapq.heappush(self._heaps[member.segment], offer)

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the block that goes next."""
        raise NotImplementedError

    def goes_first(self, block: CacheBlock) -> bool:
        """Not known before it is pushed: what is taken may move others."""
        return False

    def clear(self) -> None:
        """Forget the offers; members and ghosts stay."""
        for heap in self._heaps:
            heap.clear()

    def __iter__(self) -> Iterator[tuple[CacheBlock, int]]:
        return (offer[3:] for heap in self._heaps for offer in heap if self._is_valid(offer))

    def __len__(self) -> int:
        return len(self._heaps[_NEW]) + len(self._heaps[_PROVEN])

    def _segment_of_new(self, block: CacheBlock) -> int:
        raise NotImplementedError

    def _note_uses(self, block: CacheBlock, member: _Member) -> None:
        """Take into account how often the block was used since."""

    def _key(self, block: CacheBlock, member: _Member) -> float:
        """Return the block's place in its segment: the lowest goes first."""
        raise NotImplementedError

    def _is_valid(self, offer: _Offer) -> bool:
        member = self._members.get(offer[3].block_hash)
        return member is not None and member.offer == offer[2]

    def _head(self, segment: int) -> _Offer | None:
        """Return the first valid offer of a segment, void ones before it thrown away."""
        heap = self._heaps[segment]
        while heap and not self._is_valid(heap[0]):
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _take(self, segment: int) -> tuple[CacheBlock, int] | None:
        return heapq.heappop(self._heaps[segment])[3:] if self._head(segment) else None

    def _move(self, member: _Member, segment: int) -> None:
        self._sizes[member.segment] -= 1
        self._sizes[segment] += 1
        member.segment = segment


class S3FIFOPolicy(LRUPolicy):
    """New blocks pass a small queue first, and only those used there meet the large one, where uses buy rounds.

    Source: S3-FIFO (Yang et al., SOSP 2023), with its constants: a tenth for the small queue, two uses to be
    promoted, at most three rounds. Leaf first: a block with children holds its place and is passed over.
    """

    SMALL_SHARE = 0.1
    PROMOTION_USES = 2
    MOST_ROUNDS = 3

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return the two queues of a tier."""
        return _S3FIFOQueue()


class _S3FIFOQueue(_SegmentedQueue):
    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the next block; those that have earned it are promoted or given another round on the way."""
        while offer := self._next():
            block, stamp = offer[3:]
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

    def _next(self) -> _Offer | None:
        small, large = self._head(_NEW), self._head(_PROVEN)
        is_small_full = self._sizes[_NEW] > S3FIFOPolicy.SMALL_SHARE * len(self._members)
        return small if small and (is_small_full or not large) else large

    def _segment_of_new(self, block: CacheBlock) -> int:
        return _PROVEN if self._ghosts[_NEW].pop(block.block_hash, _NEW) is None else _NEW

    def _key(self, block: CacheBlock, member: _Member) -> float:
        return member.serial


class AdaptiveLRUPolicy(LRUPolicy):
    """Two LRU lists, blocks used once and blocks used again; how large the first may be follows the misses.

    A block that returns soon after it was evicted from one list shows that this list was too small.
    Source: ARC (Megiddo and Modha, FAST 2003), leaf first: a block with children is passed over.
    """

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return the two lists of a tier."""
        return _AdaptiveQueue()


class _AdaptiveQueue(_SegmentedQueue):
    def __init__(self) -> None:
        super().__init__()
        self._target = 0.0  # how many blocks used once are worth keeping

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the oldest block of whichever list is above its size."""
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
