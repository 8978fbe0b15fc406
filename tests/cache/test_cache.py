"""The facade, driven by an engine whose K and V are a pattern of the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, ConfigError
from tierkv.values.block import HashFunction, Tier, hash_block
from tierkv.values.namespace import Namespace

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
BLOCK_BYTES = tiny_layout().block_bytes
Open = Callable[..., TierCache]


@pytest.fixture(params=DEVICES)
def open_cache(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Return a function that opens a cache on one store; the one opened before is closed first."""
    opened: list[TierCache] = []

    def open_one(
        *,
        hot: int = 16,
        warm: int = 8,
        cold: bool = True,
        weights: str = "w",
        salt: str = "",
        hash_function: HashFunction = hash_block,
        clock: Callable[[], float] = time.monotonic,
        **options: Any,
    ) -> TierCache:
        if opened:
            opened[-1].close()
        config = CacheConfig(
            cold_path=tmp_path / "store" if cold else None,
            block_size=4,
            hot_bytes=hot * BLOCK_BYTES,
            warm_bytes=warm * BLOCK_BYTES,
            cold_bytes=64 << 20,
            min_free_bytes=0,
            **options,
        )
        namespace = Namespace(weights=weights, layout=tiny_layout(), salt=salt)
        cache = TierCache(config, namespace=namespace, device=request.param, hash_function=hash_function, clock=clock)
        opened.append(cache)
        return cache

    yield open_one
    for cache in opened:
        cache.close()


def ids(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def test_a_second_request_finds_the_first_ones_blocks_hot(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(12)))
    again = engine.start([*ids(12), 99])
    assert again.cached_tokens == {Tier.HOT: 12, Tier.WARM: 0, Tier.COLD: 0}
    cache.release(again)
    cache.check()


def test_one_token_is_always_left_to_compute(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(8)))
    again = cache.acquire(ids(8))
    assert again.num_cached_tokens == 7
    engine.check(again, 7)
    cache.release(again)
    cache.check()


def test_two_prompts_that_part_inside_a_block_share_every_token_before(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    first = engine.start([1, 2, 3, 4, 5, 6, 7, 8])
    second = engine.start([1, 2, 3, 4, 5, 6, 70, 80])
    assert second.num_cached_tokens == 6
    engine.check(first)
    engine.check(second)
    assert first.block_table[0] == second.block_table[0]
    assert first.block_table[1] != second.block_table[1]
    cache.release(first)
    cache.release(second)
    cache.check()


def test_a_stored_tail_shorter_than_a_block_is_a_hit(open_cache: Open) -> None:
    cache = open_cache()
    cache.release(PatternEngine(cache).start([7, 8, 9], partial_block=True))
    cache.flush()
    reopened = open_cache()
    engine = PatternEngine(reopened)
    found = engine.start([7, 8, 9, 10, 11])
    assert found.cached_tokens == {Tier.HOT: 0, Tier.WARM: 0, Tier.COLD: 3}
    reopened.release(found)
    reopened.check()


def test_another_process_finds_the_blocks_in_the_cold_tier(open_cache: Open) -> None:
    cache = open_cache()
    cache.release(PatternEngine(cache).start(ids(14), partial_block=True))
    reopened = open_cache()
    found = PatternEngine(reopened).start([*ids(14), 99])
    assert found.cached_tokens[Tier.COLD] == 14
    reopened.release(found)
    again = PatternEngine(reopened).start([*ids(14), 98])
    assert again.cached_tokens[Tier.HOT] == 12
    reopened.release(again)
    reopened.check()


def test_more_blocks_than_the_hot_pool_holds_pass_through_all_tiers(open_cache: Open) -> None:
    cache = open_cache(hot=4, warm=6)
    engine = PatternEngine(cache)
    prompts = [ids(12, start=100 * i) for i in range(10)]
    seen = dict.fromkeys(Tier, 0)
    for _ in range(2):
        for prompt in [*prompts, prompts[-1], prompts[-2]]:
            sequence = engine.start([*prompt, 7])
            for tier, tokens in sequence.cached_tokens.items():
                seen[tier] += tokens
            cache.release(sequence)
            cache.check()
    assert all(seen.values()), f"a tier was never used: {seen}"
    stats = cache.stats()
    assert stats.tiers[Tier.HOT].evictions and stats.tiers[Tier.WARM].evictions
    assert stats.eviction_count == sum(tier.evictions for tier in stats.tiers.values())


@pytest.mark.parametrize("write_through", [True, False])
def test_what_leaves_the_hot_pool_is_found_below(open_cache: Open, write_through: bool) -> None:
    cache = open_cache(hot=4, warm=4, write_through=write_through)
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(12)))
    cache.release(engine.start(ids(16, start=50)))
    found = engine.start([*ids(12), 1])
    assert found.num_cached_tokens == 12 and found.cached_tokens[Tier.HOT] < 12
    cache.release(found)
    cache.check()


def test_without_a_store_the_warm_tier_still_serves(open_cache: Open) -> None:
    cache = open_cache(hot=4, warm=8, cold=False)
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(12)))
    cache.release(engine.start(ids(16, start=50)))
    found = engine.start([*ids(12), 1])
    assert found.cached_tokens[Tier.WARM] > 0
    cache.release(found)
    cache.check()


def test_a_full_hot_pool_refuses_and_takes_nothing(open_cache: Open) -> None:
    cache = open_cache(hot=4)
    engine = PatternEngine(cache)
    first = engine.start(ids(12))
    with pytest.raises(CapacityError, match="hot_bytes"):
        cache.acquire([*ids(12), *ids(12, start=50)])
    engine.check(first)
    cache.release(first)
    cache.check()
    cache.release(engine.start(ids(16, start=50)))


