"""What an engine gets wrong is refused, or does nothing: it never costs somebody else a right answer or a block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import PatternEngine, open_tiny, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.namespace import Namespace
from tierkv.sequence import Sequence

BLOCK_BYTES = tiny_layout().block_bytes
PROMPT = list(range(9))
OTHER = list(range(100, 109))


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TierCache]:
    with open_tiny(tmp_path, hot=8) as opened:
        yield opened


@pytest.mark.parametrize(
    "use",
    [
        lambda cache, sequence: cache.commit(sequence, 4),
        lambda cache, sequence: cache.append(sequence, [1] * 8),
        lambda cache, sequence: cache.fork(sequence),
    ],
    ids=["commit", "append", "fork"],
)
def test_a_released_sequence_cannot_be_used(cache: TierCache, use: Callable[[TierCache, Sequence], None]) -> None:
    engine = PatternEngine(cache)
    released = cache.acquire(PROMPT)
    cache.release(released)
    other = cache.acquire(OTHER)  # takes the blocks that the first one had
    engine.compute(other, 0)
    with pytest.raises(ConfigError, match="has been released"):
        use(cache, released)
    again = engine.start(PROMPT)  # checks every byte that it is given
    for sequence in (other, again):
        cache.release(sequence)
    cache.check()


def test_a_tail_that_ends_before_the_blocks_that_are_cached_is_none(cache: TierCache) -> None:
    sequence = PatternEngine(cache).start(PROMPT)
    assert cache.commit(sequence, 3, tail=True) == 0
    cache.release(sequence)
    cache.flush()
    assert cache.cold and cache.cold.stats().blocks == 2
    cache.check()


@pytest.mark.parametrize("count", [-1, 10])
def test_more_tokens_than_there_are_or_fewer_than_none_cannot_be_committed(cache: TierCache, count: int) -> None:
    sequence = cache.acquire(PROMPT)
    with pytest.raises(ConfigError, match="tokens computed of a sequence of 9"):
        cache.commit(sequence, count, tail=True)
    cache.release(sequence)
    cache.check()


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"block_size": "16"}, "block_size must be a whole number, got '16'"),
        ({"block_size": 16.0}, "block_size must be a whole number, got 16.0"),
        ({"hot_bytes": "8G"}, "hot_bytes must be a whole number, got '8G' (in bytes, as 8 << 30)"),
        ({"warm_bytes": True}, "warm_bytes must be a whole number, got True"),
    ],
)
def test_a_size_that_is_no_whole_number_is_refused(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        CacheConfig(**option)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    config = CacheConfig(block_size=4, hot_bytes=8 * BLOCK_BYTES, warm_bytes=8 * BLOCK_BYTES)
    with pytest.raises(ConfigError, match="there is no device cuda:99"):
        TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout()), device="cuda:99")
