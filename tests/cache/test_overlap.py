"""Compute or load: a request computes its first cold blocks while the last ones come up, and both are right."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pattern_engine import PatternEngine, open_tiny, record_passes, store_prompt

from tierkv.cache import TierCache
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.transfer.recompute_or_load import CostBySize, LoadKind, RecomputeOrLoad
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import Tier
from tierkv.values.events import EventKind

PROMPT = list(range(40))
NUM_BLOCKS = len(PROMPT) // 4


def open_cache(path: Path) -> TierCache:
    return open_tiny(path, num_io_threads=2, piece_tokens=4)


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Return a folder whose store has the prompt's ten blocks."""
    return store_prompt(tmp_path, PROMPT)


def say_rates(cache: TierCache, *, block_s: float, load_s: float) -> None:
    """Let the cache believe that a block takes so long to compute and to load."""
    record_passes(cache, {4 * num_blocks: block_s * num_blocks for num_blocks in (1, NUM_BLOCKS)})
    for in_memory in (True, False):
        choice_of(cache).load_costs[LoadKind(in_memory)].add(1, load_s)


def choice_of(cache: TierCache) -> RecomputeOrLoad:
    assert cache._acquirer._choice
    return cache._acquirer._choice


def hold_reads(cache: TierCache, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event before which no cold block is read."""
    assert cache.cold
    gate, read = threading.Event(), cache.cold.read_into

    def wait(*arguments: Any, **options: Any) -> MissReason | None:
        assert gate.wait(20)
        return read(*arguments, **options)

    monkeypatch.setattr(cache.cold, "read_into", wait)
    return gate


def test_what_was_computed_and_what_was_loaded_add_up_to_the_prompt(stored: Path) -> None:
    with open_cache(stored) as cache:
        say_rates(cache, block_s=1.0, load_s=1.0)
        sequence = PatternEngine(cache).start([*PROMPT, 7], overlap=True)
        stats = cache.stats()
        recomputed = stats.miss_reasons.get(MissReason.RECOMPUTED.value, 0)
        assert stats.tiers[Tier.COLD].hits + recomputed == NUM_BLOCKS
        assert sequence.cached_tokens[Tier.COLD] == 4 * stats.tiers[Tier.COLD].hits
        assert sum(stats.miss_reasons.values()) == stats.misses
        cache.release(sequence)
        cache.check()
        again = cache.acquire([*PROMPT, 8])
        assert again.cached_tokens[Tier.HOT] == len(PROMPT)
        cache.release(again)


def test_blocks_that_do_not_come_are_all_computed(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_cache(stored) as cache:
        gate = hold_reads(cache, monkeypatch)
        say_rates(cache, block_s=1.0, load_s=2.0)
        sequence = cache.acquire([*PROMPT, 7], overlap=True)
        engine, num_computed = PatternEngine(cache), 0
        while (piece := sequence.overlap.next_piece(wait=False)) and sequence.overlap.is_loading:
            engine.compute(sequence, piece.start, piece.stop)
            num_computed = piece.stop
            cache.commit(sequence, num_computed)
        gate.set()
        assert num_computed == sequence.overlap.next_piece().start == len(PROMPT)
        engine.check(sequence, num_computed)
        assert sequence.cached_tokens[Tier.COLD] == 0
        cache.release(sequence)
        cache.check()


def test_a_damaged_block_is_computed_and_so_is_what_lies_before_it(stored: Path) -> None:
    with open_cache(stored) as cache:
        hashes = cache.match(PROMPT).block_hashes
        assert cache.cold
        read = cache.cold.read_into
        bad = hashes[6]
        cache.cold.read_into = lambda info, out, **o: (  # type: ignore[method-assign]
            MissReason.CORRUPT if info.block_hash == bad else read(info, out, **o)
        )
        say_rates(cache, block_s=1.0, load_s=1.0)
        sequence = cache.acquire([*PROMPT, 7], overlap=True)
        assert sequence.overlapped_load
        sequence.overlapped_load.wait()  # the loader is far ahead: it stops at the damaged block
        engine = PatternEngine(cache)
        assert engine.meet(sequence) == len(PROMPT)
        engine.check(sequence, len(PROMPT))
        assert sequence.cached_tokens[Tier.COLD] == 4 * 3
        reasons = cache.stats().miss_reasons
        assert (reasons["corrupt"], reasons["recomputed"]) == (1, 6)
        sequence.overlap.record(100.0)
        kinds = (LoadKind(in_memory, overlaps=True) for in_memory in (True, False))
        assert [choice_of(cache).load_costs[kind].estimate(NUM_BLOCKS) for kind in kinds] == [None] * 2
        cache.release(sequence)
        cache.check()


def test_blocks_that_fail_after_the_engine_was_told_to_wait_for_them_are_not_called_there(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_cache(stored) as cache:
        gate = hold_reads(cache, monkeypatch)
        say_rates(cache, block_s=1.0, load_s=1.0)
        sequence = cache.acquire([*PROMPT, 7], overlap=True)
        load, engine, num_computed = sequence.overlapped_load, PatternEngine(cache), 0
        assert load
        # two threads, each with a block in work and one that waits
        while load.division.first_loaded - load.division._first_claimed < 4:
            pass
        while piece := sequence.overlap.next_piece(wait=False):
            engine.compute(sequence, piece.start, piece.stop)
            num_computed = piece.stop
        cache.commit(sequence, num_computed)
        assert cache.cold
        monkeypatch.setattr("tierkv.storage.cold_reader.decode_record", lambda *_, **__: MissReason.COLLISION)
        gate.set()
        num_there = sequence.overlap.next_piece().start
        engine.check(sequence, num_there)
        assert num_there == num_computed and 0 < num_computed < len(PROMPT)
        engine.compute(sequence, num_there)
        cache.commit(sequence, sequence.num_tokens)
        engine.check(sequence)
        cache.release(sequence)
        cache.check()


def test_a_request_that_ends_while_its_blocks_load_leaves_nothing_behind(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_cache(stored) as cache:
        gate = hold_reads(cache, monkeypatch)
        say_rates(cache, block_s=1.0, load_s=1.0)
        sequence = cache.acquire([*PROMPT, 7], overlap=True)
        load = sequence.overlapped_load
        assert load
        cache.release(sequence)
        gate.set()
        load.wait()
        cache.check()
        assert cache.stats().tiers[Tier.HOT].blocks == 0


def test_before_rates_are_known_and_for_a_few_blocks_all_is_loaded_at_once(stored: Path) -> None:
    with open_cache(stored) as cache:
        unknown = cache.acquire([*PROMPT, 7], overlap=True)
        assert not unknown.overlap.is_loading and unknown.cached_tokens[Tier.COLD] == len(PROMPT)
        cache.release(unknown)
    with open_cache(stored) as cache:
        say_rates(cache, block_s=1.0, load_s=0.1)
        few = cache.acquire([*PROMPT[:4], 7], overlap=True)
        assert not few.overlap.is_loading and few.cached_tokens[Tier.COLD] == 4
        cache.release(few)


def test_a_few_blocks_that_load_more_slowly_than_they_are_computed_are_not_loaded(stored: Path) -> None:
    with open_cache(stored) as cache:
        say_rates(cache, block_s=0.1, load_s=1.0)
        sequence = PatternEngine(cache).start([*PROMPT[:4], 7])
        cache.release(sequence)
    with open_cache(stored) as cache:
        say_rates(cache, block_s=0.1, load_s=1.0)
        sequence = cache.acquire([*PROMPT[:4], 7], overlap=True)
        assert not sequence.overlap.is_loading and sequence.num_cached_tokens == 0
        stats = cache.stats()
        assert stats.miss_reasons[MissReason.RECOMPUTED.value] == 1
        assert sum(stats.miss_reasons.values()) == stats.misses == 2
        cache.release(sequence)
        cache.check()


def test_what_a_request_took_decides_what_becomes_of_the_next(stored: Path) -> None:
    learned: defaultdict[LoadKind, CostBySize] | None = None
    for took_s, overlaps, num_cached in [(50.0, True, 0), (40.0, False, len(PROMPT)), (1.0, False, 0)]:
        with open_cache(stored) as cache:
            say_rates(cache, block_s=1.0, load_s=0.5)
            choice_of(cache).load_costs = learned or choice_of(cache).load_costs
            sequence = cache.acquire([*PROMPT, 7], overlap=True)
            assert (sequence.overlap.is_loading, sequence.num_cached_tokens) == (overlaps, num_cached)
            if sequence.overlap.is_loading:
                PatternEngine(cache).meet(sequence)
            sequence.overlap.record(took_s)
            learned = choice_of(cache).load_costs
            cache.release(sequence)


@pytest.mark.parametrize("is_long", [False, True])
def test_a_way_that_was_slow_once_is_tried_again_after_many_requests_that_did_without(
    stored: Path, is_long: bool
) -> None:
    """Something else kept the disk busy when it was measured: nobody would ever load again."""
    prompt = [*(PROMPT if is_long else PROMPT[:4]), 7]
    with open_cache(stored) as cache:
        say_rates(cache, block_s=1.0, load_s=50.0)
        for in_memory in (True, False):  # all ways of a long prompt are known, and slow
            for num_blocks in (1, NUM_BLOCKS):
                choice_of(cache).load_costs[LoadKind(in_memory, overlaps=True)].add(num_blocks, 50.0 * num_blocks)
        found = []
        for _ in range(400):
            sequence = cache.acquire(prompt, overlap=True)
            found.append(sequence.num_cached_tokens > 0 or sequence.overlap.is_loading)
            cache.release(sequence)
            if found[-1]:
                break
        assert not any(found[:50])
        assert found[-1]


def test_a_way_that_is_tried_and_not_measured_makes_no_other_less_believed(stored: Path) -> None:
    with open_cache(stored) as cache:
        say_rates(cache, block_s=1.0, load_s=0.5)
        for _ in range(5):  # each beside other requests: nobody notes what it took
            sequence = cache.acquire([*PROMPT, 7], overlap=True)
            assert sequence.overlapped_load
            cache.release(sequence)
            sequence.overlapped_load.wait_ended()
        kinds = [LoadKind(in_memory) for in_memory in (True, False)]
        assert [choice_of(cache).load_costs[kind].estimate(NUM_BLOCKS) for kind in kinds] == [0.5 * NUM_BLOCKS] * 2


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_the_disk_must_bring_may_be_computed_where_the_page_cache_is_read(
    stored: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    with open_cache(stored) as cache:
        assert cache.cold
        record_passes(cache, {4 * num_blocks: 1.0 * num_blocks for num_blocks in (1, NUM_BLOCKS)})
        choice_of(cache).load_costs[LoadKind(in_memory=True)].add(NUM_BLOCKS, 0.1)
        choice_of(cache).load_costs[LoadKind(in_memory=False)].add(NUM_BLOCKS, 100.0)
        monkeypatch.setattr(cache.cold, "is_in_memory", lambda block_hash: in_memory)
        sequence = cache.acquire([*PROMPT[:4], 7], overlap=True)
        assert sequence.cached_tokens[Tier.COLD] == (4 if in_memory else 0)
        cache.release(sequence)


def test_two_requests_that_overlap_on_the_same_prompt_end_up_sharing_its_blocks(stored: Path) -> None:
    with open_cache(stored) as cache:
        engine = PatternEngine(cache)
        say_rates(cache, block_s=1.0, load_s=1.0)
        first, second = (cache.acquire([*PROMPT, end], overlap=True) for end in (7, 8))
        work: list[Callable[[], int]] = [lambda: engine.meet(second), lambda: engine.meet(first)]
        assert [meet() for meet in work] == [len(PROMPT)] * 2
        for sequence in (first, second):
            engine.check(sequence, len(PROMPT))
        assert first.block_table[:NUM_BLOCKS] == second.block_table[:NUM_BLOCKS]
        for sequence in (first, second):
            cache.release(sequence)
        cache.check()


def test_no_place_is_given_back_while_its_block_is_still_read(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_work, given_back = set[int](), threading.Event()
    with open_cache(stored) as cache:
        assert cache.cold
        read, unpin, last = cache.cold.read_into, Tiers.unpin, cache.match(PROMPT).block_hashes[-1]

        def fail_first(info: BlockInfo, out: np.ndarray, **options: Any) -> MissReason | None:
            if info.block_hash == last:
                return MissReason.IO_ERROR
            slot = out.ctypes.data
            in_work.add(slot)
            given_back.wait(0.2)  # the first one has failed by then, and nobody may have given this one's place back
            in_work.remove(slot)
            return read(info, out, **options)

        def watched(self: Tiers, places: Iterable[Place]) -> None:
            places = list(places)
            if in_work & {self.memory.raw.slots[each.slot].ctypes.data for each in places if each.tier is not Tier.HOT}:
                given_back.set()
            unpin(self, places)

        monkeypatch.setattr(cache.cold, "read_into", fail_first)
        monkeypatch.setattr(Tiers, "unpin", watched)
        monkeypatch.setattr(cache._tiers.memory, "frames", object())  # a GPU decodes many blocks together
        say_rates(cache, block_s=1.0, load_s=1.0)
        sequence = PatternEngine(cache).start([*PROMPT, 7], overlap=True)
        cache.release(sequence)
        cache.check()
    assert not given_back.is_set()


@pytest.mark.parametrize("failing", ["read_into", "read_ahead"])
def test_a_load_that_fails_beyond_a_miss_leaves_nothing_behind(
    stored: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError("no room to decode")

    with open_cache(stored) as cache:
        monkeypatch.setattr(cache.cold, failing, fail)
        say_rates(cache, block_s=1.0, load_s=1.0)
        if failing == "read_into":
            sequence = cache.acquire([*PROMPT, 7], overlap=True)
            assert sequence.overlapped_load
            with pytest.raises(MemoryError):
                sequence.overlapped_load.wait()
            cache.release(sequence)
        with pytest.raises(MemoryError):
            cache.acquire([*PROMPT, 7])
        cache.check()
        tiers = cache._tiers
        assert (tiers.index.hot.referenced_count, tiers.index.warm.referenced_count) == (0, tiers.memory.reserved_raw)


def test_a_look_at_the_page_cache_that_fails_leaves_nothing_behind(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: bytes) -> bool:
        raise MemoryError("no room for a page")

    with open_cache(stored) as cache:
        cache.release(cache.acquire([*PROMPT[:8], 7]))  # two blocks are hot
        monkeypatch.setattr(cache.cold, "is_in_memory", fail)
        with pytest.raises(MemoryError):
            cache.acquire([*PROMPT, 7], overlap=True)
        cache.check()


def test_blocks_behind_one_that_was_given_up_are_not_taken_for_those_that_follow(stored: Path) -> None:
    with open_cache(stored) as cache:
        engine, tiers = PatternEngine(cache), cache._tiers
        with tiers.changed:  # three cold blocks, a warm one, six cold ones
            hits = cache._tiers.find(np.array(PROMPT, dtype="<u4").tobytes(), len(PROMPT)).blocks[:4]
            entries = [
                tiers.index.insert(h.block_hash, h.parent_hash, h.token_bytes, content_digest=h.content_digest)
                for h in hits
            ]
            places = tiers.try_take_raw(7)  # all but the write thread's
            assert entries[3]
            cache._acquirer._reading.read_one(hits[3], places[0])
            tiers.attach(entries[3], Tier.WARM, places[0].slot, EventKind.PROMOTE)
            tiers.unpin(places[:1])  # the one place there is: the warm block gives way to the cold ones before it
        say_rates(cache, block_s=1.0, load_s=1.0)
        sequence = engine.start([*PROMPT, 7], overlap=True)
        engine.check(sequence)
        assert sequence.cached_tokens == {Tier.HOT: 0, Tier.WARM: 0, Tier.COLD: 12}
        assert cache.stats().miss_reasons[MissReason.NO_ROOM.value] == 1
        cache.release(sequence)
        tiers.unpin(places[1:])
        cache.check()


def test_blocks_loaded_behind_what_was_never_committed_leave_nothing_behind(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_cache(stored) as cache:
        gate = hold_reads(cache, monkeypatch)
        say_rates(cache, block_s=1.0, load_s=1.0)
        sequence = cache.acquire([*PROMPT, 7], overlap=True)
        load = sequence.overlapped_load
        assert load and load.next_piece()
        num_claimed = load.division.num_computed
        gate.set()
        while load.next_piece():  # all that was claimed is computed, but not said to be
            pass
        load.wait()
        first_loaded = load.division.first_loaded
        assert 0 < num_claimed <= first_loaded < NUM_BLOCKS
        other = cache.acquire([*PROMPT[: 4 * first_loaded], 8])  # which knows what the loaded blocks follow
        sequence.overlap.next_piece()
        cache.release(sequence)
        cache.release(other)
        cache.check()
