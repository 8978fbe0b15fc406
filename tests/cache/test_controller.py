"""What a controller promises: budgets hold, offloading runs ahead of need, settings may come before the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pattern_engine import PatternEngine, tiny_layout

from tierkv import MemoryController
from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, ConfigError
from tierkv.policies import LFUPolicy, LRUPolicy
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

BLOCK_BYTES = tiny_layout().block_bytes
Open = Callable[..., TierCache]


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[Open]:
    opened: list[TierCache] = []

    def open_one(hot: int = 16, warm: int = 32, *, cold: bool = False, write_through: bool = True) -> TierCache:
        config = CacheConfig(
            cold_path=tmp_path / "store" if cold else None,
            block_size=4,
            hot_bytes=hot * BLOCK_BYTES,
            warm_bytes=warm * BLOCK_BYTES,
            cold_bytes=64 << 20,
            min_free_bytes=0,
            write_through=write_through,
        )
        opened.append(TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout())))
        return opened[-1]

    yield open_one
    for cache in opened:
        cache.close()


def prompt(number: int, num_blocks: int) -> list[int]:
    """Return a prompt of whole blocks that begins as no other one does."""
    return [1000 * number + at for at in range(4 * num_blocks)]


def fill(engine: PatternEngine, *, num_prompts: int, num_blocks: int) -> None:
    for number in range(num_prompts):
        engine.cache.release(engine.start(prompt(number, num_blocks)))
        engine.cache.flush()


def hot_blocks(cache: TierCache) -> int:
    return cache.stats().tiers[Tier.HOT].blocks


# --- Budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_through", [True, False])
def test_a_smaller_budget_demotes_at_once_and_nothing_is_lost(open_cache: Open, write_through: bool) -> None:
    cache = open_cache(write_through=write_through)
    engine = PatternEngine(cache)
    fill(engine, num_prompts=4, num_blocks=4)
    assert hot_blocks(cache) == 16
    assert MemoryController(cache).set_memory_budget(6 * BLOCK_BYTES + 1) == 0
    assert hot_blocks(cache) == 6
    for number in range(4):
        sequence = engine.start([*prompt(number, 4), 7])  # checks every cached byte
        assert sequence.num_cached_tokens == 16
        cache.release(sequence)
        cache.flush()
        assert hot_blocks(cache) <= 6
    cache.check()


@pytest.mark.parametrize("write_through", [True, False])
def test_blocks_in_use_stay_over_the_budget_are_counted_and_go_when_released(
    open_cache: Open, write_through: bool
) -> None:
    cache = open_cache(write_through=write_through)
    engine = PatternEngine(cache)
    controller = MemoryController(cache)
    running = engine.start(prompt(1, 8))
    assert controller.set_memory_budget(3 * BLOCK_BYTES) == 5
    stats = controller.get_memory_stats()
    assert (stats["over_budget_blocks"], stats["over_budget_bytes"]) == (5, 5 * BLOCK_BYTES)
    engine.check(running)
    with pytest.raises(CapacityError, match="memory budget"):
        cache.append(running, [1] * 4)
    cache.release(running)
    cache.flush()
    assert hot_blocks(cache) <= 3
    assert controller.get_memory_stats()["over_budget_blocks"] == 0
    cache.check()


def test_a_pinned_block_stays_over_the_budget(open_cache: Open) -> None:
    cache = open_cache()
    fill(PatternEngine(cache), num_prompts=1, num_blocks=4)
    cache.pin(prompt(0, 4))
    assert MemoryController(cache).set_memory_budget(BLOCK_BYTES) == 3
    cache.unpin(prompt(0, 4))
    cache.check()


def test_a_budget_grows_again_up_to_the_pool(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    controller = MemoryController(cache)
    controller.set_memory_budget(2 * BLOCK_BYTES)
    with pytest.raises(CapacityError):
        engine.start(prompt(1, 3))
    controller.set_memory_budget(8 << 30)
    assert controller.get_memory_stats()["budget_bytes"] == 16 * BLOCK_BYTES
    cache.release(engine.start(prompt(1, 16)))
    cache.check()


@pytest.mark.parametrize("num_bytes", [0, -1, BLOCK_BYTES - 1])
def test_a_budget_below_one_block_is_refused(open_cache: Open, num_bytes: int) -> None:
    cache = open_cache()
    controller = MemoryController(cache)
    with pytest.raises(ConfigError):
        controller.set_memory_budget(num_bytes)
    assert cache.blocks.limit == 16


# --- Offloading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_through", [True, False])
def test_a_pool_fuller_than_the_threshold_evicts_a_share_of_the_unused_blocks(
    open_cache: Open, write_through: bool
) -> None:
    cache = open_cache(write_through=write_through)
    engine = PatternEngine(cache)
    MemoryController(cache).enable_cpu_offloading(offload_threshold=0.5, offload_ratio=0.5)
    fill(engine, num_prompts=2, num_blocks=4)
    assert hot_blocks(cache) == 8  # as full as it may be
    cache.release(engine.start(prompt(2, 4)))
    cache.flush()
    assert hot_blocks(cache) <= 8
    for number in range(3):
        sequence = engine.start([*prompt(number, 4), 7])
        assert sequence.num_cached_tokens == 16
        cache.release(sequence)
    cache.check()


def test_offloading_begins_as_soon_as_it_is_enabled_and_ends_when_disabled(open_cache: Open) -> None:
    cache = open_cache()
    controller = MemoryController(cache)
    fill(PatternEngine(cache), num_prompts=4, num_blocks=4)
    controller.enable_cpu_offloading(offload_threshold=0.9, offload_ratio=0.25)
    cache.flush()
    assert hot_blocks(cache) == 12
    controller.disable_cpu_offloading()
    cache.release(PatternEngine(cache).start(prompt(9, 4)))
    cache.flush()
    assert hot_blocks(cache) == 16


def test_what_no_lower_tier_could_take_is_not_offloaded(open_cache: Open) -> None:
    cache = open_cache(warm=4)
    engine = PatternEngine(cache)
    fill(engine, num_prompts=1, num_blocks=3)
    cache.pin(prompt(0, 3))  # the write thread has the fourth warm slot: no other block gets one
    cache.release(engine.start(prompt(1, 8)))
    cache.flush()
    MemoryController(cache).enable_cpu_offloading(offload_threshold=0.1, offload_ratio=1.0)
    cache.flush()
    assert hot_blocks(cache) == 11
    assert cache.stats().tiers[Tier.HOT].evictions == 0
    cache.check()


@pytest.mark.parametrize("wrong", [{"offload_threshold": 0.0}, {"offload_ratio": 1.5}])
def test_shares_that_are_none_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MemoryController().enable_cpu_offloading(**wrong)


# --- Attaching, policies, figures ------------------------------------------------------------------------


def test_settings_made_before_the_cache_is_known_hold_from_then_on(open_cache: Open) -> None:
    cache = open_cache()
    controller = MemoryController()
    controller.set_memory_budget(5 * BLOCK_BYTES)
    controller.set_eviction_policy("lfu")
    controller.enable_cpu_offloading(0.5, 0.5)
    fill(PatternEngine(cache), num_prompts=4, num_blocks=4)
    controller.attach(cache)
    cache.flush()
    assert cache.blocks.limit == 5
    assert isinstance(cache._tiers.index.policy, LFUPolicy)
    assert hot_blocks(cache) <= 4
    cache.check()


def test_a_controller_has_one_cache(open_cache: Open) -> None:
    controller = MemoryController(open_cache())
    with pytest.raises(ConfigError, match="has a cache already"):
        controller.attach(open_cache())


@pytest.mark.parametrize(
    "use",
    [
        lambda controller: controller.get_memory_stats(),
        lambda controller: controller.manual_cache_management(evict_blocks=[1]),
        lambda controller: controller.optimize_memory_layout(),
        lambda controller: controller.profile().__enter__(),
    ],
    ids=["stats", "manual", "optimize", "profile"],
)
def test_without_a_cache_there_is_nothing_to_see_or_to_do(use: Callable[[MemoryController], object]) -> None:
    with pytest.raises(ConfigError, match="has no cache"):
        use(MemoryController())


def test_a_policy_is_chosen_by_name_or_given(open_cache: Open) -> None:
    cache = open_cache()
    controller = MemoryController(cache)
    mine = LRUPolicy()
    controller.set_eviction_policy(mine)
    assert cache._tiers.index.policy is mine
    with pytest.raises(ConfigError, match="no eviction policy"):
        controller.set_eviction_policy("oracle")
    assert cache._tiers.index.policy is mine


def test_figures_are_those_of_the_cache(open_cache: Open) -> None:
    cache = open_cache(cold=True)
    engine = PatternEngine(cache)
    controller = MemoryController(cache)
    fill(engine, num_prompts=3, num_blocks=4)
    cache.evict(Tier.HOT)
    cache.release(engine.start([*prompt(0, 4), 1]))
    stats = controller.get_memory_stats()
    asked = 3 * 4 + 5
    assert stats["cache_hit_rate"] == cache.stats().hit_rate == 4 / asked
    assert stats["tiers"]["warm"]["hit_rate"] == 4 / asked
    assert set(stats["tiers"]) == {"hot", "warm", "cold"}
    assert stats["used_bytes"] == stats["tiers"]["hot"]["used_bytes"] == hot_blocks(cache) * BLOCK_BYTES
    assert stats["peak_blocks"] == 12 and stats["peak_bytes"] == 12 * BLOCK_BYTES
    assert 0 <= stats["fragmentation"] < 1


def test_manual_management_says_what_became_of_each_block(open_cache: Open) -> None:
    cache = open_cache()
    fill(PatternEngine(cache), num_prompts=3, num_blocks=1)
    report = MemoryController(cache).manual_cache_management(evict_blocks=[0, 9], pin_blocks=[1], offload_blocks=[2])
    assert (report.evicted, report.pinned, report.offloaded) == ((0,), (1,), (2,))
    assert set(report.refused) == {9}


def test_with_a_cache_alone_running_sequences_stay_where_they_are(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    fill(engine, num_prompts=2, num_blocks=2)
    running = engine.start(prompt(5, 2))
    cache.evict(Tier.HOT, 1)
    table = list(running.block_table)
    MemoryController(cache).optimize_memory_layout()
    assert running.block_table == table
    engine.check(running)
    cache.check()


def test_profiling_observes_the_cache_until_the_block_ends(open_cache: Open) -> None:
    cache = open_cache()
    engine = PatternEngine(cache)
    controller = MemoryController(cache)
    with controller.profile() as profiler:
        fill(engine, num_prompts=2, num_blocks=2)
    num_snapshots = len(profiler.snapshots)
    fill(engine, num_prompts=2, num_blocks=2)
    assert len(profiler.snapshots) == num_snapshots
    assert profiler.snapshots[-1].stats.requests - profiler.snapshots[0].stats.requests == 2
