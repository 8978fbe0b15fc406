"""Policies that sort blocks into lanes: least recently used within a lane, least promising between lanes."""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.index.eviction import CacheBlock, EvictionOrder, EvictionPolicy
from tierkv.policies.hazard import bucket_of
from tierkv.policies.lane_queue import LaneQueue
from tierkv.policies.use_history import UseHistory, split_hash

__all__ = ["LanePolicy"]

NO_FORK, MOST_FORK = 0, 0xFFFF
_SAME_USE_S = 0.05


class LanePolicy(EvictionPolicy):
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
        self._mask, self._tags, self._lanes = self.history.mask, self.history.tags, self.history.lanes  # read most
        self.sample_mask = sample_mask
        self.densities: list[list[float]] = []
        self.revision = 0
        self.now = float("-inf")
        self.block_tokens = 0

    def choose_lane(self, block: CacheBlock, count: int, away_s: float, fork: int) -> int:
        """Return the lane of a block used `count` times.

        away_s: how long it had been evicted when it was last inserted; 0 if it had not been, or nobody knows.
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
            known = history.tags[row]
            if known and not known & self.sample_mask:
                self.interval_lost(history.lanes[row], now - history.times[row])
            history.take_over(row, tag, now, 0)
            if parent is not None:
                history.forks[row] = self._fork_below(parent)
        self._begin(row, tag, block)

    def note_removed(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember blocks that a tier forgets."""
        history = self.history
        mask, sample_mask = history.mask, self.sample_mask
        tags, times, earlier, totals = history.tags, history.times, history.earlier, history.totals
        for block in blocks:
            tag, low = split_hash(block.block_hash)
            row, tag = low & mask, tag or 1
            known = tags[row]
            if known != tag:
                if not tag & sample_mask:
                    continue  # nobody knows how long it has been in the sample
                if known and not known & sample_mask:
                    self.interval_lost(history.lanes[row], self.now - times[row])
                history.take_over(row, tag, block.last_access, block.access_count)
            else:
                times[row] = block.last_access
                totals[row] = earlier[row] + block.access_count

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return the lanes of one tier."""
        return LaneQueue(self)

    def density(self, lane: int, idle_s: float) -> float:
        """Return the worth of keeping a block of a lane that has been idle for so long."""
        return self.densities[lane][bucket_of(idle_s)]

    def lane_of(self, block: CacheBlock) -> int:
        """Return the lane that the block is in since its last use."""
        count = block.access_count
        tag, low = split_hash(block.block_hash)
        row = low & self._mask
        if self._tags[row] != (tag or 1):
            return self.choose_lane(block, count, 0.0, NO_FORK)
        return self._lanes[row] if count == 1 else self._lane_in(row, block)

    def is_partial(self, block: CacheBlock) -> bool:
        """Return whether the block has fewer tokens than others: the last of a prompt, seldom met again as it is."""
        return block.num_tokens < self.block_tokens

    def _note_use(self, block: CacheBlock) -> None:
        history, now = self.history, self._advance(block)
        row, tag = history.row_of(block.block_hash)
        if history.tags[row] == tag:
            idle_s = now - history.times[row]
            if idle_s < _SAME_USE_S:
                return
            self.interval_ended(history.lanes[row], idle_s)
        else:
            known = history.tags[row]
            if known and not known & self.sample_mask:
                self.interval_lost(history.lanes[row], now - history.times[row])
            history.take_over(row, tag, now, 0)
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

    def _lane_in(self, row: int, block: CacheBlock) -> int:
        history = self.history
        count = history.earlier[row] + block.access_count
        return self.choose_lane(block, count, history.gaps[row], history.forks[row])

    def _advance(self, block: CacheBlock) -> float:
        """Bring the time up to the block's last use, and return that."""
        now = block.last_access
        if now > self.now:
            self.now = now
        num_tokens = block.num_tokens
        if num_tokens > self.block_tokens:
            self.block_tokens = num_tokens
        return now

    def _fork_below(self, parent: CacheBlock) -> int:
        """Return how many blocks of a new block's chain had been used before, its parent's chain known."""
        row = self.history.find(parent.block_hash)
        if row is None:
            return NO_FORK
        if parent.access_count == 1 and not self.history.earlier[row]:
            return self.history.forks[row]
        return min(parent.depth + 1, MOST_FORK)
