"""Ranks that compute the same blocks: one of them writes, all load what it wrote, and none takes slices for that."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from daemon_process import BLOCK_BYTES, Start
from pattern_engine import PatternEngine, tiny_layout
from torch import distributed

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.ranks.hosts import count_on_host, is_first_with, place_of
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.values.block import Tier
from tierkv.values.namespace import REPLICATED, Namespace

NAMESPACE = Namespace(weights="w", layout=tiny_layout(), architecture={REPLICATED: True})
PROMPT = list(range(17))
SIZE = 3


class Replicas:
    """The ranks of one model that hold the same, each with a thread, a cache and an engine."""

    def __init__(self, engines: list[PatternEngine], threads: list[ThreadPoolExecutor]) -> None:
        self.engines = engines
        self._threads = threads

    def start(self, prompt: list[int]) -> list[Sequence]:
        futures = [
            thread.submit(engine.start, prompt) for thread, engine in zip(self._threads, self.engines, strict=True)
        ]
        return [future.result(60) for future in futures]

    def compute(self, prompt: list[int]) -> None:
        self.release(self.start(prompt))

    def release(self, sequences: list[Sequence]) -> None:
        for engine, sequence in zip(self.engines, sequences, strict=True):
            engine.cache.release(sequence)
            engine.cache.flush()

    def written(self) -> list[int]:
        return [engine.cache.stats().tiers[Tier.COLD].bytes_in for engine in self.engines]


@contextmanager
def replicas(configs: list[CacheConfig], *, cold: ColdStore | None = None) -> Iterator[Replicas]:
    votes = distributed.HashStore()
    with ExitStack() as opened:
        threads = [opened.enter_context(ThreadPoolExecutor(1)) for _ in configs]

        def open_one(rank: int) -> TierCache:
            ranks = TorchRanks(votes, rank=rank, size=len(configs), timeout_s=60)
            return TierCache(configs[rank], namespace=NAMESPACE, ranks=ranks, cold=cold)

        futures = [thread.submit(open_one, rank) for rank, thread in enumerate(threads)]
        caches = [opened.enter_context(future.result(60)) for future in futures]
        yield Replicas([PatternEngine(cache, seed=0) for cache in caches], threads)
        for cache in caches:
            cache.check()


def config_of(path: Path | None = None, *, socket: Path | None = None) -> CacheConfig:
    return CacheConfig(
        block_size=4,
        hot_bytes=16 * BLOCK_BYTES,
        warm_bytes=8 * BLOCK_BYTES,
        cold_path=path,
        socket=socket,
        num_io_threads=1,
    )


def test_the_first_rank_writes_and_every_rank_loads_the_same_records(tmp_path: Path) -> None:
    with ColdStore(tmp_path / "store", quota_bytes=64 << 20, min_free_bytes=0) as cold:
        with replicas([config_of()] * SIZE, cold=cold) as ranks:
            ranks.compute(PROMPT)
            assert ranks.written() == [4 * BLOCK_BYTES, 0, 0]
            assert cold.stats().blocks == 4
        with replicas([config_of()] * SIZE, cold=cold) as ranks:
            found = ranks.start(PROMPT)  # the engines check every byte
            assert [sequence.cached_tokens[Tier.COLD] for sequence in found] == [16] * SIZE
            ranks.release(found)
            assert ranks.written() == [0] * SIZE


def test_a_rank_that_does_not_write_still_keeps_its_blocks_in_its_own_memory(tmp_path: Path) -> None:
    cold = ColdStore(tmp_path / "store", quota_bytes=64 << 20, min_free_bytes=0)
    with cold, replicas([config_of()] * SIZE, cold=cold) as ranks:
        ranks.compute(PROMPT)
        for engine in ranks.engines:
            engine.cache.evict(Tier.HOT)
        found = ranks.start(PROMPT)
        assert [sequence.cached_tokens[Tier.WARM] for sequence in found] == [16] * SIZE
        ranks.release(found)


def test_each_store_has_a_rank_that_writes_to_it(tmp_path: Path) -> None:
    names = ["left", "right", "left", "right"]
    stores = {name: ColdStore(tmp_path / name, quota_bytes=64 << 20, min_free_bytes=0) for name in dict.fromkeys(names)}
    votes = distributed.HashStore()
    with ExitStack() as opened, ThreadPoolExecutor(4) as threads:
        for store in stores.values():
            opened.enter_context(store)

        def is_first(rank: int) -> bool:
            ranks = TorchRanks(votes, rank=rank, size=4)
            return is_first_with(ranks, place_of(stores[names[rank]].path))

        assert list(threads.map(is_first, range(4))) == [True, True, False, False]


def test_ranks_of_this_machine_count_themselves() -> None:
    votes = distributed.HashStore()
    with ThreadPoolExecutor(3) as threads:
        found = threads.map(lambda rank: count_on_host(TorchRanks(votes, rank=rank, size=3)), range(3))
        assert list(found) == [3, 3, 3]


def test_a_daemon_gets_each_block_from_one_rank_and_reads_it_once_for_all(start_daemon: Start) -> None:
    daemon = start_daemon()
    configs = [config_of(socket=daemon.socket)] * SIZE
    with replicas(configs) as ranks:
        ranks.compute(PROMPT)
        sent = [engine.cache.stats().tiers[Tier.WARM].bytes_in for engine in ranks.engines]
        assert sent == [4 * BLOCK_BYTES, 0, 0]
    daemon.kill()  # what is in its memory only is gone
    daemon.start()
    with replicas(configs) as ranks:
        found = ranks.start(PROMPT)
        assert [sequence.num_cached_tokens for sequence in found] == [16] * SIZE
        ranks.release(found)
        assert daemon.status().counters["loaded_blocks"] == 4


def test_namespaces_that_differ_between_ranks_are_refused(tmp_path: Path) -> None:
    votes = distributed.HashStore()
    with ThreadPoolExecutor(2) as threads:

        def refuse(rank: int) -> str:
            ranks = TorchRanks(votes, rank=rank, size=2, timeout_s=60)
            namespace = replace(NAMESPACE, weights=f"w{rank}")
            with pytest.raises(ConfigError, match="namespaces differ"):
                TierCache(config_of(tmp_path / f"store{rank}"), namespace=namespace, ranks=ranks)
            return "refused"

        assert list(threads.map(refuse, range(2))) == ["refused"] * 2


def test_blocks_that_are_not_said_to_be_replicated_need_a_slice_for_each_rank() -> None:
    namespace = Namespace(weights="w", layout=tiny_layout())
    with pytest.raises(ConfigError, match="slice 0 of 1, but this is rank 0 of 2"):
        TierCache(config_of(), namespace=namespace, ranks=TorchRanks(distributed.HashStore(), rank=0, size=2))
