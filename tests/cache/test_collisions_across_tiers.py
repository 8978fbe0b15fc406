"""A hash collision costs a miss also where a chain passes from memory to the store, or the other way.

The index and the store are each a tree of verified blocks. What is found or put behind a block of the other tree is
joined to it by the content digest, for hashes can be forged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.values.block import hash_block
from tierkv.values.namespace import Namespace

BLOCK_BYTES = tiny_layout().block_bytes
FIRST, FORGED, NEXT = [1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]


def forged_hash(parent: bytes, tokens: bytes) -> bytes:
    """FIRST and FORGED share a hash, and nothing else does."""
    same = np.array(FORGED, dtype="<u4").tobytes()
    return hash_block(parent, np.array(FIRST, dtype="<u4").tobytes() if tokens == same else tokens)


def open_cache(path: Path) -> TierCache:
    config = CacheConfig(
        cold_path=path / "store",
        block_size=4,
        hot_bytes=16 * BLOCK_BYTES,
        warm_bytes=8 * BLOCK_BYTES,
        cold_bytes=64 << 20,
        min_free_bytes=0,
    )
    return TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout()), hash_function=forged_hash)


def test_a_block_is_not_stored_under_another_one_with_its_parents_hash(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*FORGED, 0]))
    with open_cache(tmp_path) as cache:  # FIRST finds its hash taken in the store, and is kept in memory
        cache.release(PatternEngine(cache).start([*FIRST, *NEXT, 0]))
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*FORGED, *NEXT, 0]))  # checks every byte that it is given


def test_a_stored_block_is_not_found_behind_another_one_with_its_parents_hash(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*FORGED, *NEXT, 0]))
    with open_cache(tmp_path) as cache:
        engine = PatternEngine(cache)
        cache.release(engine.start([*FIRST, 0]))  # in memory now, the store has FORGED
        cache.release(engine.start([*FIRST, *NEXT, 0]))


def test_a_tail_is_not_stored_under_another_one_with_its_parents_hash(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*FORGED, 0]))
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*FIRST, 9, 9], partial_block=True))
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*FORGED, 9, 9, 0]))


def test_a_block_of_a_state_file_is_not_found_behind_another_one_with_its_parents_hash(tmp_path: Path) -> None:
    with open_cache(tmp_path / "a") as cache:
        cache.release(PatternEngine(cache).start([*FORGED, *NEXT, 9, 9], partial_block=True))
        cache.save_cache_state(tmp_path / "state")
    with open_cache(tmp_path / "b") as cache:
        cache.load_cache_state(tmp_path / "state")
        engine = PatternEngine(cache)
        cache.release(engine.start([*FIRST, *NEXT, 0]))
        cache.release(engine.start([*FIRST, *NEXT, 9, 9, 0]))
        again = engine.start([*FORGED, 0])
        assert again.num_cached_tokens == 0, "its hash is taken in memory: a miss"
        cache.release(again)
