"""`evict_everywhere`: what is evicted on demand is served by no tier."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from pattern_engine import PatternEngine, open_tiny

from tierkv.cache import TierCache
from tierkv.errors import ConfigError, StoreError
from tierkv.index.chosen_eviction import CONTINUED, PINNED
from tierkv.values.block import Tier

SYSTEM = list(range(8))
FIRST, SECOND = [*SYSTEM, *range(20, 29)], [*SYSTEM, *range(40, 49)]
OTHER = list(range(100, 113))


def cached(cache: TierCache, prompt: list[int]) -> int:
    return cache.match(prompt).num_cached_tokens


def fill(cache: TierCache, *prompts: list[int], partial_block: bool = False) -> PatternEngine:
    engine = PatternEngine(cache)
    for prompt in prompts:
        cache.release(engine.start(prompt, partial_block=partial_block))
    cache.flush()
    return engine


def test_a_prompt_goes_from_all_tiers_and_what_others_continue_stays(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        fill(cache, FIRST, SECOND, OTHER, partial_block=True)
        assert cached(cache, FIRST) == len(FIRST)
        report = cache.evict_everywhere(FIRST)
        assert report.blocks == {Tier.HOT: 2, Tier.WARM: 3, Tier.COLD: 3}
        assert set(report.stayed) == {"stored, continued by others that stay", f"in memory, {CONTINUED}"}
        assert cached(cache, FIRST) == len(SYSTEM)
        assert cached(cache, SECOND) == len(SECOND) and cached(cache, OTHER) == len(OTHER)
        assert cache.evict_everywhere(SECOND).num_blocks == 4 + 5 + 5, "nothing else continues the system prompt now"
        assert cached(cache, FIRST) == 0
        cache.check()
    with open_tiny(tmp_path) as cache:
        assert cached(cache, FIRST) == cached(cache, SECOND) == 0 and cached(cache, OTHER) == len(OTHER)


def test_a_system_prompt_goes_with_all_that_continues_it(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        fill(cache, FIRST, SECOND, OTHER, partial_block=True)
        report = cache.evict_everywhere(SYSTEM[:6])
        assert not report.stayed
        assert cached(cache, FIRST) == cached(cache, SECOND) == 0 and cached(cache, OTHER) == len(OTHER)
        cache.check()


def test_a_whole_namespace_goes_without_a_store_too(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16, cold_path=None) as cache:
        empty = cache.stats().tiers[Tier.WARM].blocks
        fill(cache, FIRST, OTHER)
        assert cache.evict_everywhere().num_blocks > 0
        assert cached(cache, FIRST) == cached(cache, OTHER) == 0
        assert cache.stats().tiers[Tier.WARM].blocks == empty
        cache.check()


def test_what_was_used_not_long_ago_stays(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        fill(cache, FIRST)
        assert cache.evict_everywhere(older_than_s=3600).num_blocks == 0
        assert cache.evict_everywhere(older_than_s=0).num_blocks == 4 * 3
        with pytest.raises(ConfigError):
            cache.evict_everywhere(older_than_s=float("nan"))
        with pytest.raises(ConfigError):
            cache.evict_everywhere([])


def test_a_pinned_prompt_stays_and_is_told(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        fill(cache, FIRST, OTHER)
        cache.pin(FIRST)
        report = cache.evict_everywhere()
        assert report.stayed == {"stored, pinned": 4, f"in memory, {PINNED}": 4}
        assert cached(cache, FIRST) == 16 and cached(cache, OTHER) == 0


def test_what_a_sequence_uses_serves_no_other_and_goes_with_it(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        engine = PatternEngine(cache)
        running = engine.start(FIRST)
        cache.flush()
        report = cache.evict_everywhere(SYSTEM)
        assert report.stayed["in memory, in use"] == 4
        assert cached(cache, FIRST) == 0, "it serves nobody else"
        engine.check(running, len(FIRST))
        engine.decode(running, [1, 2, 3, 4])
        cache.release(running)
        cache.flush()
        assert cached(cache, FIRST) == 0 and cache.stats().tiers[Tier.HOT].blocks == 0
        cache.check()
    with open_tiny(tmp_path) as cache:
        assert cached(cache, FIRST) == 0, "what it computed afterwards has no parent in the store"


def test_who_computes_an_evicted_prompt_anew_keeps_it(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        engine = PatternEngine(cache)
        running = engine.start(FIRST)
        cache.flush()
        cache.evict_everywhere(SYSTEM)
        again = engine.start(FIRST)
        assert again.num_cached_tokens == 0
        for sequence in (running, again):
            cache.release(sequence)
        assert cached(cache, FIRST) == 16
        cache.check()


def test_what_is_queued_to_be_written_is_not_written_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        engine = PatternEngine(cache)
        writer, begin, go_on, is_in = cache._offloader.writer, cache._offloader.writer.begin, threading.Event(), []

        def begin_late(jobs: object) -> object:
            is_in.append(True)
            go_on.wait(10)
            return begin(jobs)  # type: ignore[arg-type]

        monkeypatch.setattr(writer, "begin", begin_late)
        cache.release(engine.start(OTHER))
        while not is_in:
            pass
        cache.release(engine.start(FIRST, partial_block=True))  # behind what is in work
        evicting = threading.Thread(target=cache.evict_everywhere, args=(SYSTEM,))
        evicting.start()
        while not cache._tiers.chosen.marked:
            pass
        go_on.set()
        evicting.join(10)
        cache.flush()
        assert cached(cache, FIRST) == 0 and cached(cache, OTHER) == 12
        assert cache.cold and cache.cold.stats().blocks == 3
        assert cache.stats().skip_reasons["evicted"] == 5
        cache.check()


def test_a_write_that_hangs_is_told_and_memory_is_evicted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_tiny(tmp_path, warm=16, write_wait_s=0.2) as cache:
        engine = fill(cache, FIRST)
        writer, begin, go_on = cache._offloader.writer, cache._offloader.writer.begin, threading.Event()
        monkeypatch.setattr(writer, "begin", lambda jobs: (go_on.wait(10), begin(jobs))[1])
        before = cache._offloader._queue._jobs
        cache.release(engine.start(OTHER))
        while before:
            pass
        with pytest.raises(StoreError, match="from memory alone"):
            cache.evict_everywhere()
        assert cache.match(FIRST).blocks[Tier.HOT] == 0
        go_on.set()


def test_loaded_state_files_are_told(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        fill(cache, FIRST)
        cache.save_cache_state(tmp_path / "s.tkv")
        cache.load_cache_state(tmp_path / "s.tkv")
        assert cache.evict_everywhere().stayed == {"blocks of loaded state files": 4}


def test_a_pinned_prompt_is_not_evicted_by_its_name_either(tmp_path: Path) -> None:
    with open_tiny(tmp_path, warm=16) as cache:
        fill(cache, FIRST, SECOND)
        cache.pin(FIRST)
        report = cache.evict_everywhere(FIRST)
        assert report.stayed == {"stored, pinned": 4, f"in memory, {PINNED}": 4} and not report.num_blocks
        assert cache.evict_everywhere(SYSTEM).num_blocks == 2 * 3, "what continues it and is not pinned"
    with open_tiny(tmp_path) as cache:
        assert cached(cache, FIRST) == 16 and cached(cache, SECOND) == len(SYSTEM)
