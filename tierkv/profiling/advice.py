"""Suggestions that follow from a recorded run: each names a setting, a value, and its measured effect on this run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from tierkv.profiling.measured import EvictionSummary, Measured
from tierkv.profiling.profiled_run import Suggestion
from tierkv.values.block import Tier
from tierkv.values.units import format_bytes

__all__ = ["LEAST_REQUESTS", "suggest"]

LEAST_REQUESTS = 100
"""Fewer requests give no advice: what they asked for is too small a sample of what will be asked for."""

_WORTHWHILE = 0.95  # of the hits that any size could add: the rest costs most of the memory
_ASSUMED = "sizes by replaying the run's requests under LRU: the cache's own policy may need more or less"
_MIN_GAIN = 0.005  # of the blocks asked for: less is noise


def suggest(measured: Measured, *, least_requests: int | None = None) -> Iterator[Suggestion]:
    """Yield the suggestions, those with the largest effect first; none without a measured reason or enough requests."""
    least = LEAST_REQUESTS if least_requests is None else least_requests
    if measured.requests >= least and measured.requests:
        for each in _suggest(measured):
            yield replace(each, evidence=f"{each.evidence}; from {measured.requests:,} requests")


def _suggest(measured: Measured) -> Iterator[Suggestion]:
    yield from _raise_hot(measured)
    yield from _raise_warm(measured)
    yield from _raise_cold(measured)
    yield from _avoid_skips(measured)
    yield from _lower_min_partial(measured)
    yield from _lower_hot(measured)


def _raise_hot(measured: Measured) -> Iterator[Suggestion]:
    """Suggest a hot pool that keeps the blocks that were asked for again after their eviction."""
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
    """Suggest a warm pool that keeps the blocks that were read from disk."""
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
        proposed=_blocks(blocks + 1, measured, Tier.WARM),  # the write thread has a slot of its own
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


def _avoid_skips(measured: Measured) -> Iterator[Suggestion]:
    """Suggest what would have avoided the writes that were dropped."""
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
            now=str(measured.config.io_threads),
            proposed=str(min(8, 2 * measured.config.io_threads)),
            effect=f"up to {queued:,} blocks, {format_bytes(size)}, would have been written to a lower tier",
            evidence=f"{queued:,} writes were dropped because the queue was full{speed}",
        )


def _lower_min_partial(measured: Measured) -> Iterator[Suggestion]:
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
    """Suggest a smaller hot pool where it was never full."""
    capacity = measured.capacity(Tier.HOT)
    peak = max(measured.peak_hot_blocks, measured.largest_request) + 1  # decoding may have taken another block since
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
