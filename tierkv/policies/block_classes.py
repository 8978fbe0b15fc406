"""Policies that sort blocks into classes: LRU within a class, and the least promising class first.

What a class promises depends on how long its first block has been idle.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from weakref import ReferenceType, ref

import numpy as np

from tierkv.index.entry import INDEX_FLAGS, MOST_NOTE, NOTE_SHIFT
from tierkv.index.eviction_policy import CacheBlock, EvictionOrder, EvictionPolicy
from tierkv.policies.class_order import ClassOrder
from tierkv.policies.idle_buckets import bucket_of
from tierkv.policies.use_history import (
    MOST_USES,
    NO_FORK,
    Rows,
    Tags,
    UseHistory,
    gap_with_stay,
    smoothed_gap,
    split_hash,
)

__all__ = ["SAMPLED_BLOCKS", "BlockClassPolicy"]

MOST_FORK = 0xFFFF
_SAME_USE_S = 0.05

SAMPLED_BLOCKS = 8192
"""Uses of this many cached blocks say enough of all."""

_HIGHEST_MASK = 0xFF  # a hash's first byte decides
_LEAST_CHAIN = 32
"""From so many blocks on numpy is faster than a loop."""


class BlockClassPolicy(EvictionPolicy):
    """Base of the class policies: a history of uses, and an order for each tier.

    A subclass gives a block its class (`classify`) and sets `densities`. `densities[class][bucket]` is the worth of
    keeping a block that has been idle for the bucket's time. `revision` goes up with each change of them. `now` is the
    time of the last use.

    A use costs little: the class is computed only when the block may be evicted. A block that was not used since its
    insertion has its class as a note: the history may lose its row, and a note is read much faster.
    Statistics are kept of a sample, one block in `sample_mask` + 1 by its hash: of all blocks if a tier has few, of
    some thousands if it has many. All evicted blocks are remembered.

    sampled_blocks: the sample is halved as long as a tier holds more blocks of it than this.
    """

    def __init__(self, *, num_classes: int, num_rows: int, sampled_blocks: int = SAMPLED_BLOCKS) -> None:
        self.num_classes = num_classes
        self.history: UseHistory = UseHistory(num_rows)
        self._mask, self._tags, self._classes = self.history.mask, self.history.tags, self.history.classes
        self._earlier, self._forks = self.history.earlier, self.history.forks
        self.sample_mask = 0
        self._sampled_blocks = sampled_blocks
        self._orders: list[ReferenceType[ClassOrder]] = []
        self.densities: list[list[float]] = []
        self.revision = 0
        self.now: float = float("-inf")
        self.block_tokens: int = 0

    def classify(self, block: CacheBlock, count: int, gap_s: float, fork: int) -> int:
        """Return the class of a block used `count` times.

        gap_s: seconds between its uses, cached or evicted: an average in which later ones count more; 0 if unknown.
        fork: blocks of its chain that had been used before its first insertion; 0 if none or unknown.
        """
        raise NotImplementedError

    def interval_ended(self, block_class: int, idle_s: float) -> None:
        """Learn that a block of a class was used after an idle time."""

    def interval_lost(self, block_class: int, idle_s: float) -> None:
        """Learn that a block of a class was forgotten after an idle time without a use."""

    def interval_begun(self) -> None:
        """Learn that a block of the sample was used."""

    def uses_to_next_change(self) -> int:
        """Return which of the next calls of `interval_begun` may change what the policy knows or samples: 1 or more."""
        return sys.maxsize

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated worth of the block at `now`; the orders compare the same."""
        return -self.densities[self.class_of(block)][bucket_of(self.now - block.last_access)]

    def update_on_access(self, block: CacheBlock) -> None:
        """Record a use of a block, if it belongs to the sample."""
        if not block.block_hash[0] & self.sample_mask:
            self._record_use(block)

    def update_on_access_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Do as `update_on_access` for several blocks."""
        if type(self).update_on_access is not BlockClassPolicy.update_on_access:
            for block in blocks:
                self.update_on_access(block)
            return
        sample_mask = self.sample_mask
        for block in blocks:
            if not block.block_hash[0] & sample_mask:
                self._record_use(block)
                sample_mask = self.sample_mask

    def update_on_insert(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        """Record the first use of a block, or that an evicted block is back."""
        tag, low = split_hash(block.block_hash)
        row, tag = low & self._mask, tag or 1
        if self._tags[row] != tag and tag & self.sample_mask:
            self._insert_new(row, tag, block, parent)
            return
        history, now = self.history, self._advance(block)
        if history.tags[row] == tag:
            gap_s = now - history.times[row]
            if gap_s < _SAME_USE_S:
                return  # the same request used it before or after its insertion
            if not tag & self.sample_mask:
                self.interval_ended(history.classes[row], gap_s)
            history.earlier[row] = history.totals[row]
            history.gaps[row] = smoothed_gap(history.gaps[row], gap_s, 1)
        else:
            fork = NO_FORK if parent is None else self._fork_below(parent)  # before the parent may lose its row
            self._take_over(row, tag, now, 0)
            history.forks[row] = fork
        self._begin_interval(row, tag, block)

    def update_on_insert_all(self, blocks: Sequence[CacheBlock], parent: CacheBlock | None) -> None:
        """Do as `update_on_insert` for new blocks of one size that were inserted at one time as a chain below `parent`.

        If the history knows none of them, which is usual, they take their rows over in one pass.
        """
        found = None
        if len(blocks) >= _LEAST_CHAIN and type(self).update_on_insert is BlockClassPolicy.update_on_insert:
            found = self.history.rows_of_new(blocks)
        if found is None:
            for block in blocks:
                self.update_on_insert(block, parent)
                parent = block
            return
        tags, rows = found
        fork = NO_FORK if parent is None else self._fork_below(parent)
        start = 0
        while start < len(blocks):
            start += self._insert_all_new(blocks[start:], tags[start:], rows[start:], fork)

    def remember_removed(self, blocks: Sequence[CacheBlock]) -> None:
        """Remember blocks that a tier forgets."""
        history = self.history
        mask, sample_mask = history.mask, self.sample_mask
        tags, times, gaps = history.tags, history.times, history.gaps
        earlier, totals = history.earlier, history.totals
        for block in blocks:
            if block.access_count == 1:
                continue  # its row still has what was written at the insertion
            tag, low = split_hash(block.block_hash)
            row, tag = low & mask, tag or 1
            if tags[row] == tag:
                times[row] = block.last_access
                gaps[row] = gap_with_stay(gaps[row], block)
                totals[row] = min(earlier[row] + block.access_count, MOST_USES)
            elif tag & sample_mask:  # a block of the sample would lack the statistics of its earlier uses
                self._take_over(row, tag, block.last_access, min(block.access_count, MOST_USES))

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return the order of one tier."""
        order = ClassOrder(self)
        self._orders = [known for known in self._orders if known() is not None] + [ref(order)]
        return order

    def class_of(self, block: CacheBlock) -> int:
        """Return the block's class since its last use."""
        count = block.access_count
        if count == 1 and (note := block.flags >> NOTE_SHIFT):
            return note - 1
        tag, low = split_hash(block.block_hash)
        row = low & self._mask
        if self._tags[row] != (tag or 1):
            return self.classify(block, count, 0.0 if count == 1 else gap_with_stay(0.0, block), NO_FORK)
        return self._classes[row] if count == 1 else self._class_in(row, block)

    def classes_of_new(self, blocks: Sequence[CacheBlock], fork: int) -> list[int]:
        """Return the classes of the blocks of a chain that are used for the first time; see `classify` on `fork`."""
        return [self.classify(block, 1, 0.0, fork) for block in blocks]

    def is_partial(self, block: CacheBlock) -> bool:
        """Return whether the block has fewer tokens than others, as the last block of a prompt."""
        return block.num_tokens < self.block_tokens

    def halve_sample(self) -> bool:
        """Keep statistics of half as many blocks from now on, if a tier holds too many of the sample."""
        num_held = max((order.num_held for known in self._orders if (order := known()) is not None), default=0)
        if num_held <= self._sampled_blocks * (self.sample_mask + 1) or self.sample_mask == _HIGHEST_MASK:
            return False
        self.sample_mask = 2 * self.sample_mask + 1
        return True

    def _insert_new(self, row: int, tag: int, block: CacheBlock, parent: CacheBlock | None) -> None:
        """Write the row of a block that is neither known nor in the sample."""
        now = block.last_access
        if now > self.now:
            self.now = now
        known = self._tags[row]
        if known and not known & self.sample_mask:
            self.interval_lost(self._classes[row], self.now - self.history.times[row])
        fork = NO_FORK
        if parent is not None:  # as in _fork_below, but of one piece: most blocks come this way
            parent_tag, low = split_hash(parent.block_hash)
            at = low & self._mask
            if self._tags[at] == (parent_tag or 1):
                is_new = parent.access_count == 1 and not self._earlier[at]
                fork = self._forks[at] if is_new else min(parent.depth + 1, MOST_FORK)
        block_class = self.classify(block, block.access_count, 0.0, fork)
        _note_class(block, block_class)
        self.history.write(row, tag, now, block.access_count, fork, block_class)

    def _insert_all_new(self, blocks: Sequence[CacheBlock], tags: Tags, rows: Rows, fork: int) -> int:
        """Write the rows of new blocks up to the one after which the policy learns; return their number."""
        history, sample_mask = self.history, self.sample_mask
        sampled, left = np.flatnonzero(tags & np.uint64(sample_mask) == 0), self.uses_to_next_change()
        if len(sampled) >= left:
            sampled = sampled[:left]
            count = int(sampled[-1]) + 1
            blocks, tags, rows = blocks[:count], tags[:count], rows[:count]
        now = blocks[0].last_access
        self.now = max(self.now, now)
        if len(sampled):
            self.block_tokens = max(self.block_tokens, blocks[0].num_tokens)
        for row in history.sampled_rows(rows, sample_mask):
            self.interval_lost(history.classes[row], self.now - history.times[row])
        classes = self.classes_of_new(blocks, fork)
        history.take_over_all(rows, tags, now, classes, fork)
        for block, block_class in zip(blocks, classes, strict=True):
            if block_class < MOST_NOTE:  # as in _note_class
                block.flags = block.flags & INDEX_FLAGS | (block_class + 1) << NOTE_SHIFT
        for _ in sampled:
            self.interval_begun()
        return len(blocks)

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
        history.times[row] = block.last_access
        history.totals[row] = min(history.earlier[row] + block.access_count, MOST_USES)
        block_class = history.classes[row] = self._class_in(row, block)
        _note_class(block, block_class)
        if not tag & self.sample_mask:
            self.interval_begun()

    def _class_in(self, row: int, block: CacheBlock) -> int:
        history = self.history
        count = history.earlier[row] + block.access_count
        return self.classify(block, count, gap_with_stay(history.gaps[row], block), history.forks[row])

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
        tag, low = split_hash(parent.block_hash)
        row = low & self._mask
        if self._tags[row] != (tag or 1):
            return NO_FORK
        if parent.access_count == 1 and not self._earlier[row]:
            fork: int = self._forks[row]
            return fork
        return min(parent.depth + 1, MOST_FORK)


def _note_class(block: CacheBlock, block_class: int) -> None:
    """Keep the class with a block that was just inserted."""
    if block.access_count == 1 and block_class < MOST_NOTE:
        block.flags = block.flags & INDEX_FLAGS | (block_class + 1) << NOTE_SHIFT
