"""Memory of a copy in flight is not reused before the copy has ended: `leave`, `track` and `reap`.

The same on a GPU, with its streams: tests/gpu/test_copies_in_flight_gpu.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.movers.mover import Move, Ready
from tierkv.transfer.tiers import Place
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

BLOCK_BYTES = tiny_layout().block_bytes
PROMPT = list(range(8))


class Copy:
    """A copy that is through when the test says so; `users` counts the streams that were made to wait for it."""

    def __init__(self) -> None:
        self.is_through = False
        self.users = 0

    def wait(self, layer: int | None = None) -> None:
        self.users += 1

    def synchronize(self) -> None:
        self.is_through = True

    def is_done(self) -> bool:
        return self.is_through


@pytest.fixture
def cache() -> Iterator[TierCache]:
    config = CacheConfig(block_size=4, hot_bytes=4 * BLOCK_BYTES, warm_bytes=4 * BLOCK_BYTES)
    with TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout())) as opened:
        yield opened


@pytest.fixture
def warm(cache: TierCache) -> TierCache:
    """Return a cache that has the prompt's two blocks in its warm tier alone."""
    cache.release(PatternEngine(cache).start([*PROMPT, 9]))
    cache.flush()
    cache.evict(Tier.HOT)
    assert cache.match([*PROMPT, 9]).blocks[Tier.WARM] == 2
    return cache


def hold_promotions(cache: TierCache, monkeypatch: pytest.MonkeyPatch) -> list[Copy]:
    """Return the copies up that are begun from here on, none of them through."""
    begun: list[Copy] = []
    promote = cache._tiers.memory.mover.promote

    def held(moves: list[Move], *, after: Ready | None = None) -> Copy:
        promote(moves, after=after)
        begun.append(Copy())
        return begun[-1]

    monkeypatch.setattr(cache._tiers.memory.mover, "promote", held)
    return begun


def test_warm_slots_stay_until_the_copy_that_reads_them_is_through(
    warm: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = hold_promotions(warm, monkeypatch)
    sequence = warm.acquire([*PROMPT, 9])
    assert warm.evict(Tier.WARM) == 0, "a copy still reads them"
    (copy,) = begun
    copy.is_through = True
    assert warm.evict(Tier.WARM) == 2
    warm.release(sequence)


def test_copies_end_in_order_and_each_gives_up_its_own_places(warm: TierCache) -> None:
    tiers = warm._tiers
    first, second = Copy(), Copy()
    with tiers.changed:
        slots = [slot for slot, owner in enumerate(tiers.index.warm.owners) if owner]
        for copy, slot in zip((first, second), slots, strict=True):
            tiers.index.warm.pin(slot)
            tiers.track(copy, [Place(Tier.WARM, slot)], [])
        second.is_through = True
        tiers.reap()
        assert [tiers.index.warm.reference_count(slot) for slot in slots] == [1, 1]
        first.is_through = True
        tiers.reap()
        assert [tiers.index.warm.reference_count(slot) for slot in slots] == [0, 0]


@pytest.mark.parametrize("way", ["copy", "commit"])
def test_a_block_that_something_newer_writes_is_waited_for_although_the_older_is_through(
    cache: TierCache, way: str
) -> None:
    tiers = cache._tiers
    older, newer = Copy(), Copy()
    with tiers.changed:
        if way == "copy":
            tiers.track(older, [], [3])
        else:
            tiers.copies.note_computing([3], older)
        tiers.reap()
        assert tiers.copies.arriving == {3: older}
        tiers.track(newer, [], [3])
        older.is_through = True
        tiers.reap()
        assert tiers.copies.arriving == {3: newer}
        newer.is_through = True
        tiers.reap()
        assert tiers.copies.arriving == {}


def test_a_released_block_is_taken_again_only_behind_its_last_user(
    cache: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = Copy()
    sequence = cache.acquire(list(range(16)), reuse=False)
    with monkeypatch.context() as patch:  # as on a GPU, where a stream may be far behind
        patch.setattr(cache._tiers.memory.mover, "is_cuda", True)
        patch.setattr(cache._tiers.memory.mover, "mark", lambda: used)
        cache.release(sequence)
    assert used.users == 0
    again = cache.acquire(list(range(16)), reuse=False)
    assert used.users == 1, "the stream that takes the blocks waits, once for all of them"
    cache.release(again)
    cache.release(cache.acquire(list(range(16)), reuse=False))
    assert used.users == 1, "and no later user"


def test_a_block_is_taken_again_only_behind_the_copy_that_still_writes_it(
    warm: TierCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = hold_promotions(warm, monkeypatch)
    warm.release(warm.acquire([*PROMPT, 9]))  # begun and given up, the copy still under way
    (copy,) = begun
    waited = copy.users
    warm.evict(Tier.HOT)
    sequence = warm.acquire(list(range(100, 116)), reuse=False)  # takes all four blocks
    assert copy.users == waited + 1
    copy.is_through = True
    warm.release(sequence)
