"""A block is findable as soon as it is committed, and is used by nobody before it is written, on whatever stream."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.index.tree import Entry
from tierkv.movers.mover import Move, Ready
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

BLOCK_BYTES = tiny_layout().block_bytes
PROMPT = list(range(12))


class Written:
    """The mark of a commit: pending until told otherwise; counts who waits."""

    def __init__(self) -> None:
        self.is_there = False
        self.num_waits = 0

    def wait(self, layer: int | None = None) -> None:
        self.num_waits += 1

    def synchronize(self) -> None:
        self.is_there = True

    def is_done(self) -> bool:
        return self.is_there


@pytest.fixture
def cache() -> Iterator[TierCache]:
    config = CacheConfig(
        block_size=4, hot_bytes=8 * BLOCK_BYTES, warm_bytes=8 * BLOCK_BYTES, write_through=False, cold_path=None
    )
    with TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout())) as opened:
        yield opened


def commit(cache: TierCache, monkeypatch: pytest.MonkeyPatch, prompt: list[int]) -> Written:
    """Compute and commit a prompt on a stream that is far behind; return its mark."""
    mark = Written()
    with monkeypatch.context() as patch:
        patch.setattr(cache._tiers.memory.mover, "mark", lambda: mark)
        cache.release(PatternEngine(cache).start(prompt))
    return mark


def test_a_hot_hit_waits_for_the_commit_until_it_is_through(cache: TierCache, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = commit(cache, monkeypatch, PROMPT)
    early = cache.acquire([*PROMPT, 7])
    assert early.cached_tokens[Tier.HOT] == len(PROMPT)
    assert early.loads == [mark]
    mark.is_there = True
    late = cache.acquire([*PROMPT, 8])
    assert late.cached_tokens[Tier.HOT] == len(PROMPT)
    assert late.loads == []
    assert not cache._tiers.copies.arriving, "what is done is forgotten"
    for sequence in (early, late):
        cache.release(sequence)
    cache.check()


def test_the_last_block_of_a_prompt_is_not_copied_before_it_is_written(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = commit(cache, monkeypatch, PROMPT)
    cache.release(cache.acquire(PROMPT[:11]))  # parts within the third block
    assert mark.num_waits >= 1


def test_a_block_that_is_copied_from_is_not_written_before_the_copy_is_through(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PatternEngine(cache).start(PROMPT)
    source = first.block_table[2]
    cache.release(first)
    mark = Written()
    with monkeypatch.context() as patch:  # as on a GPU, where a copy is only queued when its call returns
        patch.setattr(cache._tiers.memory.mover, "is_cuda", True)
        patch.setattr(cache._tiers.memory.mover, "mark", lambda: mark)
        second = cache.acquire(PROMPT[:11])
        assert cache._tiers.copies._leaving == {source: mark}
    cache.evict(Tier.HOT)
    cache.flush()
    third = cache.acquire(list(range(100, 100 + 4 * 5)), reuse=False)
    assert source in third.block_table
    assert mark.num_waits == 1
    for sequence in (second, third):
        cache.release(sequence)
    cache.check()


def test_a_tail_is_stored_behind_the_copy_that_brought_it(cache: TierCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.release(PatternEngine(cache).start(PROMPT))
    sequence, seen = cache.acquire(PROMPT[:11]), list[str]()
    monkeypatch.setattr(cache._tiers.memory.mover, "mark", lambda: seen.append("mark") or Written())
    load = Written()
    monkeypatch.setattr(load, "wait", lambda layer=None: seen.append("wait"))
    sequence.loads.append(load)
    cache.commit(sequence, sequence.num_cached_tokens, partial_block=True)  # released before its first pass
    assert seen[:2] == ["wait", "mark"]
    cache.release(sequence)


def test_what_a_failing_commit_has_registered_waits_for_it_too(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PatternEngine(cache)
    sequence = cache.acquire(PROMPT)
    engine.compute(sequence, 0)
    mark = Written()

    def tell(kind: object, tier: object, entry: Entry, **options: object) -> None:
        if entry.depth:
            raise RuntimeError("an observer of the second block fails")

    with monkeypatch.context() as patch:
        patch.setattr(cache._tiers.memory.mover, "mark", lambda: mark)
        patch.setattr(cache._tiers.observers, "are_there", True)
        patch.setattr(cache._tiers.observers, "block", tell)
        with pytest.raises(RuntimeError, match="observer"):
            cache.commit(sequence, len(PROMPT))
    found = cache.acquire([*PROMPT[:4], 7])
    assert found.num_cached_tokens == 4
    assert found.loads == [mark]
    for each in (sequence, found):
        cache.release(each)


def test_who_computed_the_same_block_waits_for_the_one_that_he_shares(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PatternEngine(cache)
    second = cache.acquire([*PROMPT, 7])
    engine.compute(second, 0)
    mark = commit(cache, monkeypatch, PROMPT)
    cache.commit(second, len(PROMPT))
    assert second.loads == [mark] * 3
    cache.release(second)
    cache.check()


def test_a_block_is_written_down_behind_its_commit_whoever_evicts_it(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark, demote, seen = commit(cache, monkeypatch, PROMPT), cache._tiers.memory.mover.demote, list[Ready]()

    def note(moves: list[Move], *, after: Ready) -> Ready:
        seen.append(after)
        return demote(moves, after=after)

    monkeypatch.setattr(cache._tiers.memory.mover, "demote", note)
    cache.evict(Tier.HOT)
    cache.flush()
    assert seen == [mark] * 3


def test_a_decode_step_that_completes_no_block_leaves_no_mark(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = PatternEngine(cache)
    sequence = engine.start(PROMPT)
    marks: list[Written] = []
    monkeypatch.setattr(cache._tiers.memory.mover, "mark", lambda: marks.append(Written()) or marks[-1])
    for token in range(4):
        cache.append(sequence, [token])
        cache.commit(sequence, len(PROMPT) + token)
    assert not marks
    assert cache.commit(sequence, len(PROMPT) + 4) == 1
    assert len(marks) == 1
    cache.release(sequence)


def test_blocks_that_the_full_queue_drops_are_counted_and_not_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CacheConfig(block_size=4, hot_bytes=8 * BLOCK_BYTES, warm_bytes=8 * BLOCK_BYTES, cold_path=None)
    with TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout())) as cache:
        queue = cache._offloader._queue
        put_all = queue.try_put_all
        monkeypatch.setattr(queue, "try_put_all", lambda jobs: put_all(jobs[:1]))
        cache.release(PatternEngine(cache).start(PROMPT))
        cache.flush()
        assert cache.stats().skip_reasons["queue_full"] == 2
        assert cache.stats().tiers[Tier.WARM].blocks == 1 + len(cache._offloader.writer.staging)
        cache.check()


def test_a_policy_that_fails_in_a_commit_leaves_no_block_and_a_later_commit_has_them_all(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequence = cache.acquire(PROMPT)
    mark = Written()
    with monkeypatch.context() as patch:
        patch.setattr(cache._tiers.memory.mover, "mark", lambda: mark)
        patch.setattr(cache._tiers.index, "_observe", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cache.commit(sequence, len(PROMPT))
    other = cache.acquire([*PROMPT, 7])
    assert other.num_cached_tokens == 0
    cache.release(other)
    assert cache.commit(sequence, len(PROMPT)) == 3
    cache.release(sequence)
    cache.check()
