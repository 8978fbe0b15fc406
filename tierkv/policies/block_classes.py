"""Policies that sort blocks into classes: LRU within a class, and the least promising class first."""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.index.eviction import CacheBlock, EvictionOrder, EvictionPolicy
from tierkv.policies.class_order import ClassOrder
from tierkv.policies.hazard import bucket_of
from tierkv.policies.use_history import UseHistory, split_hash

__all__ = ["BlockClassPolicy"]

NO_FORK, MOST_FORK = 0, 0xFFFF
_SAME_USE_S = 0.05


class BlockClassPolicy(EvictionPolicy):
    """Base of the class policies: a history of uses, and an order for each tier.

    A subclass gives a block its class (`classify`) and sets `densities`. `densities[class][bucket]` is the worth of
    keeping a block that has been idle for the bucket's time. `revision` goes up with each change of them. `now` is the
    time of the last use.

    A use costs little: the class is computed only when the block may be evicted. Statistics are kept of a sample, one
    block in `sample_mask` + 1 by its hash. All evicted blocks are remembered.
    """

    def __init__(self, *, num_classes: int, num_rows: int, sample_mask: int = 7) -> None:
        self.num_classes = num_classes
        self.history: UseHistory = UseHistory(num_rows)
        self._mask, self._tags, self._classes = self.history.mask, self.history.tags, self.history.classes
        self.sample_mask = sample_mask
        self.densities: list[list[float]] = []
        self.revision = 0
        self.now: float = float("-inf")
        self.block_tokens: int = 0

    def classify(self, block: CacheBlock, count: int, away_s: float, fork: int) -> int:
        """Return the class of a block used `count` times.

        away_s: seconds from its eviction to its last insertion; 0 if it was never evicted or this is unknown.
        fork: blocks of its chain that had been used before its first insertion; 0 if none or unknown.
        """
        raise NotImplementedError

    def interval_ended(self, block_class: int, idle_s: float) -> None:
        """Learn that a block of a class was used after an idle time."""

    def interval_lost(self, block_class: int, idle_s: float) -> None:
        """Learn that a block of a class was forgotten after an idle time without a use."""

    def interval_begun(self) -> None:
        """Learn that a block of the sample was used."""

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated worth of the block at `now`; the orders compare the same."""
        return -self.densities[self.class_of(block)][bucket_of(self.now - block.last_access)]

    def update_on_access(self, block: CacheBlock) -> None:
        """Record a use of a block, if it belongs to the sample."""
        if not block.block_hash[0] & self.sample_mask:
            self._record_use(block)

    def update_on_insert(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        """Record the first use of a block, or that an evicted block is back."""
        history, now = self.history, self._advance(block)
        row, tag = history.row_of(block.block_hash)
        if history.tags[row] == tag:
            gap_s = now - history.times[row]
            if gap_s < _SAME_USE_S:
                return  # the same request used it before or after its insertion
            history.earlier[row], history.gaps[row] = history.totals[row], gap_s
        else:
            self._take_over(row, tag, now, 0)
            if parent is not None:
                history.forks[row] = self._fork_below(parent)
        self._begin_interval(row, tag, block)

    def remember_removed(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember blocks that a tier forgets."""
        history = self.history
        mask, sample_mask = history.mask, self.sample_mask
        tags, times, earlier, totals = history.tags, history.times, history.earlier, history.totals
        for block in blocks:
            tag, low = split_hash(block.block_hash)
            row, tag = low & mask, tag or 1
            if tags[row] == tag:
                times[row] = block.last_access
                totals[row] = earlier[row] + block.access_count
            elif tag & sample_mask:  # a block of the sample would lack the statistics of its earlier uses
                self._take_over(row, tag, block.last_access, block.access_count)

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return the order of one tier."""
        return ClassOrder(self)

    def class_of(self, block: CacheBlock) -> int:
        """Return the block's class since its last use."""
        count = block.access_count
        tag, low = split_hash(block.block_hash)
        row = low & self._mask
        if self._tags[row] != (tag or 1):
            return self.classify(block, count, 0.0, NO_FORK)
        return self._classes[row] if count == 1 else self._class_in(row, block)

    def is_partial(self, block: CacheBlock) -> bool:
        """Return whether the block has fewer tokens than others, as the last block of a prompt."""
        return block.num_tokens < self.block_tokens

    def _record_use(self, block: CacheBlock) -> None:
        history, now = self.history, self._advance(block)
        row, tag = history.row_of(block.block_hash)
        if history.tags[row] == tag:
            idle_s = now - history.times[row]
            if idle_s < _SAME_USE_S:
                return
            self.interval_ended(history.classes[row], idle_s)
        else:
            self._take_over(row, tag, now, 0)
        self._begin_interval(row, tag, block)

    def _take_over(self, row: int, tag: int, time: float, total: int) -> None:
        """Give a row of the history to another block; the idle time of the block that had it is lost."""
        history = self.history
        known = history.tags[row]
        if known and not known & self.sample_mask:
            self.interval_lost(history.classes[row], self.now - history.times[row])
        history.take_over(row, tag, time, total)

    def _begin_interval(self, row: int, tag: int, block: CacheBlock) -> None:
        history = self.history
        is_sampled = not tag & self.sample_mask
        if is_sampled and block.access_count == 1 and history.earlier[row]:
            self.interval_ended(history.classes[row], history.gaps[row])
        history.times[row] = block.last_access
        history.totals[row] = history.earlier[row] + block.access_count
        history.classes[row] = self._class_in(row, block)
        if is_sampled:
            self.interval_begun()

    def _class_in(self, row: int, block: CacheBlock) -> int:
        history = self.history
        count = history.earlier[row] + block.access_count
        return self.classify(block, count, history.gaps[row], history.forks[row])

    def _advance(self, block: CacheBlock) -> float:
        """Move `now` to the block's last use, unless it is later already; return the last use."""
        now = block.last_access
        if now > self.now:
            self.now = now
        num_tokens = block.num_tokens
        if num_tokens > self.block_tokens:
            self.block_tokens = num_tokens
        return now

    def _fork_below(self, parent: CacheBlock) -> int:
        """Return how many blocks of a new child's chain were used before, if the history knows the parent."""
        row = self.history.find(parent.block_hash)
        if row is None:
            return NO_FORK
        if parent.access_count == 1 and not self.history.earlier[row]:
            return self.history.forks[row]
        return min(parent.depth + 1, MOST_FORK)
