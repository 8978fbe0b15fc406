"""Waiters: requests that wait for blocks that another client is computing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from tierkv.values.block import BlockHash

__all__ = ["Waiters"]

_MAX_WAIT_S = 60.0


class Waiters:
    """Who waits for news of which block. Used on the loop alone."""

    def __init__(self) -> None:
        self._waiters: dict[BlockHash, set[asyncio.Future[None]]] = {}

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return sum(map(len, self._waiters.values()))

    async def wait(self, block_hash: BlockHash, timeout_s: float) -> bool:
        """Return True when there is news of a block, False when the time, a minute at most, is over before."""
        waiter = asyncio.get_running_loop().create_future()
        waiters = self._waiters.setdefault(block_hash, set())
        waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, min(max(timeout_s, 0), _MAX_WAIT_S))
            return True
        except asyncio.TimeoutError:
            return False
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(block_hash) is waiters:
                del self._waiters[block_hash]

    def tell(self, block_hashes: Iterable[BlockHash]) -> None:
        """Wake who waits for blocks that were published, or that nobody computes any more."""
        for block_hash in block_hashes:
            for waiter in self._waiters.pop(block_hash, ()):
                if not waiter.done():
                    waiter.set_result(None)
