"""Memory of a copy or a kernel in flight is not reused before it has ended: on streams of a GPU.

The same without a GPU: tests/cache/test_copies_in_flight.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

DEVICE = "cuda"
BLOCK_BYTES = tiny_layout().block_bytes
PROMPT = list(range(8))
LONG = 2_000_000_000  # cycles: about a second, longer than anything that the test does meanwhile


@pytest.fixture
def cache() -> Iterator[TierCache]:
    config = CacheConfig(block_size=4, hot_bytes=4 * BLOCK_BYTES, warm_bytes=4 * BLOCK_BYTES)
    with TierCache(config, namespace=Namespace(weights="w", layout=tiny_layout()), device=DEVICE) as opened:
        yield opened
        torch.cuda.synchronize()


@pytest.fixture
def warm(cache: TierCache) -> TierCache:
    """Return a cache that has the prompt's two blocks in its warm tier alone, and nothing in flight."""
    cache.release(PatternEngine(cache).start([*PROMPT, 9]))
    cache.flush()
    cache.evict(Tier.HOT)
    torch.cuda.synchronize()
    assert cache.match([*PROMPT, 9]).blocks[Tier.WARM] == 2
    return cache


def delay(stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)


def test_warm_slots_stay_until_the_copy_that_reads_them_is_through(warm: TierCache) -> None:
    """Plant: in `Copies.reap`, take away `and self.in_flight[0][0].is_done()`."""
    delay(warm._tiers.memory.mover.load_stream)
    sequence = warm.acquire([*PROMPT, 9])  # its copy waits behind the delay
    assert sequence.cached_tokens[Tier.WARM] == 8
    assert warm.evict(Tier.WARM) == 0, "a copy still reads them"
    with warm._tiers.changed:
        free = warm._tiers.try_take_warm(4)
        for slot in free:  # what others would write there
            warm._tiers.memory.warm.slots[slot] = 0xFF
    PatternEngine(warm).check(sequence, 8)
    torch.cuda.synchronize()
    warm._tiers.unpin_all(Tier.WARM, free)
    warm.release(sequence)
    assert warm.evict(Tier.WARM) == 2
    warm.check()


def test_a_released_block_is_written_again_only_behind_its_last_user(cache: TierCache) -> None:
    """Plant: in `Copies.leave`, take away the `update`; or in `wait_for_users`, the line with `self._leaving.pop`."""
    engine, side = PatternEngine(cache), torch.cuda.Stream()
    sequence = cache.acquire(list(range(16)), reuse=False)
    block_ids = list(sequence.block_table)
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for block_id in block_ids:
            cache.hot.blocks[block_id].fill_(7)
        cache.release(sequence)
    again = cache.acquire(list(range(100, 116)), reuse=False)
    assert sorted(again.block_table) == sorted(block_ids)
    engine.compute(again, 0)
    torch.cuda.synchronize()
    engine.check(again)
    cache.release(again)


def test_a_block_is_written_again_only_behind_the_copy_that_still_brings_another(warm: TierCache) -> None:
    """Plant: in `Copies.wait_for_users`, take away the line with `self.arriving.pop`; or in `Copies.reap` as above."""
    engine = PatternEngine(warm)
    delay(warm._tiers.memory.mover.load_stream)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        warm.release(warm.acquire([*PROMPT, 9]))  # given up while its copy waits behind the delay
    warm.evict(Tier.HOT)
    sequence = warm.acquire(list(range(100, 116)), reuse=False)  # takes all four blocks
    engine.compute(sequence, 0)
    torch.cuda.synchronize()
    engine.check(sequence)
    warm.release(sequence)


def test_a_hot_hit_waits_for_the_commit_of_another_stream(cache: TierCache) -> None:
    """Plant: in `Copies.reap`, take away `and self._computing[0][0].is_done()`."""
    side = torch.cuda.Stream()
    sequence = cache.acquire([*PROMPT, 9])
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for block_id in sequence.block_table:
            cache.hot.blocks[block_id].fill_(7)  # no copy from the CPU, which the host would wait for
        cache.commit(sequence, 8)
    found = cache.acquire([*PROMPT, 10])
    assert found.cached_tokens[Tier.HOT] == 8
    found.wait_all()
    assert torch.all(cache.hot.blocks[found.block_table[:2]] == 7)
    for each in (sequence, found):
        cache.release(each)
