"""Two prompts whose first blocks have one hash, one stored and one in memory: neither gets the other's blocks."""

from __future__ import annotations

from pathlib import Path

from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.values.block import hash_block
from tierkv.values.namespace import Namespace

NAMESPACE = Namespace(weights="w", layout=tiny_layout())
BLOCK_BYTES = tiny_layout().block_bytes
STORED, OURS = [1, 1, 1, 1], [2, 2, 2, 2]


def first_blocks_collide(parent: bytes, tokens: bytes) -> bytes:
    return b"x" * 16 if parent == NAMESPACE.digest else hash_block(parent, tokens)


def open_cache(path: Path) -> TierCache:
    config = CacheConfig(
        cold_path=path,
        block_size=4,
        hot_bytes=16 * BLOCK_BYTES,
        warm_bytes=8 * BLOCK_BYTES,
        cold_bytes=64 << 20,
        min_free_bytes=0,
    )
    return TierCache(config, namespace=NAMESPACE, hash_function=first_blocks_collide)


def test_the_stored_child_of_a_colliding_block_is_not_taken_for_ours(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*STORED, 5, 5, 5, 5, 9]))
    with open_cache(tmp_path) as cache:
        engine = PatternEngine(cache)
        cache.release(engine.start([*OURS, 7, 7, 7, 7, 9]))
        found = engine.start([*OURS, 5, 5, 5, 5, 9])
        assert found.num_cached_tokens == 4
        cache.release(found)
        cache.release(engine.start([*OURS, 5, 5, 6]))
        cache.check()


def test_our_child_is_not_stored_under_a_block_that_only_looks_like_its_parent(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*STORED, 9]))
    with open_cache(tmp_path) as cache:
        cache.release(PatternEngine(cache).start([*OURS, 5, 5, 5, 5, 9]))
        cache.release(PatternEngine(cache).start([*OURS, 8, 8, 8], partial_block=True))
        cache.flush()
        assert cache.stats().skipped_writes == 2
    with open_cache(tmp_path) as cache:
        for rest in ([5, 5, 5, 5, 9], [8, 8, 8, 9]):
            sequence = PatternEngine(cache).start([*STORED, *rest])
            assert sequence.num_cached_tokens == 4
            cache.release(sequence)
