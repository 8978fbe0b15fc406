"""Statistics of a cache, as frozen values."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from tierkv.values.block import Tier
from tierkv.values.locks import NO_LOCK, Owned
from tierkv.values.remote_stats import RemoteStats

__all__ = ["CacheStats", "StatsRecorder", "TierStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TierStats:
    """One tier. hits: blocks it answered. `stored_bytes` differ from `used_bytes` if blocks are compressed."""

    hits: int = 0
    hit_tokens: int = 0
    blocks: int = 0
    used_bytes: int = 0
    stored_bytes: int = 0
    capacity_bytes: int = 0
    evictions: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheStats:
    """A snapshot.

    hit_rate: share of the requested blocks that a tier answered, in whole or in part.
    token_hit_rate: share of the prompts' tokens that needed no prefill.
    avg_shared_blocks: mean number of blocks that a live sequence shares with other live ones.
    fragmentation_ratio: 0 if the hot pool's free blocks are one run, and up to 1 the more they are scattered.
    misses: blocks that no tier answered; miss_reasons counts them by the names of MissReason.
    prefetched_blocks: loaded into the warm tier before a request. prefetch_misses: reasons of the others.
    skipped_writes: blocks that were not written to a lower tier; skip_reasons counts them by reason.
    state_files: loaded and open, without those of a daemon. remotes: the remote tiers, in the order of their URLs;
        blocks that they answered count as hits of the cold tier.

    >>> cache.release(cache.acquire(token_ids))
    >>> stats = cache.stats()
    >>> stats.requests, stats.of(Tier.HOT).hits
    (2, 2)
    """

    requests: int = 0
    hits: int = 0
    misses: int = 0
    prompt_tokens: int = 0
    hit_tokens: int = 0
    avg_shared_blocks: float = 0.0
    fragmentation_ratio: float = 0.0
    eviction_count: int = 0
    collisions: int = 0
    skipped_writes: int = 0
    prefetched_blocks: int = 0
    state_files: int = 0
    prefetch_misses: dict[str, int] = field(default_factory=dict)
    miss_reasons: dict[str, int] = field(default_factory=dict)
    skip_reasons: dict[str, int] = field(default_factory=dict)
    tiers: dict[Tier, TierStats] = field(default_factory=dict)
    remotes: tuple[RemoteStats, ...] = ()

    def of(self, tier: Tier) -> TierStats:
        """Return one tier's numbers: all 0 for an absent tier, as after a daemon has died."""
        return self.tiers.get(tier) or TierStats()

    @property
    def hit_rate(self) -> float:
        """Hits per requested block; 0 before the first request."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0

    @property
    def token_hit_rate(self) -> float:
        """Tokens found per requested token; 0 before the first request."""
        return self.hit_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class StatsRecorder:
    """The counters of CacheStats. Each changes under the cache's lock only."""

    def __init__(self, lock: Owned = NO_LOCK) -> None:
        self._lock = lock
        self.requests = 0
        self.misses = 0
        self.prompt_tokens = 0
        self.collisions = 0
        self.skip_reasons: Counter[str] = Counter()
        self.miss_reasons: Counter[str] = Counter()
        self.prefetched_blocks = 0
        self.prefetch_misses: Counter[str] = Counter()
        self.hits: Counter[Tier] = Counter()
        self.hit_tokens: Counter[Tier] = Counter()
        self.evictions: Counter[Tier] = Counter()
        self.bytes_in: Counter[Tier] = Counter()
        self.bytes_out: Counter[Tier] = Counter()

    @property
    def skipped_writes(self) -> int:
        """Blocks that were not written to a lower tier."""
        return self.skip_reasons.total()

    def snapshot(
        self,
        tiers: dict[Tier, TierStats],
        *,
        avg_shared_blocks: float,
        fragmentation_ratio: float,
        state_files: int = 0,
        remotes: tuple[RemoteStats, ...] = (),
    ) -> CacheStats:
        """Return the counters so far. tiers: sizes of the tiers, which the recorder does not know.

        The caller holds the lock.
        """
        assert self._lock.is_owned()
        counted = {
            tier: replace(
                sizes,
                hits=self.hits[tier],
                hit_tokens=self.hit_tokens[tier],
                evictions=self.evictions[tier] + sizes.evictions,
                bytes_in=self.bytes_in[tier],
                bytes_out=self.bytes_out[tier],
            )
            for tier, sizes in tiers.items()
        }
        return CacheStats(
            requests=self.requests,
            hits=sum(self.hits.values()),
            misses=self.misses,
            prompt_tokens=self.prompt_tokens,
            hit_tokens=sum(self.hit_tokens.values()),
            avg_shared_blocks=avg_shared_blocks,
            fragmentation_ratio=fragmentation_ratio,
            eviction_count=sum(tier.evictions for tier in counted.values()),
            collisions=self.collisions,
            skipped_writes=self.skipped_writes,
            prefetched_blocks=self.prefetched_blocks,
            state_files=state_files,
            prefetch_misses=dict(self.prefetch_misses),
            miss_reasons=dict(self.miss_reasons),
            skip_reasons=dict(self.skip_reasons),
            tiers=counted,
            remotes=remotes,
        )
