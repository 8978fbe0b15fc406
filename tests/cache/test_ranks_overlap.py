"""Compute or load over ranks: one decision for all of them, and an overlap that ends at the same block on each."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import PatternEngine, record_passes
from rank_crew import SIZE, Crew, cached, ids

from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.recompute_or_load import ColdCosts, Decision, LoadKind, Way, decide
from tierkv.values.block import Tier

NUM_BLOCKS = 10
PROMPT = ids(NUM_BLOCKS * SIZE)
RANKS = [2, 4, 8]


@contextmanager
def stored(path: Path, num_ranks: int) -> Iterator[Crew]:
    """Open ranks of which each has the prompt's blocks in its cold tier only."""
    hot, warm = (16,) * num_ranks, 2 * NUM_BLOCKS
    crew = Crew(path / "store", "cpu", hot=hot, warm=warm, timeout_s=60, piece_tokens=SIZE)
    try:
        crew.compute(PROMPT)
        crew.forget()
        yield crew
    finally:
        crew.close()


def say(crew: Crew, rank: int, *, block_s: float, load_s: float, overlap_s: float | None = None) -> None:
    """Let a rank believe that a block takes so long to compute, and all blocks to load and to do both."""
    cache = crew.caches[rank]
    record_passes(cache, {SIZE * count: block_s * count for count in (1, NUM_BLOCKS)})
    assert cache._acquirer._choice
    costs = cache._acquirer._choice.load_costs
    for in_memory in (True, False):
        costs[LoadKind(in_memory)].add(NUM_BLOCKS, load_s)
        if overlap_s is not None:
            costs[LoadKind(in_memory, overlaps=True)].add(NUM_BLOCKS, overlap_s)


def start(crew: Crew) -> list[Any]:
    """Let every rank answer the prompt, compute what it is told to, and check every byte."""

    def one(engine: PatternEngine) -> Any:
        sequence = engine.cache.acquire([*PROMPT, 99], overlap=True)
        engine.check(sequence, sequence.num_cached_tokens)
        num_computed = engine.meet(sequence) if sequence.overlap.is_loading else sequence.num_cached_tokens
        engine.check(sequence, num_computed)
        engine.compute(sequence, num_computed)
        engine.cache.commit(sequence, sequence.num_tokens)
        return sequence

    found = crew.each(one)
    for engine, sequence in zip(crew.engines, found, strict=True):
        engine.check(sequence)
    return found


def cold_tokens(found: list[Any]) -> list[int]:
    return [sequence.cached_tokens[Tier.COLD] for sequence in found]


