"""The order of one tier's blocks under a class policy."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

from tierkv.index.entry import NOTE_SHIFT
from tierkv.index.eviction_heap import EvictionHeap
from tierkv.index.eviction_policy import CacheBlock
from tierkv.policies.idle_buckets import bucket_of
from tierkv.policies.use_history import UseHistory

__all__ = ["ClassOrder"]

_Rank: TypeAlias = tuple[float, float, int, int]
"""Density and time of last use of a class's first block, its negated depth, and the class: the lowest goes first."""


class ClassPolicy(Protocol):
    """What the order asks of a policy; see `BlockClassPolicy`."""

    num_classes: int
    history: UseHistory
    densities: list[list[float]]
    revision: int
    now: float

    def class_of(self, block: CacheBlock) -> int:
        """Return the block's class since its last use."""

    def remember_removed(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember blocks that a tier forgets."""


class ClassOrder:
    """The blocks of each class by time of last use, and a heap of the classes by the density of their first blocks.

    Densities change with time, but only the first blocks' matter. They are read once for each moment of eviction, and
    again when a class has a new first block. A pop is O(classes + log n).
    """

    def __init__(self, policy: ClassPolicy) -> None:
        self._policy = policy
        self._class_of = policy.class_of
        self._heaps: list[EvictionHeap[CacheBlock]] = [EvictionHeap() for _ in range(policy.num_classes)]
        self._ranks: list[_Rank] = []
        self._filled: set[int] = set()  # the classes whose heaps have items, and some that had
        self._size = 0
        self.num_held = 0  # blocks that the tier holds, evictable or not
        self._now = float("-inf")  # the moment of the ranks
        self._revision = -1
        self._densities: list[list[float]] = []
        self._last_access = float("-inf")  # the last argument of _find_bucket: blocks of a chain have the same time
        self._bucket = 0

    def add(self, block: CacheBlock) -> None:
        """Count the block; the policy has seen the insertion."""
        self.num_held += 1

    def add_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Count several blocks."""
        self.num_held += len(blocks)

    def remove_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Let the policy remember the blocks."""
        self.num_held -= len(blocks)
        self._policy.remember_removed(blocks)

    def push(self, block: CacheBlock, stamp: int) -> None:
        """Add a block to its class."""
        policy, last_access = self._policy, block.last_access
        block_class = policy.class_of(block)
        if last_access > policy.now:
            policy.now = last_access
        heap = self._heaps[block_class]
        heap.push(last_access, block, stamp)
        self._filled.add(block_class)
        self._size += 1
        if self._is_current() and heap.first() == (last_access, -block.depth):
            rank = self._rank(block_class)
            assert rank, "the heap has a first block after a push"
            heapq.heappush(self._ranks, rank)

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the least promising block."""
        if not self._is_current():
            self._rank_all()
        ranks = self._ranks
        while ranks:
            _, last_access, depth, block_class = ranks[0]
            heap = self._heaps[block_class]
            if heap.first() != (last_access, depth):
                heapq.heappop(ranks)  # outdated: the class has another first block, with a rank of its own
                continue
            item = heap.pop()
            self._size -= 1
            if following := self._rank(block_class):
                heapq.heapreplace(ranks, following)
            else:
                heapq.heappop(ranks)
            return item
        return None

    def goes_first(self, block: CacheBlock) -> bool:
        """Return whether the block is less promising than all that were pushed."""
        ranks = self._ranks
        if not ranks:
            return True
        block_class, last_access = self._class_of(block), block.last_access
        if last_access != self._last_access:
            self._find_bucket(last_access)
        density = self._densities[block_class][self._bucket]
        # An outdated rank is never lower than a real one.
        return density < ranks[0][0] or (density, last_access, -block.depth, block_class) <= ranks[0]

    def count_first(self, blocks: Sequence[CacheBlock]) -> int:
        """Return how many leading blocks are less promising than all that were pushed."""
        if not self._ranks:
            return len(blocks)
        first, class_of, densities = self._ranks[0], self._class_of, self._densities
        lowest, flags, last_access, bucket = first[0], -1, float("nan"), 0
        for number, block in enumerate(blocks):
            if block.flags == flags and block.last_access == last_access and block.access_count == 1:
                continue  # its class and its time are those of the block before
            if block.last_access != last_access:
                last_access = block.last_access
                self._find_bucket(last_access)
                bucket = self._bucket
            block_class = class_of(block)
            density = densities[block_class][bucket]
            is_before = density < lowest or (density == lowest and last_access < first[1])
            if not is_before and (density, last_access, -block.depth, block_class) > first:
                return number
            flags = block.flags if is_before and block.flags >> NOTE_SHIFT and block.access_count == 1 else -1
        return len(blocks)

    def clear(self) -> None:
        """Forget every push."""
        for heap in self._heaps:
            heap.clear()
        self._ranks.clear()
        self._filled.clear()
        self._size = 0

    def __iter__(self) -> Iterator[tuple[CacheBlock, int]]:
        return (item for heap in self._heaps for item in heap)

    def __len__(self) -> int:
        return self._size

    def _is_current(self) -> bool:
        return self._now == self._policy.now and self._revision == self._policy.revision

    def _rank_all(self) -> None:
        """Rank all classes at the policy's time."""
        self._now, self._revision = self._policy.now, self._policy.revision
        self._densities = self._policy.densities
        self._last_access = float("nan")
        self._filled = {number for number in self._filled if len(self._heaps[number])}
        self._ranks = [rank for number in self._filled if (rank := self._rank(number))]
        heapq.heapify(self._ranks)

    def _rank(self, block_class: int) -> _Rank | None:
        """Rank a class by its first block: density, then the longest idle, then the deepest."""
        first = self._heaps[block_class].first()
        if first is None:
            return None
        last_access, depth = first
        if last_access != self._last_access:
            self._find_bucket(last_access)
        return self._densities[block_class][self._bucket], last_access, depth, block_class

    def _find_bucket(self, last_access: float) -> None:
        self._last_access, self._bucket = last_access, bucket_of(self._now - last_access)
