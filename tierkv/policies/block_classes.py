"""Policies that sort blocks into classes: LRU within a class, and the least promising class first.

What a class promises depends on how long its first block has been idle. Idle times fall into buckets of half an octave.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from math import frexp

import numpy as np
import numpy.typing as npt

from tierkv.index.eviction_heap import EvictionHeap
from tierkv.index.eviction_policy import CacheBlock, EvictionOrder, EvictionPolicy
from tierkv.policies.use_history import UseHistory, split_hash

__all__ = ["BUCKET_EDGES", "NUM_BUCKETS", "BlockClassPolicy", "Floats", "UseHistory", "bucket_of", "buckets_of"]

Floats = npt.NDArray[np.float64]

NO_FORK, MOST_FORK = 0, 0xFFFF
_SAME_USE_S = 0.05

NUM_BUCKETS = 48  # up to 6 days; the last bucket has all longer times
_SHORTEST_LOG2 = -4  # all times below 1/16 s are in the first bucket
_SQRT_HALF = 0.5**0.5
BUCKET_EDGES: Floats = np.concatenate([[0.0], 2.0 ** (_SHORTEST_LOG2 + np.arange(NUM_BUCKETS) / 2)])
_LEAST_CHAIN = 12
"""From so many blocks on numpy is faster than a loop."""


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

    def update_on_insert_all(self, blocks: Sequence[CacheBlock], parent: CacheBlock | None) -> None:
        """Do as `update_on_insert` for blocks of one size that were inserted at one time, as a chain below `parent`.

        If the history knows none of them, which is usual, they take their rows over in one pass.
        """
        rows = None
        if len(blocks) >= _LEAST_CHAIN and type(self).update_on_insert is BlockClassPolicy.update_on_insert:
            rows = self.history.rows_of_new(blocks)
        if rows is None:
            for block in blocks:
                self.update_on_insert(block, parent)
                parent = block
            return
        now = self._advance(blocks[0])
        fork = NO_FORK if parent is None else self._fork_below(parent)
        history, sample_mask = self.history, self.sample_mask
        for row in history.sampled_rows(rows, sample_mask):
            self.interval_lost(history.classes[row], now - history.times[row])
        history.take_over_all(blocks, rows, self.classes_of_new(blocks, fork), fork)
        for _ in history.sampled_rows(rows, sample_mask):
            self.interval_begun()

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

    def classes_of_new(self, blocks: Sequence[CacheBlock], fork: int) -> list[int]:
        """Return the classes of the blocks of a chain that are used for the first time; see `classify` on `fork`."""
        return [self.classify(block, 1, 0.0, fork) for block in blocks]

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


class ClassOrder:
    """The blocks of each class by time of last use, and a heap of the classes by the density of their first blocks.

    Densities change with time, but only the first blocks' matter. They are read once for each moment of eviction, and
    again when a class has a new first block. A pop is O(classes + log n).
    """

    def __init__(self, policy: BlockClassPolicy) -> None:
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
        block_class, last_access = self._class_of(block), block.last_access
        if last_access != self._last_access:
            self._find_bucket(last_access)
        density = self._densities[block_class][self._bucket]
        ranks = self._ranks
        # An outdated rank is never lower than a real one.
        return not ranks or density < ranks[0][0] or (density, last_access, -block.depth, block_class) <= ranks[0]

    def count_first(self, blocks: Sequence[CacheBlock]) -> int:
        """Return how many leading blocks are less promising than all that were pushed."""
        if not self._ranks:
            return len(blocks)
        first = self._ranks[0]
        lowest = first[0]
        history, class_of, densities = self._policy.history, self._class_of, self._densities
        tags, classes, mask, last_access, bucket = history.tags, history.classes, history.mask, float("nan"), 0
        for number, block in enumerate(blocks):
            if block.last_access != last_access:
                last_access = block.last_access
                self._find_bucket(last_access)
                bucket = self._bucket
            tag, low = split_hash(block.block_hash)
            row = low & mask
            block_class = classes[row] if tags[row] == tag and block.access_count == 1 else class_of(block)
            density = densities[block_class][bucket]
            if density >= lowest and (density, last_access, -block.depth, block_class) > first:
                return number
        return len(blocks)

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


def bucket_of(idle_s: float) -> int:
    """Return the bucket of an idle time in seconds."""
    fraction, exponent = frexp(idle_s)  # idle = fraction * 2**exponent, half <= fraction < 1
    bucket = 2 * (exponent - 1 - _SHORTEST_LOG2) + (fraction >= _SQRT_HALF) + 1
    if bucket <= 0 or idle_s <= 0:
        return 0
    return bucket if bucket < NUM_BUCKETS else NUM_BUCKETS - 1


def buckets_of(idle_s: Floats) -> npt.NDArray[np.int64]:
    """Return the buckets of many idle times."""
    return np.clip(np.searchsorted(BUCKET_EDGES, idle_s, side="right") - 1, 0, NUM_BUCKETS - 1)
