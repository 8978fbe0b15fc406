"""What a recorded run says about the settings: figures first, then suggestions that follow from them.

Every suggestion names one setting, a value, and what the same run would have had of it. None is made without a
measured reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tierkv.config import CacheConfig
from tierkv.profiling.profile import Eviction
from tierkv.profiling.reuse import hits_at
from tierkv.values.block import Tier
from tierkv.values.stats import CacheStats
from tierkv.values.units import format_bytes

__all__ = ["EvictionSummary", "HitCurve", "Measured", "Suggestion", "suggest"]

_WORTHWHILE = 0.95  # of the hits that any size could add: the rest costs most of the memory
_ASSUMED = "sizes by replaying the run's requests under LRU: the cache's own policy may need more or less"
_MIN_GAIN = 0.005  # of the blocks asked for: less is noise


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A recorded run. before, after: the cache's counters at its ends.

    largest_request: blocks. peak_hot_blocks: most that the hot pool held when a request had its room. distances: of
    each block asked for, see ReuseRecorder. work: (blocks, seconds) by the name of the span. skips, misses: by
    reason, (blocks, bytes) that were not written down and (blocks, tokens) that nothing answered.
    """

    config: CacheConfig
    block_bytes: int
    block_size: int
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
        """Tokens that they had."""
        return self.after.prompt_tokens - self.before.prompt_tokens

    @property
    def hit_tokens(self) -> int:
        """Tokens that needed no prefill."""
        return self.after.hit_tokens - self.before.hit_tokens

    @property
    def asked(self) -> int:
        """Blocks that were asked for."""
        return self.misses_total + sum(self.hits.values())

    @property
    def misses_total(self) -> int:
        """Blocks that nothing answered."""
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
        """Return what work of these names took for a block, on the thread that did it; None if it was not done."""
        done = [self.work[name] for name in work if name in self.work]
        blocks = sum(count for count, _ in done)
        return sum(seconds for _, seconds in done) / blocks if blocks else None

    def curve(self) -> HitCurve:
        """Return what caches of other sizes would have answered."""
        known = [distance for distance in self.distances if distance is not None]
        return HitCurve(self.distances, asked=self.asked, largest=max(known, default=-1) + 1)

    def eviction_summary(self, tier: Tier) -> EvictionSummary:
        """Return what the evictions of the hot or the warm tier were."""
        return EvictionSummary.of(tier, [each for each in self.evictions if each.tier is tier], self.capacity(tier))


