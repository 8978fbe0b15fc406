"""Blocks of the hot pool change places: chains come to lie together, and no byte and no user is lost."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, ConfigError, StoreError
from tierkv.movers.mover import Move
from tierkv.profiling.tracker import MemoryTracker
from tierkv.requests.sequence import Sequence
from tierkv.values.block import Tier
from tierkv.values.events import EventKind
from tierkv.values.namespace import Namespace

BLOCK_BYTES = tiny_layout().block_bytes


def open_cache(hot: int, *, write_through: bool = True) -> TierCache:
    config = CacheConfig(
        block_size=4, hot_bytes=hot * BLOCK_BYTES, warm_bytes=8 * BLOCK_BYTES, write_through=write_through
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout()), device=device)


@pytest.fixture
def cache() -> Iterator[TierCache]:
    with open_cache(16) as opened:
        yield opened


def prompt(first: int, num_tokens: int) -> list[int]:
    return list(range(first, first + num_tokens))


def interleave(engine: PatternEngine, count: int) -> list[Sequence]:
    """Let sequences grow in turns, so that the blocks of each are scattered."""
    sequences = [engine.start(prompt(100 * i, 4)) for i in range(1, count + 1)]
    for turn in range(2):
        for i, sequence in enumerate(sequences):
            engine.decode(sequence, prompt(1000 * i + 10 * turn, 4))
    return sequences


def is_run(table: list[int]) -> bool:
    return table == list(range(table[0], table[0] + len(table)))


def test_chains_of_running_sequences_become_runs(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    sequences = interleave(engine, 3)
    assert not any(is_run(sequence.block_table) for sequence in sequences)
    before = [list(sequence.block_table) for sequence in sequences]
    report = cache.defragment(sequences)
    assert all(is_run(sequence.block_table) for sequence in sequences)
    assert report.breaks_before > 0 and report.breaks_after == 0 and report.num_fixed == 0
    assert [[report.moved.get(block_id, block_id) for block_id in table] for table in before] == [
        sequence.block_table for sequence in sequences
    ]
    for sequence in sequences:
        engine.check(sequence)
    cache.check()


def test_cached_chains_become_runs_and_are_found_as_before(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    sequences = interleave(engine, 3)
    token_ids = [sequence.token_ids.tolist() for sequence in sequences]
    for sequence in sequences:
        cache.release(sequence)
    cache.defragment()
    for tokens in token_ids:
        again = engine.start([*tokens, 7])  # checks every byte that is cached
        assert again.cached_tokens[Tier.HOT] == len(tokens)
        assert is_run(again.block_table[:-1])
        cache.release(again)
    cache.check()


def test_free_blocks_become_one_run(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    sequences = interleave(engine, 3)
    for at in (0, 2):
        cache.release(sequences[at])
    cache.flush()  # what is being written is in use
    cache.evict(Tier.HOT, 5)
    before = cache.stats().fragmentation_ratio
    report = cache.defragment([sequences[1]])
    assert before == report.fragmentation_before > 0
    assert cache.stats().fragmentation_ratio == report.fragmentation_after == 0
    engine.check(sequences[1])


def test_a_second_time_nothing_is_moved(cache: TierCache) -> None:
    sequences = interleave(PatternEngine(cache), 3)
    assert cache.defragment(sequences).moved
    again = cache.defragment(sequences)
    assert not again.moved and again.num_copies == 0


def test_blocks_of_a_sequence_that_was_not_named_stay_where_they_are(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    mine, others = interleave(engine, 2)
    shared = engine.start([*others.token_ids.tolist(), 5])  # has others' blocks, too
    table = list(others.block_table)
    report = cache.defragment([mine, shared])
    assert others.block_table == table and report.num_fixed == len(set(table))
    for sequence in (mine, others, shared):
        engine.check(sequence)
    cache.check()


def test_sequences_that_share_blocks_move_together(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    first, second = interleave(engine, 2)
    forked = cache.fork(first)
    engine.decode(forked, [1, 2])
    assert cache.defragment([first, second, forked]).moved
    assert first.block_table == forked.block_table[: len(first.block_table)]
    for sequence in (first, second, forked):
        engine.check(sequence)
    cache.check()


def test_a_full_pool_gives_up_one_block_to_have_room_to_move() -> None:
    with open_cache(9) as cache:
        engine = PatternEngine(cache)
        sequences = interleave(engine, 3)
        cache.release(sequences.pop())
        assert cache.stats().tiers[Tier.HOT].blocks == 9
        assert cache.defragment(sequences).moved
        assert cache.stats().tiers[Tier.HOT].blocks == 8
        assert all(is_run(sequence.block_table) for sequence in sequences)
        for sequence in sequences:
            engine.check(sequence)
        cache.check()


def test_a_pool_full_of_running_sequences_stays_as_it_is() -> None:
    with open_cache(9) as cache:
        engine = PatternEngine(cache)
        sequences = interleave(engine, 3)
        assert not cache.defragment(sequences).moved
        for sequence in sequences:
            engine.check(sequence)
        cache.check()


def test_a_released_sequence_cannot_be_moved(cache: TierCache) -> None:
    (sequence,) = interleave(PatternEngine(cache), 1)
    cache.release(sequence)
    with pytest.raises(ConfigError, match="has been released"):
        cache.defragment([sequence])


def test_observers_follow_a_block_to_its_new_place(cache: TierCache) -> None:
    engine = PatternEngine(cache)
    tracker = MemoryTracker(sample_every=1)
    tracker.observe(cache)
    sequences = interleave(engine, 3)
    known = {each.block_hash: each for each in tracker.list_allocations() if each.purpose == "hot block"}
    report = cache.defragment(sequences)
    assert sum(event.kind is EventKind.MOVE for event in tracker.allocation_history) == report.num_copies
    owners = cache._tiers.index.hot.owners
    for block_id, owner in enumerate(owners):
        if owner:
            allocation = tracker.allocations[f"hot:{block_id}"]
            assert allocation is known[owner.block_hash]
            assert allocation.tensor_ptr == cache.hot.blocks[block_id].data_ptr()


@pytest.mark.parametrize("num_good", [0, 1, 4])
def test_a_copy_that_differs_ends_it_there_and_what_was_moved_is_in_order(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch, num_good: int
) -> None:
    engine = PatternEngine(cache)
    sequences = interleave(engine, 3)
    mover, copied = cache._tiers.memory.mover, []

    def copy_badly(moves: list[Move]) -> object:
        copied.extend(moves)
        if len(copied) > num_good:
            cache.hot.blocks[moves[0].target].fill_(-1)
            return mover.mark()
        return type(mover).copy(mover, moves)

    monkeypatch.setattr(mover, "copy", copy_badly)
    with pytest.raises(StoreError, match="changed on its way"):
        cache.defragment(sequences)
    for sequence in sequences:
        engine.check(sequence)
    cache.check()


class DefragmentationMachine(RuleBasedStateMachine):
    """Sequences come, grow, part and go in a pool with some room, and between any two steps blocks change places."""

    @initialize(hot=st.integers(10, 20), write_through=st.booleans())
    def start(self, hot: int, write_through: bool) -> None:
        self.cache = open_cache(hot, write_through=write_through)
        self.engine = PatternEngine(self.cache)
        self.running: list[Sequence] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), partial_block=st.booleans())
    def request(self, tokens: list[int], partial_block: bool) -> None:
        try:
            self.running.append(self.engine.start(tokens, partial_block=partial_block))
        except CapacityError:
            assert self.running

    @precondition(lambda self: self.running)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def grow(self, tokens: list[int]) -> None:
        for sequence in self.running:
            try:
                self.engine.decode(sequence, tokens)
            except CapacityError:
                pass

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def fork(self, which: int) -> None:
        try:
            self.running.append(self.cache.fork(self.running[which % len(self.running)]))
        except CapacityError:
            pass

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        self.cache.release(self.running.pop(which % len(self.running)))

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        self.cache.evict(Tier.HOT, count)

    @rule(others=st.sets(st.integers(0, 3)))
    def defragment(self, others: set[int]) -> None:
        between = [sequence for at, sequence in enumerate(self.running) if at not in others]
        tables = [list(sequence.block_table) for sequence in self.running if sequence not in between]
        report = self.cache.defragment(between)
        assert tables == [sequence.block_table for sequence in self.running if sequence not in between]
        if not report.num_fixed and self.cache.stats().tiers[Tier.HOT].blocks < self.cache.hot.num_blocks:
            assert report.breaks_after == report.fragmentation_after == 0

    @invariant()
    def every_byte_is_its_own(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check()
            for sequence in self.running:
                self.engine.check(sequence)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()


TestDefragmentationMachine = DefragmentationMachine.TestCase
TestDefragmentationMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
