"""No request waits for ever for room, whoever holds it; and what cannot be had costs nobody else a block."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from pattern_engine import PatternEngine, open_tiny, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError
from tierkv.index.tree import Entry
from tierkv.requests.sequence import Sequence
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.block_writer import Batch
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

PROMPT = list(range(28))
MIN_WARM = 4  # one of them belongs to the write thread


def open_cache(path: Path, *, hot: int = 16, warm: int = MIN_WARM) -> TierCache:
    return open_tiny(path, hot=hot, warm=warm)


def store(path: Path, prompt: list[int]) -> None:
    with open_cache(path) as cache:
        cache.release(PatternEngine(cache).start([*prompt, 99]))


def within_seconds(work: Callable[[], Sequence]) -> Sequence:
    """Return what work returns; fail where it hangs."""
    done: list[Sequence] = []
    thread = threading.Thread(target=lambda: done.append(work()), daemon=True)
    thread.start()
    thread.join(20)
    if thread.is_alive():
        pytest.fail("the request hangs")
    return done[0]


def test_a_request_whose_own_warm_blocks_fill_the_warm_tier_reads_the_cold_ones_before_them(tmp_path: Path) -> None:
    store(tmp_path, PROMPT)
    cache = open_cache(tmp_path)
    engine = PatternEngine(cache)
    cache.release(engine.start([*PROMPT[:16], 500]))  # four blocks hot
    cache.evict(Tier.WARM)
    cache.release(engine.start([*PROMPT, 600]))  # the other three come up through the warm tier and fill it
    cache.flush()
    cache.evict(Tier.HOT)
    assert cache.match(PROMPT).blocks == {Tier.HOT: 0, Tier.WARM: 3, Tier.COLD: 4}
    sequence = within_seconds(lambda: engine.start([*PROMPT, 700]))
    assert sequence.cached_tokens[Tier.COLD] == 16
    cache.release(sequence)
    cache.check()
    cache.close()


def test_a_warm_tier_full_of_pinned_blocks_is_a_miss_for_cold_ones(tmp_path: Path) -> None:
    store(tmp_path, PROMPT)
    cache = open_cache(tmp_path)
    engine = PatternEngine(cache)
    pinned = list(range(100, 112))
    cache.release(engine.start([*pinned, 99]))
    cache.flush()
    assert cache.pin(pinned) == 3
    sequence = within_seconds(lambda: engine.start([*PROMPT, 700]))
    assert sequence.num_cached_tokens == 0
    assert cache.stats().miss_reasons[MissReason.NO_ROOM.value] == 1
    cache.release(sequence)
    cache.unpin(pinned)
    sequence = within_seconds(lambda: engine.start([*PROMPT, 701]))
    assert sequence.num_cached_tokens == 28
    cache.release(sequence)
    cache.check()
    cache.close()


@pytest.mark.parametrize("is_busy", [False, True])
def test_a_prompt_that_never_fits_evicts_nobody(tmp_path: Path, is_busy: bool) -> None:
    with open_cache(tmp_path, warm=16) as cache:
        engine = PatternEngine(cache)
        cache.release(engine.start([*PROMPT, 99]))
        running = [engine.start(list(range(200, 216)))] if is_busy else []
        with pytest.raises(CapacityError, match=f"{4 * is_busy} of 16 are in use"):
            cache.acquire(list(range(1000, 1052 if is_busy else 1068)))
        assert cache.match(PROMPT).blocks[Tier.HOT] == 7
        for sequence in running:
            cache.release(sequence)
        cache.check()


def test_a_prompt_that_takes_the_whole_hot_pool_fits_beside_the_block_where_it_parts_from_another(
    tmp_path: Path,
) -> None:
    with open_cache(tmp_path, hot=4) as cache:
        engine = PatternEngine(cache)
        cache.release(engine.start(list(range(16))))
        cache.flush()
        sequence = engine.start([0, 1, *range(100, 114)])  # the first block's source would be a fifth block
        assert sequence.num_cached_tokens == 0
        assert cache.stats().miss_reasons[MissReason.NO_ROOM.value] == 1
        cache.release(sequence)
        cache.check()


def test_a_policy_that_fails_in_the_write_thread_keeps_no_block_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_cache(tmp_path) as cache:
        index, called = cache._tiers.index, threading.Event()
        select = index.select_evictions

        def fail(tier: Tier, count: int) -> list[Entry]:
            if threading.current_thread().name == "tierkv-write":
                raise RuntimeError("no victim for you")
            return select(tier, count)

        monkeypatch.setattr(index, "select_evictions", fail)
        sequence = cache.acquire(PROMPT)
        PatternEngine(cache).compute(sequence, 0)
        with cache._tiers.changed:  # so that the thread takes both in one batch, or the second after the first
            cache.commit(sequence, len(PROMPT))
            cache.release(sequence)
            assert cache._offloader.after_writes(called.set)
        assert called.wait(20)
        cache.check()
        assert index.hot.referenced_count == 0


@pytest.mark.parametrize("is_evicted", [True, False])
def test_what_no_tier_would_take_once_is_offered_again_when_it_comes_back_or_has_been_taken(is_evicted: bool) -> None:
    block_bytes = tiny_layout().block_bytes
    config = CacheConfig(block_size=4, hot_bytes=32 * block_bytes, warm_bytes=8 * block_bytes, write_through=False)
    with TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout())) as cache:
        engine, kept, prompt = PatternEngine(cache), list(range(100, 128)), [1, 2, 3, 4]
        start_and_demote(engine, kept)
        assert cache.pin(kept) == 7  # all of the warm tier but the write thread's slot
        cache.release(engine.start(prompt))
        write_down(cache, prompt)
        (block,) = (each for each in cache.blocks.inspect() if each.block_hash in cache.match(prompt).block_hashes)
        assert not block.lower_tiers
        cache.unpin(kept)
        if is_evicted:
            assert cache.blocks.manual_cache_management(evict_blocks=[block.block_id]).evicted
            cache.release(engine.start(prompt))
        else:
            user = cache.acquire([*prompt, 5])  # keeps it hot, but not from being written
            write_down(cache, prompt)
            cache.release(user)
            cache.evict(Tier.WARM)
        cache.evict(Tier.HOT)
        assert cache.match(prompt).blocks[Tier.WARM] == 1


@pytest.mark.parametrize("is_in_use", [False, True])
def test_no_queued_write_is_dropped_where_the_request_would_not_fit_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_in_use: bool
) -> None:
    """Eight blocks: one is being written, three wait to be written, four are in use."""
    with open_tiny(tmp_path, hot=8, warm=12, write_wait_s=0.2) as cache:
        engine, gate, begun = PatternEngine(cache), threading.Event(), threading.Event()
        write = cache._offloader.writer.write

        def held(batch: Batch) -> None:
            begun.set()
            assert gate.wait(20)
            write(batch)

        monkeypatch.setattr(cache._offloader.writer, "write", held)
        try:
            cache.release(engine.start(list(range(500, 504))))
            assert begun.wait(20)
            queued = engine.start(list(range(100, 112)))
            running = cache.acquire(list(range(200, 216)), reuse=False)
            if not is_in_use:
                cache.release(queued)
            with pytest.raises(CapacityError):
                cache.acquire(list(range(1000, 1012 if is_in_use else 1016)))
            assert "stalled" not in cache.stats().skip_reasons, "writes were dropped in vain"
            if not is_in_use:  # where it frees what is needed, they are
                cache.release(cache.acquire(list(range(1000, 1012))))
                assert cache.stats().skip_reasons["stalled"] == 3
        finally:
            gate.set()
        for sequence in (queued, running):
            cache.release(sequence)
        cache.flush()
        assert cache.match([*range(100, 112), 1]).blocks[Tier.WARM] == 0  # hot, or lost above
        cache.evict(Tier.HOT)
        assert cache.match([*range(100, 112), 1]).blocks[Tier.WARM] == (3 if is_in_use else 0)
        cache.check()


def start_and_demote(engine: PatternEngine, prompt: list[int]) -> None:
    """Compute a prompt, and have its blocks written down if some tier takes them."""
    engine.cache.release(engine.start(prompt))
    with engine.cache._tiers.changed:  # `evict` would go on until the blocks are gone, written or not
        engine.cache._offloader.evict_hot(len(prompt))
    engine.cache.flush()


def write_down(cache: TierCache, prompt: list[int]) -> None:
    """Have a prompt's only block written down if some tier takes it; it stays hot."""
    with cache._tiers.changed:
        cache._offloader.write_down(find(cache, prompt), cache._tiers.memory.mover.mark())
    cache.flush()


def find(cache: TierCache, prompt: list[int]) -> Entry:
    """Return the entry of a prompt's only block."""
    with cache._tiers.changed:
        entry = cache._tiers.index.peek(cache.match(prompt).block_hashes[0])
    assert entry
    return entry
