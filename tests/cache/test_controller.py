"""A budget holds at once, offloading makes room ahead of need, and moving blocks together changes no byte."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pattern_engine import PatternEngine, tiny_layout

from tierkv.block import Tier
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.controller import MemoryController
from tierkv.defragment import _moves
from tierkv.errors import CapacityError, ConfigError
from tierkv.namespace import Namespace
from tierkv.slots import SlotPool

BLOCK_BYTES = tiny_layout().block_bytes


def open_cache(path: Path | None = None, *, hot: int = 16) -> TierCache:
    config = CacheConfig(
        cold_path=path / "store" if path else None,
        block_size=4,
        hot_bytes=hot * BLOCK_BYTES,
        warm_bytes=8 * BLOCK_BYTES,
        cold_bytes=16 << 20,
        min_free_bytes=0,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout()), device=device)


def prompt(number: int, num_blocks: int = 3) -> list[int]:
    return [number] * (4 * num_blocks) + [99]


def test_a_budget_takes_effect_at_once_and_can_be_raised_again(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        engine, controller = PatternEngine(cache), MemoryController(cache)
        for number in range(4):
            cache.release(engine.start(prompt(number)))
        assert cache.stats().tiers[Tier.HOT].blocks == 12
        assert controller.set_memory_budget(5 * BLOCK_BYTES + 1) == 0
        assert cache.stats().tiers[Tier.HOT].blocks <= 5
        assert controller.get_memory_stats()["memory_budget"] == 5 * BLOCK_BYTES + 1
        with pytest.raises(CapacityError):
            cache.acquire(prompt(9, 6))
        for number in range(4):
            cache.release(engine.start(prompt(number)))  # checks every byte, wherever it comes from
            assert cache.stats().tiers[Tier.HOT].blocks <= 5
        controller.set_memory_budget(1 << 40)
        cache.release(engine.start(prompt(9, 6)))
        cache.check()


def test_blocks_in_use_outlive_a_smaller_budget_until_their_sequence_ends(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        engine, controller = PatternEngine(cache), MemoryController(cache)
        sequence = engine.start(prompt(1, 6))
        assert controller.set_memory_budget(2 * BLOCK_BYTES) == 5 * BLOCK_BYTES
        engine.check(sequence)
        cache.release(sequence)
        cache.flush()
        controller.set_memory_budget(2 * BLOCK_BYTES)
        assert cache.stats().tiers[Tier.HOT].blocks <= 2
        cache.check()


def test_settings_made_before_there_is_a_cache_hold_once_there_is_one() -> None:
    controller = MemoryController()
    controller.set_memory_budget(4 * BLOCK_BYTES)
    controller.set_eviction_policy("adaptive_lru")
    controller.enable_cpu_offloading(offload_threshold=0.9, offload_ratio=0.2)
    with pytest.raises(ConfigError, match="attach"):
        controller.get_memory_stats()
    with open_cache() as cache:
        controller.attach(cache)
        with pytest.raises(CapacityError):
            cache.acquire(prompt(1, 8))
    with pytest.raises(ConfigError, match="threshold"):
        controller.enable_cpu_offloading(offload_threshold=1.5)


def test_offloading_makes_room_ahead_of_need_and_keeps_what_goes_below(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        engine, controller = PatternEngine(cache), MemoryController(cache)
        controller.enable_cpu_offloading(offload_threshold=0.5, offload_ratio=0.5)
        for number in range(5):
            cache.release(engine.start(prompt(number)))
            cache.flush()
        assert cache.stats().tiers[Tier.HOT].blocks <= 10
        assert all(cache.match(prompt(number)[:-1]).num_cached_tokens == 12 for number in range(5))
        cache.check()


@pytest.mark.parametrize("seed", range(6))
def test_moving_blocks_together_changes_no_byte_and_leaves_the_free_ones_in_one_run(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    with open_cache(tmp_path, hot=24) as cache:
        engine, controller = PatternEngine(cache), MemoryController(cache)
        running = []
        for _ in range(30):
            try:
                running.append(engine.start(prompt(dice.randrange(5), dice.randrange(1, 5)), tail=dice.random() < 0.3))
            except CapacityError:
                pass
            while len(running) > 3 or (running and dice.random() < 0.4):
                cache.release(running.pop(dice.randrange(len(running))))
            if dice.random() < 0.3:
                cache.evict(Tier.HOT, dice.randrange(1, 4))
            if dice.random() < 0.4:
                report = controller.optimize_memory_layout()
                assert report.fragmentation_after == 0.0
                for sequence in running:
                    engine.check(sequence)
                cache.check()
        for sequence in running:
            engine.decode(sequence, [1, 2, 3, 4, 5])
            engine.check(sequence)
            cache.release(sequence)
        cache.check()


@given(st.permutations(range(8)), st.integers(0, 8))
@settings(max_examples=200)
def test_copies_are_ordered_so_that_none_overwrites_what_is_still_to_be_read(places: list[int], count: int) -> None:
    targets = {old: new for old, new in zip(range(count), places, strict=False) if old != new}
    memory = [*range(8), None]
    for move in _moves(targets, 8):
        memory[move.target] = memory[move.source]
    assert all(memory[new] == old for old, new in targets.items())


def test_renamed_places_keep_their_owners_and_counts() -> None:
    pool: SlotPool[str] = SlotPool(6)
    pool.allocate(4)
    pool.own(3, "d")
    for slot in (0, 1):
        pool.unpin(slot)
    pool.rename({3: 0, 2: 1})
    pool.check()
    assert (pool.owners[0], pool.pins[0], pool.pins[1]) == ("d", 1, 1)
    assert pool.free_runs() == [4] and pool.allocate(1) == [2]