def test_a_pinned_prompt_survives_whatever_else_comes(open_cache: Open) -> None:
    cache = open_cache(hot=6, warm=8)
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(8)))
    assert cache.pin(ids(8)) == 2
    for i in range(1, 12):
        cache.release(engine.start(ids(16, start=100 * i)))
    assert cache.match(ids(8)).tokens[Tier.HOT] == 8
    cache.unpin(ids(8))
    for i in range(1, 12):
        cache.release(engine.start(ids(16, start=1000 + 100 * i)))
    assert cache.match(ids(8)).tokens[Tier.HOT] == 0
    cache.check()


def test_a_pin_with_a_time_to_live_ends(open_cache: Open) -> None:
    now = [100.0]
    cache = open_cache(hot=6, warm=8, clock=lambda: now[0])
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(8)))
    assert cache.pin(ids(8), ttl_s=30) == 2
    for i in range(1, 12):
        cache.release(engine.start(ids(16, start=100 * i)))
    assert cache.match(ids(8)).tokens[Tier.HOT] == 8
    now[0] += 31
    for i in range(1, 12):
        cache.release(engine.start(ids(16, start=1000 + 100 * i)))
    assert cache.match(ids(8)).tokens[Tier.HOT] == 0
    for wrong in (-1, float("nan"), True, "1"):
        with pytest.raises(ConfigError):
            cache.pin(ids(8), ttl_s=wrong)  # type: ignore[arg-type]
    cache.check()


def test_a_pin_for_good_replaces_one_with_a_time_to_live(open_cache: Open) -> None:
    now = [100.0]
    cache = open_cache(hot=6, warm=8, clock=lambda: now[0])
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(8)))
    assert cache.pin(ids(8), ttl_s=30) == cache.pin(ids(8)) == 2
    now[0] += 31
    for i in range(1, 12):
        cache.release(engine.start(ids(16, start=100 * i)))
    assert cache.match(ids(8)).tokens[Tier.HOT] == 8


def test_forked_sequences_share_whole_blocks_and_part_ways(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    first = engine.start(ids(6))
    second = cache.fork(first)
    engine.decode(first, [50, 51, 52])
    engine.decode(second, [60, 61, 62])
    engine.check(first)
    engine.check(second)
    assert first.block_table[0] == second.block_table[0]
    assert cache.stats().avg_shared_blocks == 1
    for sequence in (first, second):
        cache.release(sequence)
    cache.check()


def test_two_sequences_that_compute_the_same_block_end_up_sharing_it(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    first, second = cache.acquire(ids(8)), cache.acquire(ids(8))
    for sequence in (first, second):
        engine.compute(sequence, 0)
        cache.commit(sequence, 8)
    assert first.block_table == second.block_table
    for sequence in (first, second):
        engine.check(sequence)
        cache.release(sequence)
    cache.check()


def cut_to_8_bits(parent: bytes, tokens: bytes) -> bytes:
    return hash_block(parent, tokens)[:1] * 16


def test_forced_hash_collisions_cost_misses_and_never_a_wrong_block(open_cache: Open) -> None:
    for round_number in range(2):
        cache = open_cache(hot=12, warm=8, hash_function=cut_to_8_bits)
        engine = PatternEngine(cache)
        for i in range(300):
            start = i % 150
            sequence = engine.start([start, start + 1, start % 7, start * 3, start, i % 5, 1, 2, 3], partial_block=True)
            engine.check(sequence)
            cache.release(sequence)
        cache.check()
        assert cache.stats().collisions > 0
        assert cache.stats().hits > 0, f"nothing was ever reused in round {round_number}"


@pytest.mark.parametrize("other", [{"weights": "x"}, {"salt": "tenant"}])
def test_another_model_or_salt_on_the_same_store_finds_nothing(open_cache: Open, other: dict[str, str]) -> None:
    cache = open_cache()
    cache.release(PatternEngine(cache).start(ids(14), partial_block=True))
    assert open_cache(**other).match(ids(14)).num_cached_tokens == 0
    assert open_cache().match(ids(14)).num_cached_tokens == 14


def test_an_uncached_request_neither_finds_nor_leaves_anything(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    cache.release(engine.start(ids(8)))
    plain = cache.acquire(ids(8), reuse=False)
    assert plain.num_cached_tokens == 0
    engine.compute(plain, 0)
    assert cache.commit(plain, 8, partial_block=True) == 0
    cache.release(plain)
    cache.check()


def test_committing_what_is_cached_already_stores_nothing_new(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    sequence = engine.start(ids(10), partial_block=True)
    assert cache.commit(sequence, 10, partial_block=True) in (0, 1)
    cache.release(sequence)
    cache.flush()
    blocks = cache.stats().tiers[Tier.COLD].blocks
    cache.release(engine.start(ids(10), partial_block=True))
    cache.flush()
    assert cache.stats().tiers[Tier.COLD].blocks == blocks == 3


@pytest.mark.parametrize("bad", [[], [-1], [1.5]])
def test_what_is_no_prompt_is_refused(open_cache: Open, bad: list[Any]) -> None:
    with pytest.raises(ConfigError):
        open_cache(cold=False).acquire(bad)


def test_two_block_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="block_size is 8"):
        TierCache(CacheConfig(block_size=8), namespace=Namespace(weights="w", layout=tiny_layout()))


def test_closing_twice_is_harmless(open_cache: Open) -> None:
    cache = open_cache()
    cache.close()
    cache.close()
