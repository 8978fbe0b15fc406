"""Caches of the ranks of one model, over one store: a prefix is cached on every rank or on none."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Votes
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import PatternEngine, tiny_layout
from rank_crew import BLOCK_BYTES, DEVICES, SIZE, Crew, cached, ids
from torch import distributed

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import CapacityError, ConfigError, RankError, StoreError
from tierkv.movers.mover import Mover
from tierkv.ranks.group import Vote
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

Open = Callable[..., Crew]


@pytest.fixture(params=DEVICES)
def open_crew(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    opened: list[Crew] = []

    def open_one(
        *,
        hot: tuple[int, ...] = (16, 16),
        warm: int = 8,
        timeout_s: float = 60,
        first: type[TorchRanks] = TorchRanks,
    ) -> Crew:
        for crew in opened:
            crew.close()
        store = tmp_path / "store"
        opened[:] = [Crew(store, request.param, hot=hot, warm=warm, timeout_s=timeout_s, first=first)]
        return opened[0]

    yield open_one
    for crew in opened:
        crew.close()


def test_each_rank_finds_its_own_blocks_in_the_one_store(open_crew: Open) -> None:
    open_crew().compute(ids(14), partial_block=True)
    again = open_crew()
    found = again.start([*ids(14), 99])  # engines check every byte, and differ by rank
    assert [sequence.cached_tokens[Tier.COLD] for sequence in found] == [14, 14]
    again.release(found)


def test_a_block_that_one_rank_lacks_counts_on_none(open_crew: Open) -> None:
    crew = open_crew()
    crew.compute(ids(16))
    crew.lose(1, ids(16), at=2)
    found = crew.start([*ids(16), 99])
    assert cached(found) == [8, 8]
    assert [len(sequence.chain) for sequence in found] == [4, 4]
    crew.release(found)
    reasons = [cache.stats().miss_reasons for cache in crew.caches]
    assert reasons[0][MissReason.OTHER_RANK.value] == 2
    assert MissReason.OTHER_RANK.value not in reasons[1]


def test_the_rank_that_lacked_a_block_stores_it_again(open_crew: Open) -> None:
    crew = open_crew()
    crew.compute(ids(16))
    crew.lose(1, ids(16), at=0)
    crew.compute([*ids(16), 99])
    crew.forget()
    found = crew.start([*ids(16), 98])
    assert cached(found) == [16, 16]
    crew.release(found)


def test_a_damaged_block_of_one_rank_is_computed_by_all(open_crew: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    crew = open_crew()
    crew.compute(ids(16))
    crew.forget()
    damaged = crew.caches[0].match(ids(16)).block_hashes[1]
    read_into = ColdStore.read_into

    def read(store: ColdStore, expected: object, *args: object, **options: object) -> MissReason | None:
        if expected.block_hash == damaged:  # type: ignore[attr-defined]
            return MissReason.CORRUPT
        return read_into(store, expected, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ColdStore, "read_into", read)
    found = crew.start([*ids(16), 99])
    assert cached(found) == [4, 4]
    assert crew.caches[0].stats().miss_reasons[MissReason.CORRUPT.value] == 1
    for engine, sequence in zip(crew.engines, found, strict=True):
        engine.check(sequence)
    crew.release(found)


def test_blocks_given_up_stay_as_they_are_and_others_go_on_using_them(open_crew: Open) -> None:
    crew = open_crew()
    running = crew.start(ids(16))
    crew.caches[1].release(running[1])
    crew.lose(1, ids(16), at=1)
    blocks = list(running[0].block_table)
    found = crew.each(lambda engine: engine.cache.acquire([*ids(16), 99]))
    assert cached(found) == [4, 4]
    assert found[0].block_table[0] == blocks[0]
    assert not set(found[0].block_table[1:]) & set(blocks)  # fresh ones, which may be written
    crew.each(lambda engine: engine.compute(found[engine.seed], 4))
    crew.engines[0].check(running[0])
    crew.each(lambda engine: engine.cache.commit(found[engine.seed], 17))
    assert found[0].block_table[:4] == blocks  # the same tokens: one copy of them is enough
    crew.release(found)
    crew.caches[0].release(running[0])


def part_a_block(crew: Crew) -> list[int]:
    """Return a prompt of which rank 0 has 8 tokens in blocks, and rank 1 the first 6 in a block and a partial one."""
    crew.compute(ids(8))
    crew.lose(1, ids(8), at=1)
    crew.compute([*ids(6), 77], partial_block=True)
    return [*ids(8), 99]


@pytest.mark.parametrize("is_hot", [True, False])
def test_a_hit_is_cut_inside_a_block_that_another_rank_has_only_in_part(open_crew: Open, is_hot: bool) -> None:
    crew = open_crew()
    prompt = part_a_block(crew)
    if not is_hot:
        crew.forget()
    found = crew.start(prompt)
    assert cached(found) == [6, 6]
    crew.release(found)
    found = crew.start([*prompt, 100])
    assert cached(found) == [8, 8]
    crew.release(found)


def test_where_the_part_of_a_block_cannot_be_copied_whole_blocks_are_left_on_all_ranks(
    open_crew: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    crew = open_crew()
    prompt = part_a_block(crew)
    crew.forget()  # so that only the cut copies inside the hot pool

    def fail(*_: object) -> None:
        raise StoreError("no copy")

    monkeypatch.setattr(Mover, "copy", fail)
    found = crew.start(prompt)
    assert cached(found) == [4, 4]
    crew.release(found)


def acquire(token_ids: list[int], error: type[Exception], match: str) -> Callable[[PatternEngine], str]:
    def refused(engine: PatternEngine) -> str:
        with pytest.raises(error, match=match):
            engine.cache.acquire(token_ids)
        return "refused"

    return refused


def test_a_prompt_without_room_on_one_rank_is_refused_on_all(open_crew: Open) -> None:
    crew = open_crew(hot=(16, 4))
    assert crew.each(acquire(ids(17), CapacityError, "hot pool")) == ["refused"] * 2
    found = crew.start(ids(16))
    assert cached(found) == [0, 0]
    crew.release(found)


def test_a_sequence_that_cannot_grow_on_one_rank_grows_on_none(open_crew: Open) -> None:
    crew = open_crew(hot=(16, 4))
    found = crew.start(ids(15))

    def append(engine: PatternEngine) -> tuple[int, int]:
        sequence = found[engine.seed]
        engine.decode(sequence, [15])
        with pytest.raises(CapacityError):
            engine.cache.append(sequence, [16])
        with pytest.raises(CapacityError):
            engine.cache.append(sequence, [17])
        return sequence.num_tokens, len(sequence.block_table)

    assert crew.each(append) == [(16, 4), (16, 4)]
    crew.release(found)


def test_sequences_grow_without_a_vote_while_all_ranks_are_known_to_have_room(open_crew: Open) -> None:
    crew = open_crew(hot=(16, 12))
    found = crew.start(ids(3))
    ranks = [engine.cache.ranks for engine in crew.engines]

    def grow(engine: PatternEngine) -> list[int]:
        group = ranks[engine.seed]
        assert isinstance(group, TorchRanks)
        votes = []
        for number in range(11):
            before = group._num_rounds
            engine.decode(found[engine.seed], ids(SIZE, start=100 + SIZE * number))
            votes.append(group._num_rounds - before)
        before = group._num_rounds
        with pytest.raises(CapacityError):
            engine.cache.append(found[engine.seed], ids(SIZE, start=90))
        return [*votes, group._num_rounds - before]

    assert crew.each(grow) == [[1] + [0] * 10 + [1]] * 2
    assert [len(sequence.block_table) for sequence in found] == [12, 12]
    crew.release(found)


def test_a_fork_without_room_on_one_rank_is_refused_on_all(open_crew: Open) -> None:
    crew = open_crew(hot=(16, 4))
    found = crew.start(ids(15))

    def fork(engine: PatternEngine) -> str:
        with pytest.raises(CapacityError):
            engine.cache.fork(found[engine.seed])
        return "refused"

    assert crew.each(fork) == ["refused"] * 2
    crew.release(found)


def test_a_cut_for_which_one_rank_has_no_room_is_refused_on_all(open_crew: Open) -> None:
    crew = open_crew(hot=(5, 16))
    running = crew.start(ids(16))
    crew.caches[1].release(running[1])
    crew.lose(1, ids(16), at=0)
    assert crew.each(acquire([*ids(16), 99], CapacityError, "hot pool")) == ["refused"] * 2
    crew.engines[0].check(running[0])
    crew.caches[0].release(running[0])


def test_without_reuse_the_ranks_still_agree_on_room(open_crew: Open) -> None:
    crew = open_crew()
    crew.compute(ids(8))
    found = crew.each(lambda engine: engine.cache.acquire(ids(9), reuse=False))
    assert cached(found) == [0, 0]
    crew.release(found)


def test_ranks_that_ask_for_different_prompts_are_told_so(open_crew: Open) -> None:
    crew = open_crew()
    crew.compute(ids(8))
    refused = crew.each(lambda engine: acquire([*ids(8), engine.seed], RankError, "lost step")(engine))
    assert refused == ["refused"] * 2


class Impatient(TorchRanks):
    """Gives up at once in its first round, and says when."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gave_up = threading.Event()
        self._timeout = timedelta(seconds=0.01)

    def agree(self, vote: Votes[int], *, topic: bytes) -> list[Vote] | None:
        agreed = super().agree(vote, topic=topic)
        self._timeout = timedelta(seconds=60)
        self.gave_up.set()
        return agreed


