"""What observers are told of a real cache agrees with what the cache counts itself."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from pattern_engine import PatternEngine, tiny_layout, tiny_warm

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.profiling.advice import suggest
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.profiling.tracker import MemoryTracker
from tierkv.transfer.recompute_or_load import LoadKind
from tierkv.values.block import Tier
from tierkv.values.events import EventKind
from tierkv.values.namespace import Namespace

LAYOUT = tiny_layout()


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TierCache]:
    """Return a cache of 8 hot and 6 warm blocks of 4 tokens over a store."""
    config = CacheConfig(
        cold_path=tmp_path / "store",
        block_size=4,
        hot_bytes=8 * LAYOUT.block_bytes,
        warm_bytes=6 * LAYOUT.block_bytes,
        cold_bytes=64 << 20,
        min_free_bytes=0,
    )
    with TierCache(config, namespace=Namespace(weights="w", layout=LAYOUT)) as opened:
        yield opened


def serve(cache: TierCache, rounds: int = 3) -> None:
    """Ask for five prompts that do not fit together, again and again."""
    engine = PatternEngine(cache)
    for _ in range(rounds):
        for start in range(0, 500, 100):
            cache.release(engine.start([*range(start, start + 13)]))
            cache.flush()


def test_the_tracker_knows_each_pool_and_counts_its_bytes_once(cache: TierCache) -> None:
    tracker = MemoryTracker()
    tracker.observe(cache)
    pools = {each.purpose: each for each in tracker.list_allocations()}
    assert set(pools) == {"hot pool", "scratch block", "warm pool", "write thread's slots"}
    assert pools["hot pool"].tensor_ptr == cache.hot.blocks.data_ptr()
    assert pools["hot pool"].size_bytes == 9 * LAYOUT.block_bytes
    assert tracker.total_allocated == pools["hot pool"].size_bytes + pools["warm pool"].size_bytes


def test_the_tracker_holds_exactly_the_blocks_that_the_cache_holds(cache: TierCache) -> None:
    tracker = MemoryTracker()
    tracker.observe(cache)
    serve(cache)
    by_purpose = tracker.get_allocation_summary()["by_purpose"]
    stats = cache.stats()
    assert by_purpose["hot block"]["count"] == stats.tiers[Tier.HOT].blocks
    assert by_purpose["warm block"]["count"] == stats.tiers[Tier.WARM].blocks - 1  # the write thread's slot holds none
    cache.check()


def test_a_block_lies_where_the_tracker_says(cache: TierCache) -> None:
    tracker = MemoryTracker()
    tracker.observe(cache)
    engine = PatternEngine(cache)
    sequence = engine.start([1, 2, 3, 4, 5])
    address = cache.hot.blocks[sequence.block_table[0]].data_ptr()
    assert address in [each.tensor_ptr for each in tracker.list_allocations() if each.purpose == "hot block"]
    cache.release(sequence)


def test_events_add_up_to_the_counters_of_the_cache(cache: TierCache) -> None:
    tracker = MemoryTracker(history_size=100_000)
    tracker.observe(cache)
    serve(cache)
    kinds = Counter((event.kind, event.tier) for event in tracker.allocation_history)
    stats = cache.stats()
    for tier in (Tier.HOT, Tier.WARM):
        assert kinds[EventKind.EVICT, tier] == stats.tiers[tier].evictions > 0
    for tier in Tier:
        assert kinds[EventKind.HIT, tier] == stats.tiers[tier].hits
    assert kinds[EventKind.MISS, None] == stats.misses
    assert kinds[EventKind.DEMOTE, Tier.COLD] == stats.tiers[Tier.COLD].blocks


def test_a_tracker_that_comes_later_knows_what_is_there_already(cache: TierCache) -> None:
    serve(cache)
    tracker = MemoryTracker()
    tracker.observe(cache)
    assert tracker.get_allocation_summary()["by_purpose"]["hot block"]["count"] == cache.stats().tiers[Tier.HOT].blocks


def test_a_tracker_that_stopped_observing_records_nothing(cache: TierCache) -> None:
    tracker = MemoryTracker()
    tracker.observe(cache)
    serve(cache, 1)
    tracker.stop_observing(cache)
    seen = len(tracker.allocation_history)
    serve(cache, 1)
    assert len(tracker.allocation_history) == seen
    assert tracker.list_allocations() == [] and tracker.total_allocated == 0


def test_a_profile_agrees_with_the_counters_of_the_cache(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    with MemoryProfiler(cache, snapshot_every_s=0.0, sample_every=1) as profiler:
        for _ in range(3):
            for start in range(0, 500, 100):
                with profiler.iteration():
                    cache.release(engine.start([*range(start, start + 13)]))
                    cache.flush()
    run = profiler.generate_report().run
    stats = cache.stats()
    assert run.measured.requests == 15 and len(run.iterations) == 15
    assert sum(each.prompt_tokens for each in run.iterations) == stats.prompt_tokens == 15 * 13
    assert sum(sum(each.hit_tokens.values()) for each in run.iterations) == stats.hit_tokens
    assert sum(share.total for share in run.token_shares()) == stats.prompt_tokens
    hot = run.measured.eviction_summary(Tier.HOT)
    assert hot.count == stats.tiers[Tier.HOT].evictions and hot.asked_again > 0 and hot.lost == 0
    assert {"acquire", "read cold", "promote", "demote", "store cold"} <= {span.name for span in run.spans}


def test_a_hot_pool_of_the_suggested_size_has_the_promised_hits(tmp_path: Path) -> None:
    def run(hot_blocks: int) -> tuple[int, MemoryProfiler]:
        config = CacheConfig(
            block_size=4, hot_bytes=hot_blocks * LAYOUT.block_bytes, warm_bytes=64 * LAYOUT.block_bytes
        )
        with TierCache(config, namespace=Namespace(weights="w", layout=LAYOUT)) as opened:
            profiler = MemoryProfiler(opened)
            serve(opened)
            hits = opened.stats().tiers[Tier.HOT].hits
            profiler.close()
        return hits, profiler

    hits, profiler = run(8)
    found = suggest(profiler.generate_report().run.measured, least_requests=1)
    (suggestion,) = [each for each in found if each.setting == "hot_bytes"]
    blocks = int(suggestion.proposed.split("(")[1].split()[0])
    promised = int(suggestion.effect.split()[0])
    more, _ = run(blocks)
    assert promised > 0 and more - hits >= promised


def test_the_trace_of_a_run_parses_and_its_spans_nest(cache: TierCache, tmp_path: Path) -> None:
    profiler = MemoryProfiler(cache)
    for _ in range(2):
        profiler.start_iteration()
        serve(cache, 1)
        profiler.end_iteration()
    path = profiler.generate_report().export_trace(tmp_path / "trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["name"] for event in spans} >= {"iteration 1", "iteration 2", "acquire", "read cold", "store cold"}
    for thread in {event["tid"] for event in spans}:
        assert_nested([event for event in spans if event["tid"] == thread])
    acquired = next(event for event in spans if event["name"] == "acquire")
    outer = next(event for event in spans if event["name"] == "iteration 1")
    assert acquired["tid"] == outer["tid"] and outer["ts"] <= acquired["ts"]
    assert {"C", "i", "M"} <= {event["ph"] for event in events}


def assert_nested(spans: list[dict[str, float]]) -> None:
    """Raise AssertionError if two spans of one thread overlap without one containing the other."""
    open_until: list[int] = []
    for span in sorted(spans, key=lambda each: (each["ts"], -each["dur"])):
        start = round(span["ts"] * 1000)
        end = start + round(span["dur"] * 1000)
        while open_until and open_until[-1] <= start:
            open_until.pop()
        assert not open_until or end <= open_until[-1], span
        open_until.append(end)


def test_spans_that_overlap_are_found() -> None:
    with pytest.raises(AssertionError):
        assert_nested([{"ts": 0, "dur": 5}, {"ts": 3, "dur": 5}])


def test_a_request_that_computes_while_it_loads_is_recorded_in_two_parts(tmp_path: Path) -> None:
    prompt = [*range(4 * 16), 7]
    config = CacheConfig(
        cold_path=tmp_path / "store",
        block_size=4,
        hot_bytes=40 * LAYOUT.block_bytes,
        warm_bytes=40 * LAYOUT.block_bytes,
        cold_bytes=64 << 20,
        min_free_bytes=0,
        piece_tokens=4,
    )
    namespace = Namespace(weights="w", layout=LAYOUT)
    with TierCache(config, namespace=namespace) as first:
        first.release(PatternEngine(first).start(prompt))
    with TierCache(config, namespace=namespace) as second, MemoryProfiler(second) as profiler:
        for in_memory in (True, False):
            assert second._acquirer._choice
            second._acquirer._choice.load_costs[LoadKind(in_memory)].add(1, 1e-3)  # as long as to compute a block
        with profiler.iteration():
            sequence = PatternEngine(second).start(prompt, overlap=True)
            second.release(sequence)
        stats = second.stats()
    (iteration,) = profiler.iterations
    assert (iteration.requests, iteration.prompt_tokens) == (1, len(prompt))
    assert iteration.hits[Tier.COLD] == stats.tiers[Tier.COLD].hits
    assert iteration.misses == stats.misses and iteration.misses + iteration.hits[Tier.COLD] == 17
    run = profiler.generate_report().run
    assert "load in the background" in {span.name for span in run.spans}
    assert list(run.measured.distances) == [None] * 16  # nothing was asked for twice; the last one has no hash
    assert sum(use.hits for use in run.prefixes) == stats.tiers[Tier.COLD].hits
    assert stats.tiers[Tier.COLD].bytes_out == stats.tiers[Tier.COLD].hits * LAYOUT.block_bytes


def test_a_compressed_warm_tier_has_its_staging_pool_tracked() -> None:
    layout, warm_bytes = tiny_warm(8, "windows")
    config = CacheConfig(
        block_size=4, hot_bytes=8 * layout.block_bytes, warm_bytes=warm_bytes, warm_codec="windows", min_free_bytes=0
    )
    with TierCache(config, namespace=Namespace(weights="w", layout=layout)) as cache:
        tracker = MemoryTracker()
        tracker.observe(cache)
        serve(cache, 1)
        purposes = tracker.get_allocation_summary()["by_purpose"]
        assert purposes["staging pool"]["bytes"] >= 2 * layout.block_bytes
        warm = next(each for each in tracker.list_allocations() if each.purpose == "warm block")
        held = cache.stats().tiers[Tier.WARM]
        assert warm.size_bytes == held.stored_bytes // held.blocks
