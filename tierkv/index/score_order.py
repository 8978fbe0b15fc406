"""The order of a policy's scores, in which the blocks of one tier are evicted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from tierkv.index.eviction_heap import EvictionHeap
from tierkv.index.eviction_policy import FAR_AWAY_S, CacheBlock, EvictionPolicy

__all__ = ["ScoreOrder"]

_log = logging.getLogger(__name__)
Block = TypeVar("Block", bound=CacheBlock)


class ScoreOrder(Generic[Block]):
    """The order of a policy's scores: the highest first, of equals the deepest block."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._has_failed = False
        self._heap: EvictionHeap[Block] = EvictionHeap()

    def add(self, block: Block) -> None:
        """Do nothing: the score is read at the push."""

    def remove_all(self, blocks: Sequence[Block]) -> None:
        """Do nothing."""

    def score(self, block: Block) -> float:
        """Return the block's score of now."""
        return self._policy.score_block(block)

    def push(self, block: Block, stamp: int) -> None:
        """Add a block with its score of now."""
        self._heap.push(self._key(block), block, stamp)

    def goes_first(self, block: Block) -> bool:
        """Return whether all pushed scores are lower."""
        return self._heap.is_before_all(self._key(block))

    def pop(self) -> tuple[Block, int] | None:
        """Take the block with the highest score."""
        return self._heap.pop()

    def clear(self) -> None:
        """Forget every push."""
        self._heap.clear()

    def __iter__(self) -> Iterator[tuple[Block, int]]:
        return iter(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def _key(self, block: Block) -> float:
        """Return the negated score. Where a policy fails, it is that of LRU: a block without a key would never go."""
        try:
            key = -self.score(block)
            if key == key:  # not nan
                return key
            problem = "a score that is no number"
        except Exception as exc:  # noqa: BLE001 - a user's policy may raise anything
            problem = f"{type(exc).__name__}: {exc}"
        if not self._has_failed:
            self._has_failed = True
            _log.error("the eviction policy failed, and the least recently used blocks go meanwhile: %s", problem)
        return block.last_access - FAR_AWAY_S
