"""A cache, a block store and a daemon that have their cold blocks decoded by reader processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from daemon_process import Daemon, Start
from pattern_engine import PatternEngine
from reading import eventually, is_alive

from tierkv import BlockKey, BlockStore, BlockStoreConfig, Buffers, CacheConfig, Namespace, TierCache
from tierkv.block_store.own_tiers import OwnTiers
from tierkv.readers.pool import ReaderPool
from tierkv.values.block import Tier
from tierkv.values.layout import BlockLayout

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=4, kv_heads=64, head_dim=1024, dtype="bfloat16")  # 2 MiB
NAMESPACE = Namespace(weights="w", layout=LAYOUT)
PROMPT = list(range(100, 124))
NUM_BLOCKS = len(PROMPT) // 4


@contextmanager
def open_cache(path: Path, **options: Any) -> Iterator[TierCache]:
    size = LAYOUT.block_bytes
    chosen: dict[str, Any] = {
        "cold_path": path / "store",
        "cold_bytes": 256 << 20,
        "min_free_bytes": 0,
        "warm_bytes": 8 * size,
        "num_reader_processes": 2,
        **options,
    }
    with TierCache(CacheConfig(block_size=4, hot_bytes=10 * size, **chosen), namespace=NAMESPACE) as cache:
        yield cache


def readers_of(cache: TierCache) -> ReaderPool:
    readers = cache._tiers.memory.readers
    assert readers
    return readers


def store_prompt(path: Path) -> None:
    with open_cache(path, num_reader_processes=0) as cache:
        cache.release(PatternEngine(cache).start([*PROMPT, 7]))


@pytest.mark.parametrize("overlap", [False, True], ids=["load", "overlap"])
@pytest.mark.parametrize("warm_codec", ["raw", "windows"])
def test_a_cache_has_its_cold_blocks_decoded_by_processes(tmp_path: Path, warm_codec: str, overlap: bool) -> None:
    store_prompt(tmp_path)
    with open_cache(tmp_path, warm_codec=warm_codec, warm_bytes=32 << 20) as cache:
        readers = readers_of(cache)
        eventually(lambda: readers.stats().ready == 2)
        pids = readers.pids()
        cache.release(PatternEngine(cache).start([*PROMPT, 7], overlap=overlap))
        assert readers.stats().blocks >= (1 if overlap else NUM_BLOCKS)
        assert readers.stats().failed == 0
    assert not any(map(is_alive, pids))


def test_a_cache_prefetches_with_processes(tmp_path: Path) -> None:
    store_prompt(tmp_path)
    with open_cache(tmp_path, warm_bytes=16 * LAYOUT.block_bytes) as cache:
        readers = readers_of(cache)
        eventually(lambda: readers.stats().ready == 2)
        assert cache.prefetch([*PROMPT, 7]).result() == NUM_BLOCKS
        assert readers.stats().blocks == NUM_BLOCKS
        cache.release(PatternEngine(cache).start([*PROMPT, 7]))


def test_an_empty_store_starts_processes_at_its_first_large_read(tmp_path: Path) -> None:
    with open_cache(tmp_path) as cache:
        readers = readers_of(cache)
        cache.release(PatternEngine(cache).start([*PROMPT, 7]))
        cache.flush()
        assert readers.stats().processes == 0
        cache.evict(Tier.HOT)
        cache.evict(Tier.WARM)
        cache.release(PatternEngine(cache).start([*PROMPT, 7]))
        eventually(lambda: readers.stats().ready == 2)


def test_a_request_at_once_after_opening_waits_for_no_process(tmp_path: Path) -> None:
    store_prompt(tmp_path)
    with open_cache(tmp_path) as cache:
        sequence = PatternEngine(cache).start([*PROMPT, 7])
        assert sequence.num_cached_tokens == len(PROMPT)
        assert readers_of(cache).stats().blocks < NUM_BLOCKS
        cache.release(sequence)


def test_a_cache_goes_on_without_its_processes(tmp_path: Path) -> None:
    store_prompt(tmp_path)
    with open_cache(tmp_path) as cache:
        readers = readers_of(cache)
        eventually(lambda: readers.stats().ready == 2)
        for pid in readers.pids():
            os.kill(pid, signal.SIGKILL)
        sequence = PatternEngine(cache).start([*PROMPT, 7])
        assert sequence.num_cached_tokens == len(PROMPT)
        cache.release(sequence)
        assert (readers.stats().failed, readers.stats().processes, readers.stats().blocks) == (2, 0, 0)


@pytest.mark.parametrize(
    "options", [{"num_reader_processes": 0}, {"cold_path": None, "cold_bytes": None}], ids=["none", "no store"]
)
def test_a_cache_that_wants_no_processes_or_has_no_store_starts_none(tmp_path: Path, options: dict[str, Any]) -> None:
    with open_cache(tmp_path, **options) as cache:
        assert cache._tiers.memory.readers is None
        assert cache._tiers.memory.read_threads is cache._tiers.memory.threads


def test_reads_have_a_thread_for_each_process_and_encoding_has_no_more(tmp_path: Path) -> None:
    with open_cache(tmp_path, num_io_threads=1, num_reader_processes=3) as cache:
        memory = cache._tiers.memory
        assert (memory.threads.num_threads, memory.read_threads.num_threads) == (1, 3)


def test_a_block_store_has_its_cold_blocks_decoded_by_processes(tmp_path: Path) -> None:
    size = LAYOUT.block_bytes
    config: dict[str, Any] = {"cold_path": tmp_path / "store", "warm_bytes": 16 * size, "cold_bytes": 256 << 20}
    values = np.random.default_rng(0).standard_normal(NUM_BLOCKS * size // 2).astype(np.float32)
    blocks = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(NUM_BLOCKS, size)
    with BlockStore(BlockStoreConfig(**config, num_reader_processes=0), namespace=NAMESPACE) as store:
        keys: list[BlockKey] = list(store.keys(PROMPT))
        assert store.save(keys, Buffers([block.tobytes() for block in blocks])).num_saved == NUM_BLOCKS
    with BlockStore(BlockStoreConfig(**config, num_reader_processes=2), namespace=NAMESPACE) as store:
        tiers = store._tiers
        assert isinstance(tiers, OwnTiers) and tiers.memory and tiers.memory.readers
        readers = tiers.memory.readers
        eventually(lambda: readers.stats().ready == 2)
        pids = readers.pids()
        out = [bytearray(size) for _ in keys]
        loaded = store.load(store.reserve(keys), Buffers(out))
        loaded.synchronize()
        assert loaded.num_loaded == NUM_BLOCKS
        assert [bytes(each) for each in out] == [block.tobytes() for block in blocks]
        assert readers.stats().blocks == NUM_BLOCKS
    assert not any(map(is_alive, pids))


def test_a_block_store_that_only_looks_up_starts_no_process(tmp_path: Path) -> None:
    config = BlockStoreConfig(cold_path=tmp_path / "store", warm_bytes=0, num_reader_processes=2)
    with BlockStore(config, namespace=NAMESPACE) as store:
        assert isinstance(store._tiers, OwnTiers)
        assert store._tiers.memory is None


def children_of(daemon: Daemon) -> list[int]:
    assert daemon.process
    found: list[int] = []
    for task in Path(f"/proc/{daemon.process.pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def start_sequence(daemon: Daemon, token_ids: list[int]) -> int:
    """Start a request and end it. Return how many of its tokens were cached; all were compared."""
    config = CacheConfig(block_size=4, hot_bytes=10 * LAYOUT.block_bytes, socket=daemon.socket)
    with TierCache(config, namespace=NAMESPACE) as cache:
        sequence = PatternEngine(cache).start(token_ids)
        cache.release(sequence)
        cache.flush()
        return sequence.num_cached_tokens


def test_a_daemon_has_its_cold_blocks_decoded_by_processes(start_daemon: Start) -> None:
    prompts = [[start, *PROMPT[1:], 7] for start in (1, 2, 3)]
    daemon = start_daemon(slots=64 << 10, cold_bytes=256 << 20, num_reader_processes=2)
    for prompt in prompts:
        assert start_sequence(daemon, prompt) == 0
    assert children_of(daemon) == []
    eventually(lambda: daemon.status().cold["blocks"] == 3 * NUM_BLOCKS)
    daemon.kill()
    daemon.start()
    assert start_sequence(daemon, prompts[0]) == len(PROMPT)  # it starts the processes
    eventually(lambda: daemon.status().counters["reader_processes"] == 2)
    pids = children_of(daemon)
    assert len(pids) == 2
    before = daemon.status().counters["reader_blocks"]
    assert start_sequence(daemon, prompts[1]) == len(PROMPT)
    assert daemon.status().counters["reader_blocks"] == before + NUM_BLOCKS
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert start_sequence(daemon, prompts[2]) == len(PROMPT)
    assert daemon.status().counters["reader_failures"] == 2


def test_a_stopped_or_killed_daemon_leaves_no_process(start_daemon: Start) -> None:
    daemon = start_daemon(slots=64 << 10, cold_bytes=256 << 20, num_reader_processes=2)
    for number in (signal.SIGTERM, signal.SIGKILL):
        start_sequence(daemon, [*PROMPT, 7])
        eventually(lambda: daemon.status().cold["blocks"] == NUM_BLOCKS)
        daemon.kill()
        daemon.start()
        start_sequence(daemon, [*PROMPT, 7])
        eventually(lambda: daemon.status().counters["reader_processes"] == 2)
        pids = children_of(daemon)
        assert daemon.process
        begun = time.monotonic()
        daemon.process.send_signal(number)
        daemon.process.wait(30)
        assert time.monotonic() - begun < 10
        eventually(lambda pids=pids: not any(map(_runs, pids)), timeout_s=10)  # type: ignore[misc]
        daemon.kill()
        daemon.start()


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
