"""MemoryController: one place to say how much memory the cache may use, what goes first, and to look at the outcome."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tierkv.block import Tier
from tierkv.block_control import BlockReport
from tierkv.cache import TierCache
from tierkv.defragment import LayoutReport
from tierkv.errors import ConfigError
from tierkv.policies import EvictionPolicy
from tierkv.profiler import MemoryProfiler

__all__ = ["MemoryController"]


class MemoryController:
    """Steers one cache. Made without one it keeps what is set until `attach`. Thread-safe as the cache is.

    Source: the control interface of the project's plan; the names are those people look for.
    """

    def __init__(self, cache: TierCache | None = None) -> None:
        self._cache: TierCache | None = None
        self._budget_bytes: int | None = None
        self._policy: str | EvictionPolicy | None = None
        self._offloading: tuple[float, float] | None = None
        if cache:
            self.attach(cache)

    @property
    def cache(self) -> TierCache:
        """The cache that is steered. Raises ConfigError before `attach`."""
        if self._cache is None:
            raise ConfigError("the controller has no cache yet", hint="controller.attach(cache)")
        return self._cache

    def attach(self, cache: TierCache) -> MemoryController:
        """Steer this cache from now on, by everything that has been set so far. Returns itself."""
        self._cache = cache
        if self._budget_bytes is not None:
            self.set_memory_budget(self._budget_bytes)
        if self._policy is not None:
            self.set_eviction_policy(self._policy)
        if self._offloading is not None:
            self.enable_cpu_offloading(*self._offloading)
        return self

    def set_memory_budget(self, num_bytes: int) -> int:
        """Let blocks take at most so many bytes of the hot pool; more than the pool has means all of it.

        Takes effect at once: what may go is evicted, and written to a lower tier before if none has it. Return the
        bytes that running sequences still hold beyond the budget. Raises ConfigError for less than one block.
        """
        self._budget_bytes = num_bytes
        if self._cache is None:
            return 0
        block_bytes = self._cache.layout.block_bytes
        if num_bytes < block_bytes:
            raise ConfigError(f"a budget of {num_bytes} bytes holds no block of {block_bytes}")
        return self._cache.set_hot_limit(num_bytes // block_bytes) * block_bytes

    def set_eviction_policy(self, policy: str | EvictionPolicy) -> None:
        """Choose victims by a policy's name or by any object with its three methods. Raises ConfigError."""
        self._policy = policy
        if self._cache:
            self._cache.set_eviction_policy(policy)

    def enable_cpu_offloading(self, offload_threshold: float = 0.9, offload_ratio: float = 0.2) -> None:
        """Move a share of the idle blocks out of the hot pool whenever it is fuller than the threshold.

        They go to the tiers below it, behind the request, before anybody needs their room.
        """
        self._offloading = (offload_threshold, offload_ratio)
        if self._cache:
            self._cache.set_offloading(offload_threshold, offload_ratio)

    def disable_cpu_offloading(self) -> None:
        """Evict only when room is needed again."""
        self._offloading = None
        if self._cache:
            self._cache.set_offloading(None)

    def get_memory_stats(self) -> dict[str, Any]:
        """Return counters and sizes by name; bytes and blocks by tier under `tiers`."""
        stats, cache = self.cache.stats(), self.cache
        hot = stats.tiers[Tier.HOT]
        limit = min(self._budget_bytes or hot.capacity_bytes, hot.capacity_bytes)
        tiers = {
            tier.value: {
                "blocks": size.blocks,
                "used_bytes": size.used_bytes,
                "stored_bytes": size.stored_bytes,
                "capacity_bytes": size.capacity_bytes,
                "hits": size.hits,
                "evictions": size.evictions,
            }
            for tier, size in stats.tiers.items()
        }
        return {
            "cache_hit_rate": stats.hit_rate,
            "token_hit_rate": stats.token_hit_rate,
            "fragmentation": stats.fragmentation_ratio,
            "avg_shared_blocks": stats.avg_shared_blocks,
            "eviction_count": stats.eviction_count,
            "memory_budget": limit,
            "memory_used": hot.used_bytes,
            "block_bytes": cache.layout.block_bytes,
            "miss_reasons": dict(stats.miss_reasons),
            "tiers": tiers,
        }

    def manual_cache_management(
        self,
        evict_blocks: Iterable[int] = (),
        pin_blocks: Iterable[int] = (),
        offload_blocks: Iterable[int] = (),
    ) -> BlockReport:
        """Pin, offload and evict blocks of the hot pool by their ids, and say what became of each; see `cache.blocks`.

        Raises ConfigError for an id that no block can have; nothing is done then.
        """
        return self.cache.blocks.manage(evict=evict_blocks, pin=pin_blocks, offload=offload_blocks)

    def optimize_memory_layout(self) -> LayoutReport:
        """Move related blocks together, so that the free ones are one run; contents stay what they are.

        Call it between steps. Block tables of running sequences are rewritten in place. Raises StoreError.
        """
        return self.cache.defragment()

    @contextmanager
    def profile(self) -> Iterator[MemoryProfiler]:
        """Watch the cache meanwhile; the profiler's report may be made inside or afterwards."""
        profiler = MemoryProfiler(self.cache)
        try:
            yield profiler
        finally:
            profiler.close()
