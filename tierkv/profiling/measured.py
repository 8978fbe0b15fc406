"""The figures of a recorded run: hits, evictions, and what caches of other sizes would have answered."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tierkv.config import CacheConfig
from tierkv.values.block import BlockHash, Tier
from tierkv.values.stats import CacheStats

__all__ = ["Eviction", "EvictionSummary", "HitCurve", "Measured"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The figures of a recorded run. before, after: the cache's counters at its ends.

    largest_request: blocks. peak_hot_blocks: the most that the hot pool held when a request had its room. distances:
    of each block asked for, by ReuseRecorder. work: (blocks, seconds) by the name of the span. skips: (blocks, bytes)
    not written to a lower tier, by reason. misses: (blocks, tokens) that no tier answered, by reason.
    """

    config: CacheConfig
    block_bytes: int
    before: CacheStats
    after: CacheStats
    largest_request: int
    peak_hot_blocks: int
    distances: Sequence[int | None]
    evictions: Sequence[Eviction]
    work: Mapping[str, tuple[int, float]]
    skips: Mapping[str, tuple[int, int]]
    misses: Mapping[str, tuple[int, int]]

    @property
    def requests(self) -> int:
        """Requests of the run."""
        return self.after.requests - self.before.requests

    @property
    def prompt_tokens(self) -> int:
        """Tokens of these requests' prompts."""
        return self.after.prompt_tokens - self.before.prompt_tokens

    @property
    def hit_tokens(self) -> int:
        """Tokens that needed no prefill."""
        return self.after.hit_tokens - self.before.hit_tokens

    @property
    def asked(self) -> int:
        """Blocks that the requests asked for."""
        return self.misses_total + sum(self.hits.values())

    @property
    def misses_total(self) -> int:
        """Blocks that no tier answered."""
        return self.after.misses - self.before.misses

    @property
    def hits(self) -> dict[Tier, int]:
        """Blocks that each tier answered."""
        return {tier: each.hits - self.before.of(tier).hits for tier, each in self.after.tiers.items()}

    @property
    def tokens(self) -> dict[Tier, int]:
        """Prompt tokens that each tier answered."""
        return {tier: each.hit_tokens - self.before.of(tier).hit_tokens for tier, each in self.after.tiers.items()}

    def capacity(self, tier: Tier) -> int:
        """Blocks that the hot or the warm tier holds."""
        return self.after.of(tier).capacity_bytes // self.block_bytes

    def slot_bytes(self, tier: Tier) -> float:
        """Bytes that a block takes in the hot or the warm tier; fewer where the warm tier compresses."""
        held = self.after.of(tier)
        return held.stored_bytes / held.blocks if held.blocks else self.block_bytes

    def room_bytes(self, tier: Tier) -> float:
        """Bytes that a tier may take."""
        if tier is Tier.COLD:
            return self.after.of(tier).capacity_bytes
        return self.capacity(tier) * self.slot_bytes(tier)

    def seconds_per_block(self, *work: str) -> float | None:
        """Return the mean seconds a block of the spans of these names; None if there were none."""
        done = [self.work[name] for name in work if name in self.work]
        blocks = sum(count for count, _ in done)
        return sum(seconds for _, seconds in done) / blocks if blocks else None

    def curve(self) -> HitCurve:
        """Return the hits that LRU caches of other sizes would have had."""
        return HitCurve(sorted(each for each in self.distances if each is not None), asked=self.asked)

    def eviction_summary(self, tier: Tier) -> EvictionSummary:
        """Return what the evictions of the hot or the warm tier were."""
        return EvictionSummary.of(tier, [each for each in self.evictions if each.tier is tier], self.capacity(tier))


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Hits over size, of LRU caches. distances: of blocks used before, ascending. asked: blocks asked for."""

    distances: Sequence[int]
    asked: int

    @property
    def largest(self) -> int:
        """The size in blocks beyond which there are no more hits."""
        return self.distances[-1] + 1 if self.distances else 0

    def hits(self, capacity: int) -> int:
        """Return how many of the blocks asked for a cache of that many blocks would have held."""
        return bisect_left(self.distances, capacity)

    def smallest(self, hits: float) -> int:
        """Return the least size that has so many hits, or `largest` if none has."""
        count = math.ceil(hits)
        return self.largest if count > len(self.distances) else self.distances[count - 1] + 1 if count > 0 else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionSummary:
    """Evictions of one tier.

    asked_again: by a later request. premature: asked again within as many further evictions as the tier has blocks.
    lost: of those asked again, computed again because no tier had them. room_missed: blocks of room that would have
    kept nine in ten of the premature ones, under the same policy.
    """

    tier: Tier
    count: int
    never_hit: int
    asked_again: int
    premature: int
    lost: int
    median_age_s: float
    median_idle_s: float
    room_missed: int

    @classmethod
    def of(cls, tier: Tier, evictions: Sequence[Eviction], capacity: int) -> EvictionSummary:
        """Return the summary of a tier's evictions. capacity: blocks of the tier."""
        again = [each for each in evictions if each.asked_after_blocks is not None]
        gaps = sorted(gap for each in again if (gap := each.asked_after_blocks or 0) < capacity)
        return cls(
            tier=tier,
            count=len(evictions),
            never_hit=sum(each.hits == 0 for each in evictions),
            asked_again=len(again),
            premature=len(gaps),
            lost=sum(each.was_lost for each in again),
            median_age_s=median(each.age_s for each in evictions) if evictions else 0.0,
            median_idle_s=median(each.idle_s for each in evictions) if evictions else 0.0,
            room_missed=gaps[min(len(gaps) - 1, int(0.9 * len(gaps)))] + 1 if gaps else 0,
        )


@dataclass(slots=True, kw_only=True)
class Eviction:
    """A block that a tier forgot. age_s: since it came there; idle_s: since its last use; hits: in between.

    asked_after_blocks: further evictions of the tier until a request asked for it again; None if none did.
    was_lost: no other tier had it then, so it was computed again.
    """

    time: float
    tier: Tier
    block_hash: BlockHash
    age_s: float
    idle_s: float
    hits: int
    asked_after_blocks: int | None = None
    was_lost: bool = False
