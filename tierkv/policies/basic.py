"""Policies whose order is one number a block: LRU, and values that fade with the time since the last use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log2

from tierkv.index.eviction import CacheBlock, EvictionOrder, EvictionPolicy, ScoreOrder
from tierkv.values.block import BlockHash
from tierkv.values.prefill import MEASURED_PREFILL, PrefillModel

__all__ = ["CostAwarePolicy", "FadingPolicy", "LFUPolicy", "LRUPolicy", "PrefixAwarePolicy"]

_LEARNING_RATE = 0.01


class LRUPolicy(EvictionPolicy):
    """Least recently used goes first; of equals, the deeper block."""

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated time of last use."""
        return -block.last_access


class FadingPolicy(LRUPolicy):
    """The least valuable block goes first, where a value halves with each `half_life_s` without a use.

    value * 2 ** -(idle / half_life) has the same order as last_access + half_life * log2(value), which does not
    change while a block lies idle: so a score that ages costs no more than one that does not. All values equal
    is LRU. The half life is the cache's own measure of time: how long a block of value 1 is kept at present.
    """

    def __init__(self) -> None:
        self.half_life_s = 0.0
        self._newest = float("-inf")

    def value(self, block: CacheBlock) -> float:
        """Return what the block is worth right after a use: above zero, of the order of 1 or more."""
        return 1.0

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated time up to which the block is as good as one of value 1 used at that time."""
        self._newest = max(self._newest, block.last_access)
        return -(block.last_access + self.half_life_s * log2(self.value(block)))

    def select_evictions(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        """Take the first `count`, and learn from how long they were kept."""
        victims = super().select_evictions(count, leaves)
        for block in victims:
            half_lives = 1 + max(log2(self.value(block)), 0.0)
            kept_s = (self._newest - block.last_access) / half_lives
            self.half_life_s += _LEARNING_RATE * (kept_s - self.half_life_s)
        return victims


class LFUPolicy(FadingPolicy):
    """Least frequently used goes first. Counts fade, or yesterday's favourites would never leave."""

    def value(self, block: CacheBlock) -> float:
        """Return the number of uses."""
        return float(block.access_count)


class CostAwarePolicy(FadingPolicy):
    """What is cheapest to compute again goes first: uses times seconds of prefill, which grow with depth.

    Source: GreedyDual-Size-Frequency (Cherkasova, 1998), its inflation replaced by the clock.
    """

    def __init__(self, prefill: PrefillModel = MEASURED_PREFILL) -> None:
        super().__init__()
        self.prefill = prefill
        self._block_tokens = 1

    def value(self, block: CacheBlock) -> float:
        """Return the prefill that the block's uses would cost, a whole first block's being 1."""
        self._block_tokens = size = max(self._block_tokens, block.num_tokens)
        seconds = self.prefill.seconds(block.depth * size, max(block.num_tokens, 1))
        return block.access_count * seconds / self.prefill.seconds(0, size)


class PrefixAwarePolicy(FadingPolicy):
    """What many sequences have begun with stays: a block is worth the blocks that followed it while it was held."""

    def score_block(self, block: CacheBlock) -> float:
        """Return the score of a block that nothing is known to have followed."""
        return self.score_prefix(block, 0)

    def score_prefix(self, block: CacheBlock, num_followers: int) -> float:
        """Return the score of a block that so many blocks have followed."""
        return super().score_block(block) - self.half_life_s * log2(1 + num_followers)

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return a queue that counts who follows whom."""
        return _PrefixQueue(self)


class _PrefixQueue(ScoreOrder[CacheBlock]):
    """Counts how many blocks were added after each block that the tier holds."""

    def __init__(self, policy: PrefixAwarePolicy) -> None:
        super().__init__(policy)
        self._prefix_policy = policy
        self._followers: dict[BlockHash, int] = {}

    def add(self, block: CacheBlock) -> None:
        self._followers[block.block_hash] = 0
        if block.parent_hash in self._followers:
            self._followers[block.parent_hash] += 1

    def remove_all(self, blocks: Sequence[CacheBlock]) -> None:
        for block in blocks:
            self._followers.pop(block.block_hash, None)

    def score(self, block: CacheBlock) -> float:
        return self._prefix_policy.score_prefix(block, self._followers.get(block.block_hash, 0))
