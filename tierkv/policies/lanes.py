"""Policies that sort blocks into lanes: least recently used within a lane, least promising between lanes."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import islice
from typing import TypeAlias

from tierkv.eviction import CacheBlock, VictimQueue
from tierkv.policies.hazard import bucket_of
from tierkv.policies.use_history import UseHistory

__all__ = ["LanePolicy", "depth_class"]

NO_FORK, MOST_FORK = 0, 0xFFFF
_SAME_USE_S = 0.05


def depth_class(blocks: int) -> int:
    """Return which of five ranges a number of blocks lies in: up to 2, 14, 62, 254, or above."""
    return min(4, ((blocks + 1).bit_length() - 1) // 2)


class LanePolicy:
    """What lane policies have in common: a history of uses, and a queue for each tier.

    A subclass names the lane of a block (`choose_lane`) and sets `densities[lane][bucket]`, the worth of keeping a
    block of the lane that has been idle for a bucket's time; `revision` goes up with each change of it. Time
    stands at the last use that was seen (`now`).

    A use costs next to nothing: what a lane depends on is read of the block itself when it may be evicted, and
    statistics are kept of a sample, one block in `sample_mask` + 1 by its hash. Of blocks that leave, all are
    remembered.
    """

    def __init__(self, *, num_lanes: int, num_rows: int, sample_mask: int = 7) -> None:
        self.num_lanes = num_lanes
        self.history = UseHistory(num_rows)
        self.sample_mask = sample_mask
        self.densities: list[list[float]] = []
        self.revision = 0
        self.now = float("-inf")
        self._block_tokens = 0

    def choose_lane(self, block: CacheBlock, *, count: int, gap_s: float, fork: int) -> int:
        """Return the lane of a block used `count` times, on average or at last `gap_s` apart.

        fork: how many blocks of its chain had been used before when it was first inserted; 0 if unknown or none.
        """
        raise NotImplementedError

    def interval_ended(self, lane: int, idle_s: float) -> None:
        """Learn that a block of a lane was used again after an idle time."""

    def interval_lost(self, lane: int, idle_s: float) -> None:
        """Learn that no more will be known of a block of a lane that has been idle for so long."""

    def interval_begun(self) -> None:
        """Learn that a block of the sample was used."""

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated worth of the block as of now; the queues compare the same."""
        return -self.density(self.lane_of(block), self.now - block.last_access)

    def update_on_access(self, block: CacheBlock) -> None:
        """Note a use of a block of the sample."""
        if not block.block_hash[0] & self.sample_mask:
            self._note_use(block)

    def update_on_insert(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        """Note the first use of a block, or that an evicted one is back."""
        history, now = self.history, self._advance(block)
        row, tag = history.row_of(block.block_hash)
        if history.tags[row] == tag:
            gap_s = now - history.times[row]
            if gap_s < _SAME_USE_S:
                return  # brought back by the request that used it, or about to be used by the one that brings it
            history.earlier[row], history.gaps[row] = history.totals[row], gap_s
        else:
            self._take_over(row, tag, now)
            if parent is not None:
                history.forks[row] = self._fork_below(parent)
        self._begin(row, tag, block)

    def note_removed(self, block: CacheBlock) -> None:
        """Remember a block that a tier forgets."""
        history = self.history
        row, tag = history.row_of(block.block_hash)
        if history.tags[row] != tag:
            if not tag & self.sample_mask:
                return  # nobody knows how long it has been in the sample
            self._take_over(row, tag, self.now)
        history.times[row] = block.last_access
        history.totals[row] = history.earlier[row] + block.access_count

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
        """Return the lane that the block is in since its last use."""
        row = self.history.find(block.block_hash)
        if row is None:
            return self.choose_lane(block, count=block.access_count, gap_s=_mean_gap_s(block), fork=NO_FORK)
        if block.access_count == 1:
            return self.history.lanes[row]
        return self._lane_in(row, block)

    def is_partial(self, block: CacheBlock) -> bool:
        """Tell whether the block has fewer tokens than others: the tail of a prompt, seldom met again as it is."""
        return block.num_tokens < self._block_tokens

    def _note_use(self, block: CacheBlock) -> None:
        history, now = self.history, self._advance(block)
        row, tag = history.row_of(block.block_hash)
        if history.tags[row] == tag:
            idle_s = now - history.times[row]
            if idle_s < _SAME_USE_S:
                return
            self.interval_ended(history.lanes[row], idle_s)
        else:
            self._take_over(row, tag, now)
        self._begin(row, tag, block)

    def _begin(self, row: int, tag: int, block: CacheBlock) -> None:
        history = self.history
        is_sampled = not tag & self.sample_mask
        if is_sampled and block.access_count == 1 and history.earlier[row]:
            self.interval_ended(history.lanes[row], history.gaps[row])
        history.times[row] = block.last_access
        history.totals[row] = history.earlier[row] + block.access_count
        history.lanes[row] = self._lane_in(row, block)
        if is_sampled:
            self.interval_begun()

    def _take_over(self, row: int, tag: int, now: float) -> None:
        """Give a row to a block of which nothing is known."""
        history = self.history
        if history.tags[row] and not history.tags[row] & self.sample_mask:
            self.interval_lost(history.lanes[row], now - history.times[row])
        history.tags[row], history.earlier[row], history.gaps[row], history.forks[row] = tag, 0, 0.0, NO_FORK

    def _lane_in(self, row: int, block: CacheBlock) -> int:
        history = self.history
        gap_s = _mean_gap_s(block) if block.access_count > 1 else history.gaps[row]
        count = history.earlier[row] + block.access_count
        return self.choose_lane(block, count=count, gap_s=gap_s, fork=history.forks[row])

    def _advance(self, block: CacheBlock) -> float:
        """Bring the time up to the block's last use, and return that."""
        now = block.last_access
        self.now = max(self.now, now)
        self._block_tokens = max(self._block_tokens, block.num_tokens)
        return now

    def _fork_below(self, parent: CacheBlock) -> int:
        """Return how many blocks of a new block's chain had been used before, its parent's chain known."""
        row = self.history.find(parent.block_hash)
        if row is None:
            return NO_FORK
        is_old = self.history.earlier[row] + parent.access_count > 1
        return min(parent.depth + 1, MOST_FORK) if is_old else self.history.forks[row]


def _mean_gap_s(block: CacheBlock) -> float:
    """Return the mean time between uses since the block was inserted; 0 after one."""
    return max(block.last_access - block.created_at, 0.0) / max(block.access_count - 1, 1)


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
        """Let the policy remember the block."""
        self._policy.note_removed(block)

    def push(self, block: CacheBlock, stamp: int) -> None:
        """Offer a block in the lane of its last use."""
        lane = self._policy.lane_of(block)
        if block.last_access > self._policy.now:
            self._policy.now = block.last_access
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

    def push_pop(self, block: CacheBlock, stamp: int) -> tuple[CacheBlock, int] | None:
        """Take the less promising of this block and the first in order."""
        if self._is_current():
            policy, lane = self._policy, self._policy.lane_of(block)
            rank = (policy.density(lane, policy.now - block.last_access), block.last_access, -block.depth, lane)
            if not self._order or rank <= self._order[0]:  # an outdated rank in the order is no lower than a real one
                return block, stamp
        self.push(block, stamp)
        return self.pop()

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
