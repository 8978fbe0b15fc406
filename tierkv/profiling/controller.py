"""MemoryController: reads and changes the memory settings of a cache while it works."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from tierkv.cache import TierCache
from tierkv.errors import ConfigError
from tierkv.policies import EvictionPolicy, make_policy
from tierkv.profiling.profiler import MemoryProfiler
from tierkv.requests.block_control import BlockReport
from tierkv.requests.defragment import LayoutReport
from tierkv.requests.sequence import Sequence as RunningSequence
from tierkv.transfer.offload import Offloading
from tierkv.values.block import Tier
from tierkv.values.checks import check_count

__all__ = ["MemoryController"]


class Engine(Protocol):
    """Runs a model over a cache, and can be paused between two steps. Runner satisfies it."""

    @property
    def cache(self) -> TierCache: ...
    def between_steps(self) -> AbstractContextManager[list[RunningSequence]]:
        """Pause generation, and yield the sequences whose block tables may be rewritten."""


class MemoryController:
    """Controls the memory of one cache, a runner's or one by itself. Thread-safe.

    over: a runner or a cache. Without it, settings are kept until `attach` names it, and the other methods raise
    ConfigError.

    >>> controller = MemoryController(cache)
    >>> controller.set_memory_budget(64 * cache.layout.block_bytes)  # blocks over the budget that are still in use
    0
    """

    def __init__(self, over: Engine | TierCache | None = None) -> None:
        self._engine: Engine | None = None
        self._cache: TierCache | None = None
        self._budget_bytes: int | None = None
        self._policy: str | EvictionPolicy | None = None
        self._offloading: Offloading | None = None
        if over is not None:
            self.attach(over)

    def attach(self, over: Engine | TierCache) -> None:
        """Control this runner or cache from now on, by the settings made so far. One cache to a controller."""
        if self._cache is not None:
            raise ConfigError("this controller has a cache already", hint="use one controller for each cache")
        self._engine = None if isinstance(over, TierCache) else over
        self._cache = over if isinstance(over, TierCache) else over.cache
        if self._policy is not None:
            self._cache.set_eviction_policy(self._policy)
        if self._offloading:
            self._cache.blocks.set_offloading(self._offloading)
        if self._budget_bytes is not None:
            self._apply_budget(self._cache, self._budget_bytes)

    @property
    def cache(self) -> TierCache:
        """The cache that is controlled. Raises ConfigError while there is none."""
        if self._cache is None:
            raise ConfigError("the controller has no cache", hint="MemoryController(runner), or attach(runner)")
        return self._cache

    def set_memory_budget(self, num_bytes: int) -> int:
        """Let hot blocks take at most so many bytes from now on, in whole blocks, and no more than the pool has.

        Blocks beyond the budget are demoted or evicted before this returns. Return how many remain beyond it because
        sequences use them or they are pinned; those are evicted as soon as they are not. The pool keeps its memory.
        Raises ConfigError for a budget below one block (below one byte while there is no cache).
        """
        num_bytes = check_count("a memory budget", num_bytes, least=1, hint="in bytes, as 8 << 30")
        excess = self._apply_budget(self._cache, num_bytes) if self._cache else 0
        self._budget_bytes = num_bytes
        return excess

    def set_eviction_policy(self, policy: str | EvictionPolicy) -> None:
        """Choose the blocks to evict by another policy: a name that `make_policy` knows, or an object."""
        chosen = make_policy(policy) if isinstance(policy, str) else policy
        if self._cache:
            self._cache.set_eviction_policy(chosen)
        self._policy = chosen

    def enable_cpu_offloading(self, offload_threshold: float = 0.9, offload_ratio: float = 0.2) -> None:
        """Demote ahead of need: when more than `offload_threshold` of the budget is used, demote part of the cache.

        offload_ratio: share of the cached blocks that no sequence uses. The write thread demotes them in the
        background; a block that no lower tier can take stays hot.
        """
        self._offloading = Offloading(threshold=offload_threshold, ratio=offload_ratio)
        if self._cache:
            self._cache.blocks.set_offloading(self._offloading)

    def disable_cpu_offloading(self) -> None:
        """Demote only when a request needs the room."""
        self._offloading = None
        if self._cache:
            self._cache.blocks.set_offloading(None)

    def get_memory_stats(self) -> dict[str, Any]:
        """Return the cache's sizes and hit rates, as plain values by name.

        Shares lie between 0 and 1. fragmentation: 0 where the free hot blocks are one run. budget_bytes: for hot
        blocks; over_budget_bytes: of hot blocks beyond it, because they are in use or pinned. peak_bytes: the most
        that hot blocks took at a time. tiers: by name, each with hits, hit_rate (of all blocks asked for), blocks,
        used_bytes, stored_bytes, capacity_bytes, evictions, bytes_in and bytes_out.
        """
        stats, blocks, size = self.cache.stats(), self.cache.blocks, self.cache.layout.block_bytes
        hot, budget = stats.tiers[Tier.HOT], blocks.limit * size
        asked = stats.hits + stats.misses
        return {
            "cache_hit_rate": stats.hit_rate,
            "token_hit_rate": stats.token_hit_rate,
            "requests": stats.requests,
            "hits": stats.hits,
            "misses": stats.misses,
            "miss_reasons": dict(stats.miss_reasons),
            "fragmentation": stats.fragmentation_ratio,
            "avg_shared_blocks": stats.avg_shared_blocks,
            "eviction_count": stats.eviction_count,
            "skipped_writes": stats.skipped_writes,
            "block_bytes": size,
            "block_size": self.cache.config.block_size,
            "budget_bytes": budget,
            "budget_blocks": blocks.limit,
            "over_budget_bytes": max(0, hot.used_bytes - budget),
            "over_budget_blocks": max(0, hot.blocks - blocks.limit),
            "used_bytes": hot.used_bytes,
            "peak_bytes": blocks.peak_count * size,
            "peak_blocks": blocks.peak_count,
            "tiers": {
                tier.value: {
                    "hits": each.hits,
                    "hit_rate": each.hits / asked if asked else 0.0,
                    "hit_tokens": each.hit_tokens,
                    "blocks": each.blocks,
                    "used_bytes": each.used_bytes,
                    "stored_bytes": each.stored_bytes,
                    "capacity_bytes": each.capacity_bytes,
                    "evictions": each.evictions,
                    "bytes_in": each.bytes_in,
                    "bytes_out": each.bytes_out,
                }
                for tier, each in stats.tiers.items()
            },
        }

    def manual_cache_management(
        self,
        evict_blocks: Sequence[int] | None = None,
        pin_blocks: Sequence[int] | None = None,
        offload_blocks: Sequence[int] | None = None,
    ) -> BlockReport:
        """Pin, offload and evict blocks of the hot pool by their ids; return what became of each.

        `cache.blocks.inspect()` lists the blocks; `cache.blocks.unpin` removes pins. A refused block, in use for
        example, is in the report; an id outside the pool raises ConfigError.
        """
        return self.cache.blocks.manual_cache_management(evict_blocks, pin_blocks, offload_blocks)

    def optimize_memory_layout(self) -> LayoutReport:
        """Defragment the hot pool: chains lie in contiguous runs, free blocks in one. Return what was moved.

        A runner is paused between two steps meanwhile, and its running sequences move too. With a cache alone, blocks
        of running sequences stay, because a step may be using them; `cache.defragment(running)` moves them. Block ids
        that were read before name other blocks afterwards. Raises StoreError if a copy fails.
        """
        if self._engine is None:
            return self.cache.defragment()
        with self._engine.between_steps() as running:
            return self.cache.defragment(running)

    @contextmanager
    def profile(self) -> Iterator[MemoryProfiler]:
        """Observe the cache within a with-statement; the profiler's report can be made inside or afterwards."""
        with MemoryProfiler(self.cache) as profiler:
            yield profiler

    @staticmethod
    def _apply_budget(cache: TierCache, num_bytes: int) -> int:
        return cache.blocks.set_limit(num_bytes // cache.layout.block_bytes)
