"""The order of a block class policy: LRU within a class, and the classes by what their first blocks promise."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Protocol

from tierkv.index.eviction import CacheBlock
from tierkv.index.eviction_heap import EvictionHeap
from tierkv.policies.hazard import bucket_of

__all__ = ["BlockClasses", "ClassOrder"]


class BlockClasses(Protocol):
    """What the order asks of its policy. A block's worth is `densities[class][bucket of the idle time]` at `now`.

    revision: goes up with each change of the densities.
    """

    num_classes: int
    now: float
    densities: list[list[float]]
    revision: int

    def class_of(self, block: CacheBlock) -> int:
        """Return the block's class since its last use."""

    def remember_removed(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember blocks that the tier forgets."""


class ClassOrder:
    """The blocks of each class by time of last use, and a heap of the classes by the density of their first blocks.

    Densities change with time, but only the first blocks' matter. They are read once for each moment of eviction, and
    again when a class has a new first block. A pop is O(classes + log n).
    """

    def __init__(self, policy: BlockClasses) -> None:
        self._policy = policy
        self._class_of = policy.class_of
        self._heaps: list[EvictionHeap[CacheBlock]] = [EvictionHeap() for _ in range(policy.num_classes)]
        self._ranks: list[tuple[float, float, int, int]] = []
        self._size = 0
        self._now = float("-inf")  # the moment of the ranks
        self._revision = -1
        self._densities: list[list[float]] = []
        self._last_access = float("-inf")  # the last argument of _find_bucket: blocks of a chain have the same time
        self._bucket = 0

    def add(self, block: CacheBlock) -> None:
        """Do nothing: the policy has seen the insertion."""

    def remove_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Let the policy remember the blocks."""
        self._policy.remember_removed(blocks)

    def push(self, block: CacheBlock, stamp: int) -> None:
        """Add a block to its class."""
        policy, last_access = self._policy, block.last_access
        block_class = policy.class_of(block)
        if last_access > policy.now:
            policy.now = last_access
        heap = self._heaps[block_class]
        heap.push(last_access, block, stamp)
        self._size += 1
        if self._is_current() and heap.first() == (last_access, -block.depth):
            rank = self._rank(block_class)
            assert rank, "the heap has a first block after a push"
            heapq.heappush(self._ranks, rank)

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the least promising block."""
        if not self._is_current():
            self._rank_all()
        while self._ranks:
            rank = heapq.heappop(self._ranks)
            block_class = rank[3]
            if rank != self._rank(block_class):
                continue  # outdated: the class has another first block, with a rank of its own
            item = self._heaps[block_class].pop()
            self._size -= 1
            if following := self._rank(block_class):
                heapq.heappush(self._ranks, following)
            return item
        return None

    def goes_first(self, block: CacheBlock) -> bool:
        """Return whether the block is less promising than all that were pushed."""
        block_class, last_access = self._class_of(block), block.last_access
        if last_access != self._last_access:
            self._find_bucket(last_access)
        density = self._densities[block_class][self._bucket]
        ranks = self._ranks
        # An outdated rank is never lower than a real one.
        return not ranks or density < ranks[0][0] or (density, last_access, -block.depth, block_class) <= ranks[0]

    def clear(self) -> None:
        """Forget every push."""
        for heap in self._heaps:
            heap.clear()
        self._ranks.clear()
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
        self._ranks = [rank for number in range(len(self._heaps)) if (rank := self._rank(number))]
        heapq.heapify(self._ranks)

    def _rank(self, block_class: int) -> tuple[float, float, int, int] | None:
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
