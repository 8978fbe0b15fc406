"""What an engine with many sequences asks of a cache: is there room, and may a partly filled block be shared?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pattern_engine import PatternEngine, open_tiny

from tierkv.cache import TierCache
from tierkv.errors import ClosedError, ConfigError
from tierkv.values.block import Tier

PROMPT = list(range(10, 20))  # two whole blocks, and two tokens


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TierCache]:
    with open_tiny(tmp_path, hot=12) as opened:
        yield opened


def test_a_partly_filled_block_of_a_running_sequence_is_copied(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    source, target = engine.start(PROMPT), cache.acquire([*PROMPT, 7, 8])
    assert target.num_cached_tokens == 8
    assert cache.batching.share_partial(source, target, 10) == 2
    assert target.num_cached_tokens == 10 and target.cached_tokens[Tier.HOT] == 10
    engine.check(target, 10)
    assert source.block_table[2] != target.block_table[2]
    assert cache.batching.share_partial(source, target, 10) == 0, "it has them already"
    engine.decode(source, [50, 51, 52])
    engine.compute(target, 10)
    for sequence in (source, target):
        engine.check(sequence)
        cache.release(sequence)
    cache.check()


@pytest.mark.parametrize(
    ("other", "num_tokens"),
    [
        ([*PROMPT[:8], 90, 19, 7], 10),  # another token in the partial block
        ([*PROMPT[:9], 90, 7], 10),
        ([5, *PROMPT[1:], 7], 10),  # other blocks before it
        ([*PROMPT, 7], 11),  # more than the source has
        (PROMPT, 10),  # nothing would be left to compute
        ([*PROMPT, 7], 8),  # no partial block
    ],
)
def test_nothing_else_is_copied(cache: TierCache, other: list[int], num_tokens: int) -> None:
    engine = PatternEngine(cache)
    source, target = engine.start(PROMPT), cache.acquire(other)
    found = target.num_cached_tokens
    assert cache.batching.share_partial(source, target, num_tokens) == 0
    assert target.num_cached_tokens == found
    for sequence in (source, target):
        cache.release(sequence)
    with pytest.raises(ConfigError, match="released"):
        cache.batching.share_partial(source, target, num_tokens)
    cache.check()


def test_equal_tokens_behind_other_blocks_are_not_copied(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    other = [5, *PROMPT[1:8]]
    cache.release(engine.start([*other, 3]))
    source, target = engine.start(PROMPT), cache.acquire([*other, *PROMPT[8:], 7])
    assert target.num_cached_tokens == 8 and target.token_bytes[32:40] == source.token_bytes[32:40]
    assert cache.batching.share_partial(source, target, 10) == 0
    for sequence in (source, target):
        cache.release(sequence)
    cache.check()


def test_room_is_what_no_sequence_uses(cache: TierCache) -> None:
    has_room = cache.batching.has_room
    assert has_room(range(48), reuse=True) and not has_room(range(49), reuse=True)
    assert has_room(range(44), reuse=True, spare=1) and not has_room(range(48), reuse=True, spare=1)
    sequence = PatternEngine(cache).start(PROMPT)
    cache.flush()
    assert has_room(range(36), reuse=True) and not has_room(range(37), reuse=True)
    shared = [*PROMPT[:8], *range(100, 136)]
    assert has_room(shared, reuse=True), "two of its eleven blocks are in use already"
    assert not has_room(shared, reuse=False)
    cache.release(sequence)
    assert has_room(range(48), reuse=True), "what is only cached can be evicted"


def test_without_a_daemon_no_other_process_computes(cache: TierCache) -> None:
    assert not cache.batching.has_other_processes
    assert cache.batching.computed_elsewhere(PROMPT) is None


def test_a_closed_cache_refuses(tmp_path: Path) -> None:
    cache = open_tiny(tmp_path)
    cache.close()
    with pytest.raises(ClosedError):
        cache.batching.has_room(PROMPT, reuse=True)
