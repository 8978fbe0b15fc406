"""What a scheduler in another process knows of the blocks in its workers' warm memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from tierkv.values.block import BlockHash

__all__ = ["WorkerBlocks"]

_UNWRITTEN_S = 30.0


class WorkerBlocks:
    """Blocks that every worker has reported as saved or loaded, the latest ones: an estimate, never a promise.

    most: how many blocks a worker's warm memory has room for; 0 remembers none.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most: int = most
        self._clock = clock
        self._until: dict[BlockHash, float] = {}  # in the order of use

    def is_warm(self, block_hash: BlockHash) -> bool:
        """Return whether a block lies in the warm memory of all workers, as far as is known."""
        return block_hash in self._until

    def is_saved(self, block_hash: BlockHash) -> bool:
        """Return whether all workers have a block that they may not have written to the disk yet.

        They hold it until then. One that was saved longer ago has to be on disk.
        """
        return self._until.get(block_hash, 0.0) > self._clock()

    def loaded(self, hashes: Iterable[BlockHash]) -> None:
        """Note blocks that all workers have loaded, or found in the warm memory."""
        self._add(hashes, 0.0)

    def saved(self, hashes: Iterable[BlockHash]) -> None:
        """Note new blocks that all workers have taken over."""
        self._add(hashes, self._clock() + _UNWRITTEN_S)

    def clear(self) -> None:
        """Forget all blocks: something was not as it was thought to be."""
        self._until.clear()

    def _add(self, hashes: Iterable[BlockHash], until: float) -> None:
        for block_hash in hashes:
            self._until[block_hash] = max(until, self._until.pop(block_hash, 0.0))
        while len(self._until) > self.most:
            del self._until[next(iter(self._until))]