@dataclass(frozen=True, slots=True)
class HitCurve:
    """Hits over size, of LRU caches. asked: blocks asked for. largest: the size beyond which nothing more is hit."""

    distances: Sequence[int | None]
    asked: int
    largest: int

    def hits(self, capacity: int) -> int:
        """Return how many of the blocks asked for a cache of that many blocks would have held."""
        return hits_at(self.distances, [capacity])[0]

    def smallest(self, hits: float) -> int:
        """Return the least size that has so many hits, or the largest of use."""
        low, high = 0, self.largest
        while low < high:
            middle = (low + high) // 2
            if self.hits(middle) >= hits:
                high = middle
            else:
                low = middle + 1
        return low


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionSummary:
    """Evictions of one tier.

    asked_again: wanted by a later request. premature: wanted before the tier had turned over once, that is within
    as many further evictions as it has blocks. lost: of those asked again, computed anew because no tier had them.
    room_missed: blocks of room that would have kept nine in ten of the premature ones, under the same policy.
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
        """Sum up."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One setting to change. now, proposed: its values, readable. effect: what this run would have had of it.

    evidence: the figures it follows from.
    """

    setting: str
    now: str
    proposed: str
    effect: str
    evidence: str


def suggest(measured: Measured) -> Iterator[Suggestion]:
    """Yield what the run speaks for, the most telling first."""
    if not measured.requests:
        return
    yield from _raise_hot(measured)
    yield from _raise_warm(measured)
    yield from _raise_cold(measured)
    yield from _skipped(measured)
    yield from _partial(measured)
    yield from _lower_hot(measured)


def _raise_hot(measured: Measured) -> Iterator[Suggestion]:
    """A hot pool that holds what was asked for again, where the present one had to give it up."""
    curve, capacity = measured.curve(), measured.capacity(Tier.HOT)
    held, reachable = curve.hits(capacity), curve.hits(curve.largest)
    evicted = measured.eviction_summary(Tier.HOT)
    if not evicted.asked_again or reachable - held < max(1, _MIN_GAIN * measured.asked):
        return
    blocks = max(curve.smallest(held + _WORTHWHILE * (reachable - held)), measured.largest_request)
    gain = curve.hits(blocks) - held
    blocks += 1  # a running sequence's last, partly filled block needs room beside the cached ones
    yield Suggestion(
        setting="hot_bytes",
        now=_blocks(capacity, measured),
        proposed=_blocks(blocks, measured),
        effect=f"{gain:,} of {measured.asked:,} blocks asked for ({gain / measured.asked:.1%}) would have been hot "
        f"under LRU instead of {_where_else(evicted)}, "
        f"{format_bytes(gain * measured.block_bytes)} not moved or computed",
        evidence=f"{evicted.asked_again:,} of {evicted.count:,} blocks evicted from the hot pool were asked for again, "
        f"{evicted.premature:,} before it had turned over once; {_ASSUMED}",
    )


def _raise_warm(measured: Measured) -> Iterator[Suggestion]:
    """A warm pool that holds what had to be read from disk."""
    curve = measured.curve()
    capacity, hot = measured.capacity(Tier.WARM), measured.capacity(Tier.HOT)
    now = max(capacity, hot)
    reachable = curve.hits(curve.largest)
    gain_limit = min(reachable - curve.hits(now), measured.hits.get(Tier.COLD, 0))
    if gain_limit < max(1, _MIN_GAIN * measured.asked):
        return
    blocks = curve.smallest(curve.hits(now) + _WORTHWHILE * gain_limit)
    gain = min(curve.hits(blocks) - curve.hits(now), gain_limit)
    cost_s = measured.seconds_per_block("read cold", "load in the background")
    saved = f", {gain * cost_s:.2f} s of reading and decoding saved at {cost_s * 1e3:.1f} ms a block" if cost_s else ""
    yield Suggestion(
        setting="warm_bytes",
        now=_blocks(capacity, measured, Tier.WARM),
        proposed=_blocks(blocks + 1, measured, Tier.WARM),  # one slot belongs to the write thread
        effect=f"with the hot pool as it is, {gain:,} of {measured.hits[Tier.COLD]:,} cold hits would have been warm "
        f"under LRU{saved}",
        evidence=f"{measured.hits[Tier.COLD]:,} blocks came from the cold tier, {gain:,} of them used earlier in "
        f"this run; {_ASSUMED}",
    )


def _raise_cold(measured: Measured) -> Iterator[Suggestion]:
    blocks, tokens = measured.misses.get("evicted", (0, 0))
    cold = measured.after.tiers.get(Tier.COLD)
    if not blocks or cold is None or not cold.blocks:
        return
    missing = blocks * cold.stored_bytes // cold.blocks
    yield Suggestion(
        setting="cold_bytes",
        now=format_bytes(cold.capacity_bytes),
        proposed=f"at least {format_bytes(cold.capacity_bytes + missing)}, by tierkv quota",
        effect=f"up to {tokens:,} of {measured.prompt_tokens - measured.hit_tokens:,} computed prompt tokens would "
        "have been found",
        evidence=f"{blocks:,} blocks were asked for after the store had evicted them, about {format_bytes(missing)} "
        "as stored",
    )


def _skipped(measured: Measured) -> Iterator[Suggestion]:
    """Writes that were dropped, by what would have let them through."""
    full, size = measured.skips.get("full", (0, 0))
    cold = measured.after.tiers.get(Tier.COLD)
    if full:
        yield Suggestion(
            setting="cold_bytes",
            now=format_bytes(cold.capacity_bytes) if cold else "no store",
            proposed="more, by tierkv quota, or free disk space down to min_free_bytes",
            effect=f"{full:,} blocks, {format_bytes(size)} before compression, would survive a restart",
            evidence=f"{full:,} writes found no room in the store even after evicting",
        )
    queued, size = measured.skips.get("queue_full", (0, 0))
    if queued:
        rate = measured.seconds_per_block("store cold")
        speed = f"; a block took {rate * 1e3:.1f} ms to encode and store" if rate else ""
        yield Suggestion(
            setting="num_io_threads",
            now=str(measured.config.num_io_threads),
            proposed=str(min(8, 2 * measured.config.num_io_threads)),
            effect=f"up to {queued:,} blocks, {format_bytes(size)}, would have been written down",
            evidence=f"{queued:,} writes were dropped because the queue was full{speed}",
        )


def _partial(measured: Measured) -> Iterator[Suggestion]:
    blocks, _ = measured.misses.get("too_short", (0, 0))
    if not blocks:
        return
    least = measured.config.min_partial_tokens
    yield Suggestion(
        setting="min_partial_tokens",
        now=str(least),
        proposed="1",
        effect=f"{blocks:,} requests would have reused up to {least - 1} tokens more, at the price of copying a "
        "block each",
        evidence=f"{blocks:,} partly matching blocks were refused as shorter than {least} tokens",
    )


def _lower_hot(measured: Measured) -> Iterator[Suggestion]:
    """A hot pool that was never full: what it never held is free for something else."""
    capacity = measured.capacity(Tier.HOT)
    peak = max(measured.peak_hot_blocks, measured.largest_request) + 1  # what decoding may have taken since
    evicted = measured.eviction_summary(Tier.HOT).count
    if evicted or peak >= 0.8 * capacity:
        return
    yield Suggestion(
        setting="hot_bytes",
        now=_blocks(capacity, measured),
        proposed=_blocks(peak, measured),
        effect=f"{format_bytes((capacity - peak) * measured.block_bytes)} would be free for other use, and this run's "
        "blocks would still fit",
        evidence=f"of its {capacity:,} blocks the hot pool held at most {peak:,}, whenever a request had its room, and "
        "evicted none",
    )


def _where_else(evicted: EvictionSummary) -> str:
    if not evicted.lost:
        return "in a lower tier"
    return "computed again" if evicted.lost == evicted.asked_again else "in a lower tier or computed again"


def _blocks(count: int, measured: Measured, tier: Tier = Tier.HOT) -> str:
    return f"{format_bytes(count * measured.slot_bytes(tier))} ({count:,} blocks)"
