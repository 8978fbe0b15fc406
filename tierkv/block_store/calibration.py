"""Calibration: measures how fast cold blocks come, before the first request wants any.

Without it the first request after a restart would have to try: to wait for blocks, and to compute them in the end
where they come too slowly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import islice

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.storage.cold import ColdStore
from tierkv.values.block import BlockHash

__all__ = ["calibrate"]

_log = logging.getLogger(__name__)

_LEAST_BLOCKS = 4
_MOST_BLOCKS = 16
_LISTED_BLOCKS = 256
_POLL_S = 0.01
_MOST_S = 1.0  # for each origin, after which no larger read begins


def calibrate(
    costs: LoadOrCompute,
    cold: ColdStore,
    root: BlockHash,
    time_reading: Callable[[Sequence[BlockKey]], float | None],
    *,
    most: int = _MOST_BLOCKS,
) -> None:
    """Record how long 1, 2, 4 and more blocks take out of the page cache and from disk, where that is not known yet.

    root: digest of the namespace whose blocks are read. time_reading: reads blocks, and returns its seconds, or None.
    most: blocks that it can read at once. Does nothing for a store that has fewer than four of its blocks.
    Raises StoreError.
    """
    known = costs.measured()
    origins = [origin for origin in (Origin.PAGE_CACHE, Origin.DISK) if not known.get(origin.name)]
    if not origins:
        return
    keys = _some_keys(cold, root)[:most]
    if len(keys) < _LEAST_BLOCKS:
        return
    for origin in origins:
        if not _calibrate_one(costs, cold, keys, time_reading, origin):
            return


def _calibrate_one(
    costs: LoadOrCompute,
    cold: ColdStore,
    keys: Sequence[BlockKey],
    time_reading: Callable[[Sequence[BlockKey]], float | None],
    origin: Origin,
) -> bool:
    """Measure one origin, unless the system does not let blocks lie there. Return False if a block cannot be read."""
    count, deadline = 1, time.monotonic() + _MOST_S
    while count <= len(keys) and time.monotonic() < deadline:
        some = keys[:count]
        hashes = [key.block_hash for key in some]
        if origin is Origin.DISK:
            _forget(cold, hashes, deadline)
        elif not all(map(cold.is_in_memory, hashes)) and time_reading(some) is None:
            return False
        if any(cold.is_in_memory(each) is not (origin is Origin.PAGE_CACHE) for each in hashes):
            return True
        seconds = time_reading(some)
        if seconds is None:
            return False
        costs.record_load(count, origin=origin, seconds=seconds)
        _log.debug("%d blocks took %.1f ms from %s", count, 1e3 * seconds, origin.name)
        count *= 2
    return True


def _forget(cold: ColdStore, hashes: Sequence[BlockHash], deadline: float) -> None:
    """Have the system forget blocks. What a process has just stored it writes first, and is asked again."""
    cold.forget_pages(hashes)
    while any(map(cold.is_in_memory, hashes)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        cold.forget_pages(hashes)


def _some_keys(cold: ColdStore, root: BlockHash) -> list[BlockKey]:
    """Return keys of stored blocks, one sequence's as far as it goes: those lie side by side in the file."""
    entries = dict(islice(cold.iter_entries(root), _LISTED_BLOCKS))
    found: dict[BlockHash, BlockKey] = {}
    for block_hash in sorted(entries, key=lambda each: entries[each].depth, reverse=True):
        at = block_hash
        while at not in found and len(found) < _MOST_BLOCKS and (key := _key_of(cold, at)) is not None:
            found[at] = key
            at = key.parent_hash
    return list(found.values())[::-1]


def _key_of(cold: ColdStore, block_hash: BlockHash) -> BlockKey | None:
    info = cold.read_info(block_hash)
    return None if info is None else BlockKey(info.block_hash, info.parent, info.content_digest, info.token_bytes)