def change_reads(
    crew: Crew, monkeypatch: pytest.MonkeyPatch, rank: int, change: Callable[[bytes], MissReason | None]
) -> None:
    """Call a function with the hash of each cold block of one rank before it is read; a reason is its outcome."""
    own = set(crew.caches[rank].match(PROMPT).block_hashes)
    read_into = ColdStore.read_into

    def read(store: ColdStore, expected: Any, *args: Any, **options: Any) -> MissReason | None:
        reason = change(expected.block_hash) if expected.block_hash in own else None
        return reason or read_into(store, expected, *args, **options)

    monkeypatch.setattr(ColdStore, "read_into", read)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_the_overlap_ends_at_the_same_block_on_every_rank(tmp_path: Path, num_ranks: int) -> None:
    with stored(tmp_path, num_ranks) as crew:
        for rank in range(num_ranks):
            say(crew, rank, block_s=1e-3 * (1 + rank), load_s=1e-2)
        found = start(crew)
        assert len(set(cold_tokens(found))) == 1
        assert len(set(cached(found))) == 1
        overlapped = {cache.stats().miss_reasons.get(MissReason.RECOMPUTED.value) for cache in crew.caches}
        assert overlapped == {NUM_BLOCKS - cached(found)[0] // SIZE}
        crew.release(found)


def test_the_engine_computes_on_every_rank_what_the_slowest_one_has_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stored(tmp_path, 2) as crew:
        for rank in range(2):
            say(crew, rank, block_s=1e-3, load_s=1.0)
        gate = threading.Event()

        def wait(_: bytes) -> MissReason | None:
            assert gate.wait(60)
            return None

        change_reads(crew, monkeypatch, 1, wait)
        found = crew.each(lambda engine: engine.cache.acquire([*PROMPT, 99], overlap=True))
        assert [sequence.overlap.is_loading for sequence in found] == [True, True]
        found[0].overlapped_load.wait()  # rank 0 has loaded all of them
        pieces: list[list[range]] = []
        while not pieces or pieces[-1][0]:
            pieces.append(crew.each(lambda engine: next_piece(engine, found[engine.seed])))
        gate.set()
        assert all(piece == other for piece, other in pieces)
        assert sum(len(piece) for piece, _ in pieces) == len(PROMPT)
        rest = crew.each(lambda engine: found[engine.seed].overlap.next_piece())
        assert rest == [range(len(PROMPT), len(PROMPT) + 1)] * 2
        assert cold_tokens(found) == [0, 0]
        for engine, sequence in zip(crew.engines, found, strict=True):
            engine.check(sequence, len(PROMPT))
        crew.release(found)


def next_piece(engine: PatternEngine, sequence: Any) -> range:
    """Take a piece without waiting, and compute it."""
    piece: range = sequence.overlap.next_piece(wait=False)
    if sequence.overlap.is_loading:
        engine.compute(sequence, piece.start, piece.stop)
        engine.cache.commit(sequence, piece.stop)
    return piece


def test_a_block_that_is_damaged_on_one_rank_is_computed_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stored(tmp_path, 2) as crew:
        for rank in range(2):
            say(crew, rank, block_s=1e-3, load_s=1e-2)
        damaged = crew.caches[1].match(PROMPT).block_hashes[6]
        change_reads(crew, monkeypatch, 1, lambda each: MissReason.CORRUPT if each == damaged else None)
        found = start(crew)
        assert len(set(cold_tokens(found))) == 1
        assert cold_tokens(found)[0] <= 3 * SIZE
        assert MissReason.CORRUPT.value not in crew.caches[0].stats().miss_reasons
        crew.release(found)


@pytest.mark.parametrize("slow", range(2))
def test_one_slow_rank_lets_all_compute(tmp_path: Path, slow: int) -> None:
    with stored(tmp_path, 2) as crew:
        say(crew, 1 - slow, block_s=1e-3, load_s=1e-6, overlap_s=1e-6)
        say(crew, slow, block_s=1e-3, load_s=10.0, overlap_s=10.0)
        found = start(crew)
        assert cached(found) == [0, 0]
        assert [cache.stats().miss_reasons[MissReason.RECOMPUTED.value] for cache in crew.caches] == [NUM_BLOCKS] * 2
        crew.release(found)


def test_ranks_load_until_all_of_them_have_measured(tmp_path: Path) -> None:
    with stored(tmp_path, 2) as crew:
        say(crew, 0, block_s=1e-6, load_s=10.0, overlap_s=10.0)
        found = start(crew)
        assert cold_tokens(found) == [len(PROMPT)] * 2
        crew.release(found)


def test_nothing_overlaps_if_one_rank_has_the_blocks_in_memory(tmp_path: Path) -> None:
    with stored(tmp_path, 2) as crew:
        for rank in range(2):
            say(crew, rank, block_s=1e-3, load_s=1e-6)
        crew.caches[0].prefetch(PROMPT).result()
        found = start(crew)
        assert cached(found) == [len(PROMPT)] * 2
        assert [sequence.cached_tokens[Tier.WARM] for sequence in found] == [len(PROMPT), 0]
        crew.release(found)


def test_ranks_that_have_some_blocks_in_memory_overlap_those_that_none_has(tmp_path: Path) -> None:
    with stored(tmp_path, 2) as crew:
        for rank in range(2):
            say(crew, rank, block_s=1e-3, load_s=1e-2)
        crew.caches[1].prefetch(PROMPT[: 4 * SIZE]).result()
        found = start(crew)
        assert len(set(cached(found))) == 1
        assert cached(found)[0] >= 4 * SIZE
        crew.release(found)


def costs(first: int = 0, end: int = 10, may: int = 1, load: int = 5, compute: int = 20, both: int = 3) -> ColdCosts:
    return ColdCosts(first, end, 1, 0, may, load, compute, both, 1)


@pytest.mark.parametrize(
    ("each", "are_all", "want"),
    [
        ([costs(), costs()], True, Decision(Way.OVERLAP, 0, 10)),
        ([costs(first=2), costs(end=9)], True, Decision(Way.OVERLAP, 2, 9)),
        ([costs(), costs(may=0)], True, Decision(Way.LOAD, 0, 10)),
        ([costs(), costs()], False, Decision(Way.LOAD, 0, 10)),
        ([costs(), costs(both=30)], True, Decision(Way.LOAD, 0, 10)),
        ([costs(), costs(both=30, load=30)], True, Decision(Way.COMPUTE, 0, 10)),
        ([costs(compute=2), costs()], True, Decision(Way.OVERLAP, 0, 10)),
        ([costs(), costs(both=-1)], True, Decision(Way.OVERLAP, 0, 10, is_trial=True)),
        ([costs(load=-1), costs(load=99)], True, Decision(Way.LOAD, 0, 10, is_trial=True)),
        ([costs(first=9), costs()], True, Decision(Way.LOAD, 9, 10)),
    ],
)
def test_the_slowest_rank_decides(each: list[ColdCosts], are_all: bool, want: Decision) -> None:
    assert decide(each, are_all=are_all, min_overlap=1) == want


@pytest.mark.parametrize("slowness", [1, 10])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_the_slowest_rank_measures_decides_for_all_and_is_never_slower_than_computing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_ranks: int, slowness: int
) -> None:
    """Count reads in place of seconds: a block takes 1 to read and 3 to compute, 10 to read on the slow rank."""
    compute_s, num_read = 3.0, [0] * num_ranks
    hot, warm = (16,) * num_ranks, 2 * NUM_BLOCKS
    crew = Crew(tmp_path / "store", "cpu", hot=hot, warm=warm, timeout_s=60, piece_tokens=len(PROMPT))
    crew.compute(PROMPT)
    read_costs = [1.0] * (num_ranks - 1) + [float(slowness)]
    owners = {each: rank for rank, cache in enumerate(crew.caches) for each in cache.match(PROMPT).block_hashes}
    read_into = ColdStore.read_into

    def read(store: ColdStore, expected: Any, *args: Any, **options: Any) -> MissReason | None:
        num_read[owners[expected.block_hash]] += 1
        return read_into(store, expected, *args, **options)

    monkeypatch.setattr(ColdStore, "read_into", read)

    def one(engine: PatternEngine) -> tuple[int, float]:
        """Answer the prompt as an engine does; return the blocks that were loaded, and what the request took."""
        rank = engine.seed
        before = num_read[rank]
        sequence = engine.cache.acquire([*PROMPT, 99], overlap=True)
        num_loaded = sequence.num_cached_tokens // SIZE
        assert num_loaded == num_read[rank] - before
        computed_s = compute_s * (NUM_BLOCKS - num_loaded)
        sequence.overlap.record(computed_s + 0.1, num_tokens=len(PROMPT) + 1 - num_loaded * SIZE)
        seconds = num_loaded * read_costs[rank] + computed_s + 0.1
        sequence.overlap.record(seconds)
        engine.compute(sequence, sequence.num_cached_tokens)
        engine.cache.commit(sequence, sequence.num_tokens)
        engine.check(sequence)
        engine.cache.release(sequence)
        return num_loaded, seconds

    taken: list[tuple[int, float]] = []
    for number in range(8):
        if number == 1:  # computed once, so that both ways are measured
            crew.each(lambda engine: engine.cache._acquirer._choice.pass_costs.add(len(PROMPT) + 1, 30.1))  # type: ignore[union-attr]
        crew.forget()
        found = crew.each(one)
        assert len({num_loaded for num_loaded, _ in found}) == 1, "one decision for all"
        taken.append((found[0][0], max(seconds for _, seconds in found)))
    assert taken[0][0] == NUM_BLOCKS, "the first request loads, to measure it"
    assert [num_loaded for num_loaded, _ in taken[1:]] == [NUM_BLOCKS if slowness == 1 else 0] * 7
    assert all(seconds <= compute_s * NUM_BLOCKS + 0.2 for _, seconds in taken[1:])
    crew.close()


def test_a_rank_that_really_reads_ten_times_slower_meets_the_engine_at_the_same_block_as_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stored(tmp_path, 4) as crew:
        for rank in range(4):
            say(crew, rank, block_s=1e-3, load_s=1e-2)
        slow = set(crew.caches[2].match(PROMPT).block_hashes)
        read_into = ColdStore.read_into

        def read(store: ColdStore, expected: Any, *args: Any, **options: Any) -> MissReason | None:
            time.sleep(0.02 if expected.block_hash in slow else 0.002)
            return read_into(store, expected, *args, **options)

        monkeypatch.setattr(ColdStore, "read_into", read)
        found = start(crew)
        assert len(set(cold_tokens(found))) == 1
        computed = {cache.stats().miss_reasons.get(MissReason.RECOMPUTED.value) for cache in crew.caches}
        assert computed == {NUM_BLOCKS - cached(found)[0] // SIZE}
        crew.release(found)
