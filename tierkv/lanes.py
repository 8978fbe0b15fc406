"""Policies that sort blocks into lanes: least recently used within a lane, least promising between lanes."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

from tierkv.eviction import CacheBlock, VictimQueue
from tierkv.hazard import bucket_of
from tierkv.use_history import UseHistory

__all__ = ["LanePolicy", "depth_class"]

NO_FORK, MOST_FORK = 0, 0xFFFF
_SAME_USE_S = 0.05


def depth_class(blocks: int) -> int:
    """Return which of five ranges a number of blocks lies in: up to 2, 14, 62, 254, or above."""
    return min(4, ((blocks + 1).bit_length() - 1) // 2)


class LanePolicy:
    """What lane policies have in common: a history of uses, and a queue for each tier.

    A subclass names the lane of a block that was just used (`choose_lane`) and sets `densities[lane][bucket]`,
    the worth of keeping a block of the lane that has been idle for a bucket's time; `revision` goes up with each
    change of it. Time stands at the last use of any block (`now`).
    """

    def __init__(self, *, num_lanes: int, num_rows: int) -> None:
        self.num_lanes = num_lanes
        self.history = UseHistory(num_rows)
        self.densities: list[list[float]] = []
        self.revision = 0
        self.now = float("-inf")
        self._block_tokens = 0

    def choose_lane(self, block: CacheBlock, *, count: int, gap_s: float, fork: int) -> int:
        """Return the lane of a block used for the `count`-th time, `gap_s` after the time before.

        fork: how many blocks of its chain were in use before it was first inserted; 0 if unknown or none.
        """
        raise NotImplementedError

    def interval_ended(self, lane: int, idle_s: float) -> None:
        """Learn that a block of a lane was used again after an idle time."""

    def interval_lost(self, lane: int, idle_s: float) -> None:
        """Learn that no more will be known of a block of a lane that has been idle for so long."""

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated worth of the block as of now; the queues compare the same."""
        return -self.density(self.lane_of(block), self.now - block.last_access)

    def update_on_access(self, block: CacheBlock) -> None:
        """Note a use."""
        self._note(block, None)

    def update_on_insert(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        """Note the first use of a block, or that an evicted one is back."""
        self._note(block, parent)

    def select_victims(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        """Take the first `count`."""
        return list(islice(leaves, count))

    def new_queue(self) -> VictimQueue[CacheBlock]:
        """Return the lanes of one tier."""
        return _LaneQueue(self)

    def density(self, lane: int, idle_s: float) -> float:
        """Return the worth of keeping a block of a lane that has been idle for so long."""
        return self.densities[lane][bucket_of(idle_s)]

    def lane_of(self, block: CacheBlock) -> int:
        """Return the lane that the block was put into at its last use."""
        row = self.history.find(block.block_hash)
        if row is not None:
            return self.history.lanes[row]
        return self.choose_lane(block, count=block.access_count, gap_s=0.0, fork=NO_FORK)

    def is_partial(self, block: CacheBlock) -> bool:
        """Tell whether the block has fewer tokens than others: the tail of a prompt, seldom met again as it is."""
        return block.num_tokens < self._block_tokens

    def _note(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        history, now = self.history, block.last_access
        self.now = max(self.now, now)
        self._block_tokens = max(self._block_tokens, block.num_tokens)
        row, tag = history.row_of(block.block_hash)
        count, gap_s, fork = 1, 0.0, NO_FORK
        if history.tags[row] == tag:
            gap_s = now - history.times[row]
            if gap_s < _SAME_USE_S:
                return  # brought back and used by the same request
            count, fork = history.counts[row] + 1, history.forks[row]
            self.interval_ended(history.lanes[row], gap_s)
        else:
            if history.tags[row]:
                self.interval_lost(history.lanes[row], now - history.times[row])
            count = block.access_count
            if parent is not None:
                fork = self._fork_below(parent)
        history.tags[row], history.times[row], history.gaps[row] = tag, now, gap_s
        history.counts[row], history.forks[row] = count, fork
        history.lanes[row] = self.choose_lane(block, count=count, gap_s=gap_s, fork=fork)

    def _fork_below(self, parent: CacheBlock) -> int:
        """Return how many blocks of a new block's chain had been used before, its parent's chain known."""
        row = self.history.find(parent.block_hash)
        if row is None:
            return NO_FORK
        is_old = self.history.counts[row] > 1
        return min(parent.depth + 1, MOST_FORK) if is_old else self.history.forks[row]


_Offer: TypeAlias = tuple[float, int, int, CacheBlock, int]


class _LaneQueue:
    """A heap for each lane, by time of last use, and a heap of the lanes by the density of their first block.

    Densities change as time goes by, but only those of the first blocks matter: they are read once for each
    moment at which something is evicted, and again where a lane's first block changes. O(lanes + log n).
    """

    def __init__(self, policy: LanePolicy) -> None:
        self._policy = policy
        self._lanes: list[list[_Offer]] = [[] for _ in range(policy.num_lanes)]
        self._order: list[tuple[float, float, int, int]] = []
        self._read_at = (float("-inf"), -1)
        self._size = 0
        self._serial = 0

    def add(self, block: CacheBlock) -> None:
        """Nothing to note: the policy has seen the insertion."""

    def remove(self, block: CacheBlock) -> None:
        """Nothing to note: the policy remembers evicted blocks as well."""

    def push(self, block: CacheBlock, stamp: int) -> None:
        """Offer a block in the lane of its last use."""
        lane = self._policy.lane_of(block)
        self._serial += 1
        offer = (block.last_access, -block.depth, self._serial, block, stamp)
        heapq.heappush(self._lanes[lane], offer)
        self._size += 1
        if self._lanes[lane][0] is offer and self._is_current():
            heapq.heappush(self._order, self._rank(lane))

    def pop(self) -> tuple[CacheBlock, int] | None:
        """Take the least promising block."""
        if not self._is_current():
            self._read_at = (self._policy.now, self._policy.revision)
            self._order = [self._rank(lane) for lane, offers in enumerate(self._lanes) if offers]
            heapq.heapify(self._order)
        while self._order:
            rank = heapq.heappop(self._order)
            lane = rank[3]
            offers = self._lanes[lane]
            if not offers or rank != self._rank(lane):
                continue  # the lane's first block is another one by now, which has a rank of its own
            offer = heapq.heappop(offers)
            self._size -= 1
            if offers:
                heapq.heappush(self._order, self._rank(lane))
            return offer[3:]
        return None

    def clear(self) -> None:
        """Forget everything pushed."""
        for offers in self._lanes:
            offers.clear()
        self._order.clear()
        self._size = 0

    def __iter__(self) -> Iterator[tuple[CacheBlock, int]]:
        return (offer[3:] for offers in self._lanes for offer in offers)

    def __len__(self) -> int:
        return self._size

    def _is_current(self) -> bool:
        return self._read_at == (self._policy.now, self._policy.revision)

    def _rank(self, lane: int) -> tuple[float, float, int, int]:
        """Rank a lane by its first block; of equals, the longest idle and the deepest goes first."""
        last_access, depth = self._lanes[lane][0][:2]
        return self._policy.density(lane, self._policy.now - last_access), last_access, depth, lane