def test_a_rank_that_comes_late_finds_nothing_cached_like_the_one_that_waited(open_crew: Open) -> None:
    open_crew().compute(ids(8))
    crew = open_crew(first=Impatient)
    waiting = crew.caches[0].ranks
    assert isinstance(waiting, Impatient)

    def start(engine: PatternEngine) -> Sequence:
        if engine.seed == 1:
            assert waiting.gave_up.wait(60)
        return engine.start([*ids(8), 99])

    found = crew.each(start)
    assert cached(found) == [0, 0]
    crew.release(found)


def test_ranks_that_stay_silent_are_an_error_and_nothing_leaks(open_crew: Open) -> None:
    crew = open_crew(timeout_s=0.01)
    assert acquire(ids(8), RankError, "no agreement|in time")(crew.engines[0]) == "refused"


def test_a_cache_of_another_slice_than_its_rank_is_refused(tmp_path: Path) -> None:
    config = CacheConfig(block_size=SIZE, hot_bytes=BLOCK_BYTES, warm_bytes=8 * BLOCK_BYTES)
    slices = Namespace(weights="w", layout=tiny_layout(), tp_rank=1, tp_size=2)
    with pytest.raises(ConfigError, match="slice 1 of 2, but this is rank 0 of 1"):
        TierCache(config, namespace=slices)
    with pytest.raises(ConfigError, match="rank 0 of 2"):
        TierCache(config, namespace=slices, ranks=TorchRanks(distributed.HashStore(), rank=0, size=2))


