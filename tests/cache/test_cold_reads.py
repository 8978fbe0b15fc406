"""Cold blocks are read in a row: the threads go on while a wave of them is copied, and none goes on after a failure."""

from __future__ import annotations

import threading
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pattern_engine import open_tiny, store_prompt

from tierkv.cache import TierCache
from tierkv.storage.outcomes import MissReason
from tierkv.transfer import load
from tierkv.transfer.load import Loader, Promoted
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import Tier

PROMPT = list(range(24 * 4))


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """Return a folder whose store has the prompt's 24 blocks."""
    return store_prompt(tmp_path, PROMPT)


def acquire(cache: TierCache) -> int:
    sequence = cache.acquire([*PROMPT, 7])
    found = sequence.cached_tokens[Tier.COLD]
    cache.release(sequence)
    return found


def test_blocks_behind_a_wave_are_read_while_it_is_copied(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_WAVE_BLOCKS", 4)
    with open_tiny(stored, hot=40, warm=40, num_io_threads=2) as cache:
        assert cache.cold
        count, behind, read, load_places = [0], threading.Event(), cache.cold.read_into, Tiers.load

        def read_into(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] > 4:
                behind.set()
            return read(*arguments, **options)

        def load_later(self: Tiers, *arguments: Any, **options: Any) -> Any:
            assert behind.wait(20), "the threads wait for the copy"
            return load_places(self, *arguments, **options)

        monkeypatch.setattr(cache.cold, "read_into", read_into)
        monkeypatch.setattr(Tiers, "load", load_later)
        assert acquire(cache) == len(PROMPT)
        assert count == [24], "each block once"
        cache.check()


@pytest.mark.parametrize("bad", [0, 5, 8, 23])
def test_reads_behind_a_block_that_fails_leave_no_place_pinned(
    bad: int, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "_WAVE_BLOCKS", 4)
    with open_tiny(stored, hot=40, warm=40, num_io_threads=2) as cache:
        assert cache.cold
        block_hash, read = cache.match(PROMPT).block_hashes[bad], cache.cold.read_into

        def read_into(info: Any, *arguments: Any, **options: Any) -> Any:
            return MissReason.CORRUPT if info.block_hash == block_hash else read(info, *arguments, **options)

        monkeypatch.setattr(cache.cold, "read_into", read_into)
        assert acquire(cache) == 4 * bad
        cache.flush()
        assert cache._tiers.memory.raw is cache._tiers.memory.warm
        cache.check()
        assert not cache._tiers.index.warm.referenced_count - cache._tiers.memory.reserved_raw


@pytest.mark.parametrize("warm", [4, 5, 6])
def test_fewer_warm_places_than_a_wave_are_enough(warm: int, stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_WAVE_BLOCKS", 4)
    with open_tiny(stored, hot=40, warm=warm, num_io_threads=4) as cache:
        assert acquire(cache) == len(PROMPT)
        cache.check()


@pytest.mark.parametrize(
    ("decodes", "most", "most_bytes", "waves"),
    [
        (False, 3, 1000, [(1, 2), (1, 1), (2, 2), (2, 2), (2, 1)]),
        (True, 3, 1000, [(1, 3), (2, 2), (2, 3)]),
        (True, 5, 39, [(1, 3), (2, 2), (2, 3)]),
        (True, 3, 9, [(1, 2), (1, 1), (2, 2), (2, 2), (2, 1)]),
    ],
)
def test_cold_blocks_behind_a_hot_one_are_another_row(
    decodes: bool, most: int, most_bytes: int, waves: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU decodes the last blocks of a row at once, as many as it has memory for."""
    cold, hot = Tier.COLD, Tier.HOT
    hits = [SimpleNamespace(tier=tier) for tier in (cold, cold, cold, hot, cold, cold, cold, cold, cold)]
    pinned = {3: SimpleNamespace(slot=9)}
    loader, result = Loader.__new__(Loader), Promoted()
    memory = SimpleNamespace(decodes_on_gpu=decodes)
    loader._tiers = SimpleNamespace(memory=memory, layout=SimpleNamespace(block_bytes=10))  # type: ignore[assignment]
    rows: list[int] = []
    used: list[tuple[int, int]] = []

    def promote_cold(wave: list[Any], targets: list[int], reads: Any, result: Promoted) -> int:
        used.append((reads.number, len(wave)))
        return len(wave)

    def start_reading(hits: list[Any], pinned: dict[int, Any]) -> Any:
        rows.append(len(hits))
        return nullcontext(SimpleNamespace(number=len(rows)))

    monkeypatch.setattr(load, "_WAVE_BLOCKS", 2)
    monkeypatch.setattr(load, "_LAST_WAVE_BLOCKS", most)
    monkeypatch.setattr(load, "_LAST_WAVE_BYTES", most_bytes)
    monkeypatch.setattr(loader, "_promote_cold", promote_cold)
    monkeypatch.setattr(loader, "_start_reading", start_reading)
    monkeypatch.setattr(loader, "_use_hot", lambda hit, block_id, result: result.hits.append(hit))
    loader._promote_blocks(hits, pinned, deque(range(9)), result)  # type: ignore[arg-type]
    assert rows == [3, 5] and used == waves
    assert result.hits == hits
