"""Policies that are one score a block: LRU, and values that decay with the time since the last use."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import log2

from tierkv.index.eviction_policy import CacheBlock, EvictionOrder, EvictionPolicy
from tierkv.index.score_order import ScoreOrder
from tierkv.values.block import BlockHash
from tierkv.values.prefill import MEASURED_PREFILL, PrefillModel

__all__ = ["CostAwarePolicy", "DecayingPolicy", "LFUPolicy", "LRUPolicy", "PrefixAwarePolicy"]

_LEARNING_RATE = 0.01


class LRUPolicy(EvictionPolicy):
    """The least recently used block goes first; of equals, the deeper one."""

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated time of the last use."""
        return -block.last_access


class DecayingPolicy(EvictionPolicy):
    """The least valuable block goes first. A value halves with each `half_life_s` without a use.

    value * 2 ** -(idle / half_life) has the same order as last_access + half_life * log2(value). The latter does not
    change while a block is idle, so the score needs no update. Equal values make LRU. The half life is learned: it is
    how long a block of value 1 stays in the cache.
    """

    def __init__(self) -> None:
        self.half_life_s: float = 0.0
        self._newest = float("-inf")

    def value(self, block: CacheBlock) -> float:
        """Return the block's value right after a use: above zero, of the order of 1 or more."""
        return 1.0

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated time at which a use of a block of value 1 would give it the same score."""
        self._newest = max(self._newest, block.last_access)
        return -(block.last_access + self.half_life_s * log2(self.value(block)))

    def select_evictions(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        """Take the first `count`, and learn the half life from their idle times."""
        evictions = super().select_evictions(count, leaves)
        for block in evictions:
            half_lives = 1 + max(log2(self.value(block)), 0.0)
            kept_s = (self._newest - block.last_access) / half_lives
            self.half_life_s += _LEARNING_RATE * (kept_s - self.half_life_s)
        return evictions


class LFUPolicy(DecayingPolicy):
    """The least frequently used block goes first. Counts decay, or old favourites would stay for ever."""

    def value(self, block: CacheBlock) -> float:
        """Return the number of uses."""
        return float(block.access_count)


class CostAwarePolicy(DecayingPolicy):
    """The block that is cheapest to compute again goes first: uses times seconds of prefill, which grow with depth.

    Source: GreedyDual-Size-Frequency (Cherkasova, 1998), with a decay in place of its inflation value.
    """

    def __init__(self, prefill: PrefillModel = MEASURED_PREFILL) -> None:
        super().__init__()
        self.prefill = prefill
        self._block_tokens = 1

    def value(self, block: CacheBlock) -> float:
        """Return the prefill that the block's uses would cost; a whole first block's prefill is 1."""
        self._block_tokens = size = max(self._block_tokens, block.num_tokens)
        seconds = self.prefill.seconds(block.depth * size, max(block.num_tokens, 1))
        return block.access_count * seconds / self.prefill.seconds(0, size)


class PrefixAwarePolicy(DecayingPolicy):
    """A block that many sequences begin with stays: its value is 1 + the blocks inserted below it."""

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return an order that counts the blocks inserted below each block."""
        return _FollowerOrder(self)


class _FollowerOrder(ScoreOrder[CacheBlock]):
    """Counts the blocks that were added below each block while the tier held it."""

    def __init__(self, policy: PrefixAwarePolicy) -> None:
        super().__init__(policy)
        self._decaying = policy
        self._followers: dict[BlockHash, int] = {}

    def add(self, block: CacheBlock) -> None:
        self._followers[block.block_hash] = 0
        if block.parent_hash in self._followers:
            self._followers[block.parent_hash] += 1

    def remove_all(self, blocks: Sequence[CacheBlock]) -> None:
        for block in blocks:
            self._followers.pop(block.block_hash, None)

    def score(self, block: CacheBlock) -> float:
        value = 1 + self._followers.get(block.block_hash, 0)
        return self._decaying.score_block(block) - self._decaying.half_life_s * log2(value)
