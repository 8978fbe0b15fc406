"""Announced prompts are in the warm tier when their requests come, and are in nobody's way until then."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from cold_blocks import damage_record
from pattern_engine import PatternEngine, tiny_warm

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import ClosedError
from tierkv.requests.prefetch import PrefetchHandle
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

PROMPT = list(range(22))  # five blocks of four, and two tokens


def open_cache(path: Path, *, warm: int = 16, warm_codec: str = "raw") -> TierCache:
    layout, warm_bytes = tiny_warm(warm, warm_codec)
    config = CacheConfig(
        cold_path=path / warm_codec,
        block_size=4,
        hot_bytes=32 * layout.block_bytes,
        warm_bytes=warm_bytes,
        warm_codec=warm_codec,
        cold_bytes=64 << 20,
        min_free_bytes=0,
        num_io_threads=2,
    )
    return TierCache(config, namespace=Namespace(weights="w", layout=layout))


def store(path: Path, prompt: list[int] = PROMPT, *, warm_codec: str = "raw") -> None:
    """Leave a prompt's blocks in the cold tier alone, and its partial block."""
    with open_cache(path, warm_codec=warm_codec) as cache:
        cache.release(PatternEngine(cache).start(prompt, partial_block=True))


@pytest.mark.parametrize("warm_codec", ["raw", "windows"])
def test_an_announced_prompt_is_warm_when_its_request_comes(tmp_path: Path, warm_codec: str) -> None:
    store(tmp_path, warm_codec=warm_codec)
    with open_cache(tmp_path, warm_codec=warm_codec) as cache:
        assert cache.match(PROMPT).tokens[Tier.COLD] == len(PROMPT)
        assert cache.prefetch(PROMPT).result() == 6
        assert cache.match(PROMPT).tokens[Tier.WARM] == len(PROMPT)
        assert cache.prefetch(PROMPT).result() == 0, "there is nothing more to bring"
        sequence = PatternEngine(cache).start([*PROMPT, 99])
        assert sequence.cached_tokens[Tier.WARM] == len(PROMPT)
        cache.release(sequence)
        stats = cache.stats()
        assert (stats.prefetched_blocks, stats.prefetch_misses, stats.tiers[Tier.COLD].hits) == (6, {}, 0)
        cache.check()


def test_a_damaged_block_ends_a_prefetch_and_is_counted_there(tmp_path: Path) -> None:
    store(tmp_path)
    with open_cache(tmp_path) as cache:
        assert cache.cold
        damage_record(cache.cold, cache.match(PROMPT).block_hashes[2])
        assert cache.prefetch(PROMPT).result() == 2
        cache.flush()
        stats = cache.stats()
        assert (stats.prefetch_misses, stats.misses) == ({"corrupt": 1}, 0)
        assert cache.match(PROMPT).num_cached_tokens == 8, "who is damaged is taken out of the store"
        cache.check()


def test_more_than_the_warm_tier_takes_does_not_push_out_what_came_first(tmp_path: Path) -> None:
    long = list(range(4 * 12))
    store(tmp_path, long)
    with open_cache(tmp_path, warm=8) as cache:
        assert cache.prefetch(long).result() == 4
        assert cache.match(long).tokens[Tier.WARM] == 16
        cache.check()


def test_a_warm_tier_full_of_blocks_in_use_takes_none(tmp_path: Path) -> None:
    store(tmp_path)
    with open_cache(tmp_path, warm=8) as cache:
        places = cache._tiers.take_raw(7)  # all but the write thread's own
        assert cache.prefetch(PROMPT).result() == 0
        assert cache.stats().prefetch_misses == {"no_room": 1}
        cache._tiers.unpin(places)
        cache.check()


def hold_reads(cache: TierCache, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Return an event that says that a block is being read, and one before which none is."""
    assert cache.cold
    begun, gate, read = threading.Event(), threading.Event(), cache.cold.read_into

    def wait(*arguments: Any, **options: Any) -> MissReason | None:
        begun.set()
        assert gate.wait(20)
        return read(*arguments, **options)

    monkeypatch.setattr(cache.cold, "read_into", wait)
    return begun, gate


def test_a_cancelled_prefetch_ends_with_what_was_being_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path)
    with open_cache(tmp_path) as cache:
        begun, gate = hold_reads(cache, monkeypatch)
        first, second = cache.prefetch(PROMPT), cache.prefetch(PROMPT[:9])
        assert begun.wait(20)
        for handle in (first, second):
            handle.cancel()
        assert second.result() == 0, "it had not begun"
        assert not first.done()
        gate.set()
        assert first.result() == 2, "as many as there are threads that read"
        cache.check()


def test_closing_waits_for_no_prefetch_that_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = list(range(100, 122))
    for prompt in (PROMPT, other):
        store(tmp_path, prompt)
    cache = open_cache(tmp_path)
    begun, gate = hold_reads(cache, monkeypatch)
    first, second = cache.prefetch(PROMPT), cache.prefetch(other)
    assert begun.wait(20)
    closing = threading.Thread(target=cache.close, daemon=True)
    closing.start()
    assert cache._prefetcher._is_closing.wait(20)
    gate.set()
    closing.join(20)
    assert first.done() and second.done()
    assert (first.result(), second.result()) == (2, 0), "what was being read ends, and nothing more is read"
    with pytest.raises(ClosedError):
        cache.prefetch(PROMPT)


def test_a_prompt_that_fails_holds_up_none_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path)
    with open_cache(tmp_path) as cache:
        find, calls = Tiers.find, iter([True, False])

        def fail_once(*arguments: Any) -> Any:
            if next(calls):
                raise RuntimeError("a mistake of ours")
            return find(*arguments)

        monkeypatch.setattr(Tiers, "find", fail_once)
        handles = [cache.prefetch(PROMPT) for _ in range(2)]
        assert [handle.result() for handle in handles] == [0, 6]
        assert cache.stats().prefetch_misses == {"io_error": 1}


def test_a_full_queue_drops_a_prompt_and_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.requests.prefetch._MAX_PROMPTS", 1)
    store(tmp_path)
    with open_cache(tmp_path) as cache:
        begun, gate = hold_reads(cache, monkeypatch)
        cache.prefetch(PROMPT)
        assert begun.wait(20)
        waiting, dropped = cache.prefetch(PROMPT), cache.prefetch(PROMPT)
        assert (dropped.done(), dropped.result(), waiting.done()) == (True, 0, False)
        gate.set()
        waiting.result()
        assert cache.stats().prefetch_misses == {"no_room": 1}


def test_the_event_loop_can_await_prefetches(tmp_path: Path) -> None:
    store(tmp_path)

    async def get(handle: PrefetchHandle) -> int:
        return await handle

    async def run(cache: TierCache) -> list[int]:
        return await asyncio.gather(*(get(cache.prefetch(PROMPT[:end])) for end in (8, 20)))

    with open_cache(tmp_path) as cache:
        assert asyncio.run(run(cache)) == [2, 3]
