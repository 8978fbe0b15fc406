"""Calibration: measures how fast cold blocks come, before the first request wants any.

Without it the first request after a restart would have to try: to wait for blocks, and to compute them in the end
where they come too slowly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.storage.cold import ColdStore
from tierkv.values.block import BlockHash

__all__ = ["MOST_BLOCKS", "Calibration"]

_log = logging.getLogger(__name__)

MOST_BLOCKS = 16
"""Blocks that are read at once at most."""

_LEAST_BLOCKS = 4
_MOST_S = 1.0  # of reading from one origin, after which no larger read begins
_FORGET_S = 0.5  # that the system gets to write and forget what a process has just stored
_POLL_S = 0.01
_PROPORTIONAL = 1.7  # twice as many blocks that take as much longer keep busy whatever bounds them


class Calibration:
    """Measures how long 1, 2, 4 and more blocks take from disk and out of the page cache, where that is not known yet.

    root: digest of the namespace whose blocks are read. time_reading: reads blocks and returns its seconds; None if it
    could not. most: blocks that it can read at once, num_threads: blocks that it reads side by side. may_go_on: asked
    before each reading. What would mislead about more blocks than were read is not recorded.
    """

    def __init__(
        self,
        cold: ColdStore,
        root: BlockHash,
        time_reading: Callable[[Sequence[BlockKey]], float | None],
        *,
        most: int,
        num_threads: int,
        may_go_on: Callable[[], bool],
    ) -> None:
        self._cold = cold
        self._root = root
        self._time_reading = time_reading
        self._most = min(most, MOST_BLOCKS)
        self._num_threads = min(num_threads, MOST_BLOCKS)
        self._may_go_on = may_go_on

    def run(self, costs: LoadOrCompute) -> None:
        """Record what is measured. Does nothing where fewer than four blocks can be read. Raises StoreError."""
        known = costs.measured()
        # From disk first: that leaves the blocks in the page cache.
        origins = [origin for origin in (Origin.DISK, Origin.PAGE_CACHE) if not known.get(origin.name)]
        keys = self._some_keys() if origins else []
        if len(keys) < _LEAST_BLOCKS:
            return
        for origin in origins:
            points = self._measure(keys, origin)
            for count, seconds in points:
                _log.debug("%d blocks took %.1f ms from %s", count, 1e3 * seconds, origin.name)
            costs.record_loads(points, origin=origin)

    def _measure(self, keys: Sequence[BlockKey], origin: Origin) -> list[tuple[int, float]]:
        """Return (blocks, seconds), nothing if they say nothing about more blocks, or something fails."""
        points: list[tuple[int, float]] = []
        count = 1
        while count <= len(keys) and sum(seconds for _, seconds in points) < _MOST_S:
            if not self._may_go_on():
                return []
            if not self._lie_in(keys[:count], origin):
                break
            seconds = self._time_reading(keys[:count])
            if seconds is None:
                return []
            points.append((count, seconds))
            count *= 2
        return points if self._are_enough(points) else []

    def _are_enough(self, points: Sequence[tuple[int, float]]) -> bool:
        """Return whether more blocks than those measured take longer in proportion, as the estimates assume."""
        if not points or points[-1][0] >= self._num_threads:
            return bool(points)
        return len(points) > 1 and points[-1][1] > _PROPORTIONAL * points[-2][1]

    def _lie_in(self, keys: Sequence[BlockKey], origin: Origin) -> bool:
        """Return whether blocks lie where they are to be measured; the system is asked to forget those from disk."""
        hashes = [key.block_hash for key in keys]
        if origin is Origin.PAGE_CACHE:
            return all(map(self._cold.is_in_memory, hashes))
        deadline = time.monotonic() + _FORGET_S
        self._cold.forget_pages(hashes)
        while any(map(self._cold.is_in_memory, hashes)):
            if time.monotonic() > deadline or not self._may_go_on():
                return False
            time.sleep(_POLL_S)
            self._cold.forget_pages(hashes)
        return True

    def _some_keys(self) -> list[BlockKey]:
        """Return keys of stored blocks: of one sequence from its first block on, and if that is short, of others."""
        found: list[BlockKey] = []
        waiting = self._children(self._root)
        while waiting and len(found) < self._most:
            info = self._cold.read_info(waiting.pop())
            if info is not None:
                found.append(BlockKey(info.block_hash, info.parent, info.content_digest, info.token_bytes))
                waiting += self._children(info.block_hash)
        return found

    def _children(self, parent: BlockHash) -> list[BlockHash]:
        return self._cold.children(parent, most=self._most)[::-1]
