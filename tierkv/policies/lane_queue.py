"""The eviction order of a lane policy: a queue for each lane, and the lanes by what their first blocks promise."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Protocol

from tierkv.index.eviction import CacheBlock
from tierkv.index.eviction_heap import EvictionHeap
from tierkv.policies.hazard import bucket_of

__all__ = ["LaneQueue", "Lanes"]


class Lanes(Protocol):
    """What the queue asks of the policy. Worth is `densities[lane][bucket of the idle time]`, as of `now`.

    revision: goes up with each change of the densities.
    """

    num_lanes: int
    now: float
    densities: list[list[float]]
    revision: int

    def lane_of(self, block: CacheBlock) -> int:
        """Return the lane that the block is in since its last use."""

    def note_removed(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember blocks that the tier forgets."""


class LaneQueue:
    """Blocks in each lane by time of last use, and a heap of the lanes by the density of their first block.

    Densities change as time goes by, but only those of the first blocks matter: they are read once for each
    moment at which something is evicted, and again where a lane's first block changes. O(lanes + log n).
    """

    def __init__(self, policy: Lanes) -> None:
        self._policy = policy
        self._lane_of = policy.lane_of
        self._lanes: list[EvictionHeap[CacheBlock]] = [EvictionHeap() for _ in range(policy.num_lanes)]
        self._order: list[tuple[float, float, int, int]] = []
        self._size = 0
        self._now = float("-inf")  # the moment at which the order was made
        self._revision = -1
        self._densities: list[list[float]] = []
        self._last_access = float("-inf")  # what the bucket was last computed for: chains are used in one moment
        self._bucket = 0

    def add(self, block: CacheBlock) -> None:
        """Nothing to note: the policy has seen the insertion."""

    def remove_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Let the policy remember the blocks."""
        self._policy.note_removed(blocks)

    def push(self, block: CacheBlock, stamp: int) -> None:
        """Offer a block in the lane of its last use."""
        policy, last_access = self._policy, block.last_access
        lane = policy.lane_of(block)
        if last_access > policy.now:
            policy.now = last_access
        offers = self._lanes[lane]
        offers.push(last_access, block, stamp)
        self._size += 1
        if self._is_current() and offers.first() == (last_access, -block.depth):
            rank = self._rank(lane)
            assert rank, "a lane that was pushed to is not empty"
            heapq.heappush(self._order, rank)

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the least promising block."""
        if not self._is_current():
            self._read_order()
        while self._order:
            rank = heapq.heappop(self._order)
            lane = rank[3]
            offers = self._lanes[lane]
            if rank != self._rank(lane):
                continue  # the lane's first block is another one by now, which has a rank of its own
            offer = offers.pop()
            self._size -= 1
            if following := self._rank(lane):
                heapq.heappush(self._order, following)
            return offer
        return None

    def goes_first(self, block: CacheBlock) -> bool:
        """Tell whether the block is less promising than all that was pushed."""
        lane, last_access = self._lane_of(block), block.last_access
        if last_access != self._last_access:
            self._find_bucket(last_access)
        density = self._densities[lane][self._bucket]
        order = self._order
        # An outdated rank in the order is no lower than a real one.
        return not order or density < order[0][0] or (density, last_access, -block.depth, lane) <= order[0]

    def clear(self) -> None:
        """Forget everything pushed."""
        for offers in self._lanes:
            offers.clear()
        self._order.clear()
        self._size = 0

    def __iter__(self) -> Iterator[tuple[CacheBlock, int]]:
        return (offer for offers in self._lanes for offer in offers)

    def __len__(self) -> int:
        return self._size

    def _is_current(self) -> bool:
        return self._now == self._policy.now and self._revision == self._policy.revision

    def _read_order(self) -> None:
        """Rank all lanes as of now."""
        self._now, self._revision = self._policy.now, self._policy.revision
        self._densities = self._policy.densities
        self._last_access = float("nan")
        self._order = [rank for lane in range(len(self._lanes)) if (rank := self._rank(lane))]
        heapq.heapify(self._order)

    def _rank(self, lane: int) -> tuple[float, float, int, int] | None:
        """Rank a lane by its first block; of equals, the longest idle and the deepest goes first."""
        first = self._lanes[lane].first()
        if first is None:
            return None
        last_access, depth = first
        if last_access != self._last_access:
            self._find_bucket(last_access)
        return self._densities[lane][self._bucket], last_access, depth, lane

    def _find_bucket(self, last_access: float) -> None:
        self._last_access, self._bucket = last_access, bucket_of(self._now - last_access)
