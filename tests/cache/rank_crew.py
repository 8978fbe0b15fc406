"""The ranks of one model, each with a cache and an engine in a thread of its own, over one store."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from pattern_engine import PatternEngine, tiny_layout
from torch import distributed

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.requests.sequence import Sequence
from tierkv.storage.cold import ColdStore
from tierkv.values.block import Tier
from tierkv.values.namespace import Namespace

__all__ = ["BLOCK_BYTES", "DEVICES", "SIZE", "Crew", "cached", "ids"]

T = TypeVar("T")
SIZE = 4
BLOCK_BYTES = tiny_layout(block_size=SIZE).block_bytes
DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


class Crew:
    """The ranks of one model, each with a thread, a cache and an engine of its own."""

    def __init__(
        self,
        store: Path,
        device: str,
        *,
        hot: tuple[int, ...],
        warm: int,
        timeout_s: float,
        first: type[TorchRanks] = TorchRanks,
        **options: Any,
    ) -> None:
        votes = distributed.HashStore()
        self.count = len(hot)
        self.cold = ColdStore(store, quota_bytes=64 << 20, min_free_bytes=0)
        self.threads = [ThreadPoolExecutor(1) for _ in hot]
        self.caches: list[TierCache] = []
        for rank, num_hot in enumerate(hot):
            config = CacheConfig(
                block_size=SIZE,
                hot_bytes=num_hot * BLOCK_BYTES,
                warm_bytes=warm * BLOCK_BYTES,
                num_io_threads=1,
                **options,
            )
            namespace = Namespace(weights="w", layout=tiny_layout(), tp_rank=rank, tp_size=self.count)
            group = TorchRanks if rank else first
            ranks = group(votes, rank=rank, size=self.count, timeout_s=timeout_s)
            self.caches.append(TierCache(config, namespace=namespace, device=device, cold=self.cold, ranks=ranks))
        self.engines = [PatternEngine(cache, seed=rank) for rank, cache in enumerate(self.caches)]

    def each(self, call: Callable[[PatternEngine], T]) -> list[T]:
        """Let every rank do the same at the same time."""
        futures = [thread.submit(call, engine) for thread, engine in zip(self.threads, self.engines, strict=True)]
        return [future.result(120) for future in futures]

    def start(self, token_ids: list[int], *, partial_block: bool = False) -> list[Sequence]:
        return self.each(lambda engine: engine.start(token_ids, partial_block=partial_block))

    def release(self, sequences: list[Sequence]) -> None:
        for cache, sequence in zip(self.caches, sequences, strict=True):
            cache.release(sequence)

    def compute(self, token_ids: list[int], *, partial_block: bool = False) -> None:
        self.release(self.start(token_ids, partial_block=partial_block))
        self.flush()

    def flush(self) -> None:
        for cache in self.caches:
            cache.flush()

    def forget(self, *ranks: int) -> None:
        """Leave the ranks what lies in the cold tier."""
        self.flush()
        for rank in ranks or range(self.count):
            self.caches[rank].evict(Tier.HOT)
            self.caches[rank].evict(Tier.WARM)

    def lose(self, rank: int, token_ids: list[int], at: int) -> None:
        """Take the block `at` of a prompt, and so what follows it, out of one rank's cold tier."""
        self.forget(rank)
        assert self.cold.delete(self.caches[rank].match(token_ids).block_hashes[at])

    def close(self) -> None:
        for cache in self.caches:
            cache.check()
            cache.close()
        for thread in self.threads:
            thread.shutdown()
        self.cold.close()


def ids(count: int, start: int = 0) -> list[int]:
    return list(range(start, start + count))


def cached(sequences: list[Sequence]) -> list[int]:
    return [sequence.num_cached_tokens for sequence in sequences]