@pytest.mark.parametrize("seed", range(4))
def test_ranks_agree_whatever_each_of_them_loses(open_crew: Open, seed: int) -> None:
    """Random prompts with common beginnings; between them one rank or another forgets and loses blocks."""
    dice = random.Random(seed)
    crew = open_crew(hot=(9, 12, 7), warm=6)
    for _ in range(60):
        prompt = [*ids(dice.randrange(1, 14), start=10 * dice.randrange(2)), *ids(dice.randrange(1, 10), start=50)]
        more, partial_block = ids(dice.randrange(5), start=70), dice.random() < 0.5
        found = crew.start(prompt, partial_block=partial_block)
        assert len(set(cached(found))) == 1
        crew.each(
            lambda engine, found=found, more=more, partial_block=partial_block: engine.decode(
                found[engine.seed], more, partial_block=partial_block
            )
        )
        for engine, sequence in zip(crew.engines, found, strict=True):
            engine.check(sequence)
        crew.release(found)
        for rank in range(crew.count):
            if dice.random() < 0.3:
                crew.forget(rank)
            known = crew.caches[rank].match(prompt).block_hashes
            if known and dice.random() < 0.3:
                crew.flush()
                crew.cold.delete(dice.choice(known))
                if dice.random() < 0.5:
                    crew.caches[rank].evict(Tier.HOT)
                    crew.caches[rank].evict(Tier.WARM)
        crew.flush()
        for cache in crew.caches:
            cache.check()
    assert crew.caches[0].stats().hit_tokens > 0
