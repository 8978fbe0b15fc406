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
_MORE_BLOCKS = 8  # to choose from, since the system does not forget all of them
_MOST_S = 1.0  # of reading from one origin, after which no larger read begins
_FORGET_S = 0.5  # that the system gets to write and forget what a process has just stored
_POLL_S = 0.01
_PATIENCE = 5  # polls, after which another block is asked for in place of one that stays
_PROPORTIONAL = 1.7  # twice as many blocks that take as much longer keep busy whatever bounds them


class Calibration:
    """Measures how long 1, 2, 4 and more blocks take from disk and out of the page cache, where that is not known yet.

    root: digest of the namespace whose blocks are read. time_reading: reads blocks and returns its seconds; None if it
    could not. most: blocks that it can read at once, num_threads: blocks that it reads side by side. get_ready: called
    before the first reading. may_go_on: asked before each. What would mislead about more blocks than were read is not
    recorded.
    """

    def __init__(
        self,
        cold: ColdStore,
        root: BlockHash,
        time_reading: Callable[[Sequence[BlockKey]], float | None],
        *,
        most: int,
        num_threads: int,
        get_ready: Callable[[], None],
        may_go_on: Callable[[], bool],
    ) -> None:
        self._cold = cold
        self._root = root
        self._time_reading = time_reading
        self._most = min(most, MOST_BLOCKS)
        self._num_threads = min(num_threads, MOST_BLOCKS)
        self._get_ready = get_ready
        self._may_go_on = may_go_on

    def run(self, costs: LoadOrCompute) -> None:
        """Record what is measured. Does nothing where fewer than four blocks can be read. Raises StoreError."""
        known = costs.measured()
        # From disk first: that leaves the blocks in the page cache.
        origins = [origin for origin in (Origin.DISK, Origin.PAGE_CACHE) if not known.get(origin.name)]
        keys = self._some_keys() if origins else []
        if min(len(keys), self._most) < _LEAST_BLOCKS:
            return
        self._get_ready()
        for origin in origins:
            points = self._measure(keys, origin)
            for count, seconds in points:
                _log.debug("%d blocks took %.1f ms from %s", count, 1e3 * seconds, origin.name)
            costs.record_loads(points, origin=origin)

    def _measure(self, keys: Sequence[BlockKey], origin: Origin) -> list[tuple[int, float]]:
        """Return (blocks, seconds), nothing if they say nothing about more blocks, or something fails."""
        points: list[tuple[int, float]] = []
        count = 1
        while count <= min(len(keys), self._most) and sum(seconds for _, seconds in points) < _MOST_S:
            if not self._may_go_on():
                return []
            chosen = self._choose(keys, count, origin)
            if len(chosen) < count:
                break
            seconds = self._time_reading(chosen)
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

    def _choose(self, keys: Sequence[BlockKey], count: int, origin: Origin) -> list[BlockKey]:
        """Return so many blocks that lie where they are to be measured, fewer if that cannot be had.

        The system is asked to forget blocks from disk. It keeps some that share a folio with what is mapped.
        """
        if origin is Origin.PAGE_CACHE:
            some = keys[:count]
            if not all(map(self._is_in_memory, some)):
                self._time_reading(some)  # brings them there
            return list(filter(self._is_in_memory, some))
        deadline = time.monotonic() + _FORGET_S
        num_asked, num_polls = count, 0
        while True:
            self._cold.forget_pages([key.block_hash for key in keys[:num_asked]])
            found = [key for key in keys[:num_asked] if not self._is_in_memory(key)][:count]
            if len(found) == count or time.monotonic() > deadline or not self._may_go_on():
                return found
            num_polls += 1
            if num_polls % _PATIENCE == 0:
                num_asked += count - len(found)
            time.sleep(_POLL_S)

    def _is_in_memory(self, key: BlockKey) -> bool:
        return self._cold.is_in_memory(key.block_hash)

    def _some_keys(self) -> list[BlockKey]:
        """Return keys of stored blocks: of one sequence from its first block on, and if that is short, of others."""
        found: list[BlockKey] = []
        waiting = self._children(self._root)
        while waiting and len(found) < self._most + _MORE_BLOCKS:
            info = self._cold.read_info(waiting.pop())
            if info is not None:
                found.append(BlockKey(info.block_hash, info.parent, info.content_digest, info.token_bytes))
                waiting += self._children(info.block_hash)
        return found

    def _children(self, parent: BlockHash) -> list[BlockHash]:
        return self._cold.children(parent, most=self._most)[::-1]
