"""What an engine gets wrong is refused, or does nothing: it never costs somebody else a right answer or a block."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import PatternEngine, open_tiny, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import ClosedError, ConfigError, StoreBusyError
from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

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
    assert cache.commit(sequence, 3, partial_block=True) == 0
    cache.release(sequence)
    cache.flush()
    assert cache.cold and cache.cold.stats().blocks == 2
    cache.check()


@pytest.mark.parametrize("count", [-1, 10])
def test_more_tokens_than_there_are_or_fewer_than_none_cannot_be_committed(cache: TierCache, count: int) -> None:
    sequence = cache.acquire(PROMPT)
    with pytest.raises(ConfigError, match="tokens computed of a sequence of 9"):
        cache.commit(sequence, count, partial_block=True)
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


# --- Sequences of another cache, or none ---------------------------------------------------------------

OF_A_SEQUENCE: dict[str, Callable[[TierCache, Any], object]] = {
    "commit": lambda cache, sequence: cache.commit(sequence, 8),
    "append": lambda cache, sequence: cache.append(sequence, [1] * 8),
    "fork": lambda cache, sequence: cache.fork(sequence),
    "release": lambda cache, sequence: cache.release(sequence),
    "defragment": lambda cache, sequence: cache.defragment([sequence]),
}


@pytest.mark.parametrize("name", OF_A_SEQUENCE)
def test_a_sequence_of_another_cache_is_refused_and_harms_neither(cache: TierCache, tmp_path: Path, name: str) -> None:
    with open_tiny(tmp_path / "other", hot=8) as other:
        mine, theirs = PatternEngine(cache).start(OTHER), PatternEngine(other, seed=1).start(PROMPT)
        with pytest.raises(ConfigError, match="belongs to another cache"):
            OF_A_SEQUENCE[name](cache, theirs)
        asked = cache.acquire(PROMPT)
        assert asked.num_cached_tokens == 0
        PatternEngine(other, seed=1).check(theirs)
        PatternEngine(cache).check(mine)
        for owner, sequence in ((cache, mine), (cache, asked), (other, theirs)):
            owner.release(sequence)
        for each in (cache, other):
            each.flush()
            each.check()


@pytest.mark.parametrize("given", [None, 3, "sequence", [], object()], ids=repr)
@pytest.mark.parametrize("name", OF_A_SEQUENCE)
def test_what_is_no_sequence_is_refused(cache: TierCache, name: str, given: object) -> None:
    with pytest.raises(ConfigError, match=r"a sequence is wanted|must be sequences"):
        OF_A_SEQUENCE[name](cache, given)


@pytest.mark.parametrize("name", sorted(OF_A_SEQUENCE.keys() - {"release"}))
def test_a_sequence_that_closing_released_is_refused(tmp_path: Path, name: str) -> None:
    cache = open_tiny(tmp_path)
    sequence = cache.acquire(PROMPT)
    cache.close()
    with pytest.raises(ClosedError):
        OF_A_SEQUENCE[name](cache, sequence)
    cache.release(sequence)
    with open_tiny(tmp_path / "other") as other, pytest.raises(ConfigError, match="has been released"):
        OF_A_SEQUENCE[name](other, sequence)


class SlowSequence(Sequence):
    """Lets another thread in between the question whether it is released and what is done about it."""

    __slots__ = ()

    @property
    def is_released(self) -> bool:  # type: ignore[override]
        value: bool = Sequence.is_released.__get__(self)  # type: ignore[attr-defined]
        time.sleep(0.005)
        return value

    @is_released.setter
    def is_released(self, value: bool) -> None:
        Sequence.is_released.__set__(self, value)  # type: ignore[attr-defined]


def test_two_threads_that_release_one_sequence_release_it_once(cache: TierCache) -> None:
    kept, sequence = cache.acquire(PROMPT), cache.acquire(OTHER)
    sequence.__class__ = SlowSequence
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(cache.release, [sequence] * 8))
    cache.check()
    cache.release(kept)
    cache.check()


# --- What a name or a docstring says is what happens ---------------------------------------------------


def test_pin_counts_what_it_pins(tmp_path: Path) -> None:
    state, prompt = tmp_path / "state.tkv", list(range(33))
    with open_tiny(tmp_path, hot=16) as cache:
        cache.release(PatternEngine(cache).start(prompt))
        cache.save_cache_state(state)
        assert cache.pin(prompt) == 8  # hot, warm and cold
        assert cache.unpin(prompt) == 8
    with open_tiny(tmp_path, hot=16) as cache:  # only the store has them
        assert cache.pin(prompt) == 8
        assert cache.cold
        assert all(cache.cold.lookup(each).pinned for each in cache.match(prompt).block_hashes)  # type: ignore[union-attr]
        assert cache.unpin(prompt) == 8
    with open_tiny(tmp_path, hot=16, cold_path=None) as cache:
        cache.load_cache_state(state)
        assert cache.match(prompt).num_cached_tokens == 32
        assert cache.pin(prompt) == 0, "a state file's blocks are in no tier"
        cache.release(cache.acquire(prompt[:17]))  # brings four up
        assert cache.pin(prompt) == 4
        for tier in (Tier.HOT, Tier.WARM):
            cache.evict(tier)
        assert cache.stats().tiers[Tier.HOT].blocks == 4
        assert cache.unpin(prompt) == 4


def test_a_pin_that_the_store_refuses_pins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tiny(tmp_path, hot=16) as cache:
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.flush()
        assert cache.cold

        def busy(*_: object, **__: object) -> None:
            raise StoreBusyError("others write")

        monkeypatch.setattr(cache.cold, "set_pinned", busy)
        with pytest.raises(StoreBusyError):
            cache.pin(PROMPT)
        assert not any(block.pinned for block in cache.blocks.inspect())


@pytest.mark.parametrize("count", [None, 3, 0])
def test_hot_blocks_that_nobody_has_written_are_written_then_evicted_and_counted(
    tmp_path: Path, count: int | None
) -> None:
    with open_tiny(tmp_path, hot=64, warm=64, write_through=False) as cache:
        cache.release(PatternEngine(cache).start(list(range(33))))
        wanted = 8 if count is None else count
        assert cache.evict(Tier.HOT, count) == wanted
        assert cache.stats().tiers[Tier.HOT].blocks == 8 - wanted
        assert cache.evict(Tier.HOT) == 8 - wanted
        assert cache.evict(Tier.HOT) == 0
        again = PatternEngine(cache).start(list(range(33)))
        assert again.num_cached_tokens == 32, "they were written before they went"
        assert cache.evict(Tier.HOT) == 0, "in use"
        cache.release(again)
        cache.check()


def test_a_block_in_use_ends_an_eviction_rather_than_hang_it(tmp_path: Path) -> None:
    with open_tiny(tmp_path, hot=64, warm=64, write_through=False) as cache:
        used = PatternEngine(cache).start(list(range(17)))
        cache.release(PatternEngine(cache).start(list(range(100, 117))))
        assert cache.evict(Tier.HOT) == 4
        cache.release(used)
        cache.check()


def test_shared_blocks_are_counted_as_they_come_and_go(tmp_path: Path) -> None:
    """Without counting: what is shared is known at once, however many sequences run."""
    with open_tiny(tmp_path, hot=64) as cache:
        engine = PatternEngine(cache)

        def shared() -> float:
            cache.check()  # compares with counting
            return cache.stats().avg_shared_blocks

        assert shared() == 0.0
        first = engine.start(list(range(17)))
        assert shared() == 0.0
        second = engine.start(list(range(17)))  # shares four blocks
        assert shared() == 4.0
        third = cache.fork(second)
        assert shared() == 4.0
        engine.decode(third, list(range(8)))
        assert shared() == 4.0
        twin_a, twin_b = cache.acquire(OTHER), cache.acquire(OTHER)  # each computes the same two blocks
        for twin in (twin_a, twin_b):
            engine.compute(twin, 0)
        assert shared() == 12 / 5
        for twin in (twin_a, twin_b):
            cache.commit(twin, 9)
        assert shared() == 16 / 5
        running = [first, second, third, twin_a, twin_b]
        cache.defragment(running)
        assert shared() == 16 / 5
        for sequence, left in zip(running, [12 / 4, 4 / 3, 4 / 2, 0.0, 0.0], strict=True):
            cache.release(sequence)
            assert shared() == left
