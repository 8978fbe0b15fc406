"""What a profiler records, as values, and the two records that fold a long run into bounded memory."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from tierkv.values.block import BlockHash, Tier
from tierkv.values.stats import CacheStats

__all__ = ["Eviction", "EvictionLog", "HeatMap", "Iteration", "MemorySnapshot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySnapshot:
    """The memory of a cache at one moment. timestamp: seconds of the profiler's clock; bytes as CacheStats has them."""

    timestamp: float
    total_allocated: int
    stats: CacheStats

    @property
    def block_distribution(self) -> dict[Tier, int]:
        """Blocks by the tier that has them."""
        return {tier: each.blocks for tier, each in self.stats.tiers.items()}

    @property
    def fragmentation_ratio(self) -> float:
        """0 where the hot pool's free blocks are one run, towards 1 where they are scattered."""
        return self.stats.fragmentation_ratio

    @property
    def cache_hit_rate(self) -> float:
        """Share of the blocks asked for so far that some tier answered."""
        return self.stats.hit_rate


@dataclass(slots=True, kw_only=True)
class Iteration:
    """One pass of the caller's loop and the requests that began in it. Blocks, unless the name says tokens.

    label: the caller's name for it, or empty.
    """

    number: int
    label: str
    thread: str
    started: float
    ended: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    misses: int = 0
    hits: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    hit_tokens: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started


@dataclass(slots=True, kw_only=True)
class Eviction:
    """A block that a tier forgot. age_s: since it came there; idle_s: since its last use; hits: in between.

    asked_after_s, asked_after_blocks: seconds and further evictions of the tier until a request wanted it again;
    None if none did. was_lost: no other tier had it then, so it was computed again.
    """

    time: float
    tier: Tier
    block_hash: BlockHash
    num_tokens: int
    num_bytes: int
    age_s: float
    idle_s: float
    hits: int
    asked_after_s: float | None = None
    asked_after_blocks: int | None = None
    was_lost: bool = False


@dataclass(slots=True)
class _Stay:
    """A block's time in a tier."""

    since: float
    last_used: float
    hits: int = 0


class EvictionLog:
    """Matches evictions with later requests for the same block. Keeps the latest `max_evictions`."""

    def __init__(self, *, max_evictions: int = 20_000) -> None:
        self.evictions: deque[Eviction] = deque()
        self.dropped = 0
        self._max_evictions = max_evictions
        self._stays: dict[tuple[Tier, BlockHash], _Stay] = {}
        self._gone: OrderedDict[tuple[Tier, BlockHash], tuple[Eviction, int]] = OrderedDict()
        self._counts = dict.fromkeys(Tier, 0)

    def arrive(self, tier: Tier, block_hash: BlockHash, now: float) -> None:
        """Record that a tier has a block from now on."""
        self._stays[tier, block_hash] = _Stay(now, now)

    def evict(self, tier: Tier, block_hash: BlockHash, now: float, *, num_tokens: int, num_bytes: int) -> None:
        """Record that a tier forgot a block."""
        stay = self._stays.pop((tier, block_hash), _Stay(now, now))
        eviction = Eviction(
            time=now,
            tier=tier,
            block_hash=block_hash,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            age_s=now - stay.since,
            idle_s=now - stay.last_used,
            hits=stay.hits,
        )
        self._counts[tier] += 1
        self._gone[tier, block_hash] = eviction, self._counts[tier]
        self.evictions.append(eviction)
        if len(self.evictions) > self._max_evictions:
            oldest = self.evictions.popleft()
            self.dropped += 1
            key = oldest.tier, oldest.block_hash
            if key in self._gone and self._gone[key][0] is oldest:
                del self._gone[key]

    def ask(self, block_hash: BlockHash, answered_by: Tier | None, now: float, *, was_lost: bool) -> None:
        """Record that a request wanted a block, which tier answered, and whether none had it."""
        for tier in (Tier.HOT, Tier.WARM):
            stay = self._stays.get((tier, block_hash))
            if stay:
                stay.last_used = now
                stay.hits += tier is answered_by
            gone = self._gone.pop((tier, block_hash), None)
            if gone:
                eviction, count = gone
                eviction.asked_after_s = now - eviction.time
                eviction.asked_after_blocks = self._counts[tier] - count
                eviction.was_lost = was_lost


class HeatMap:
    """Uses of hot blocks over time, in at most `max_bins` bins: where they do not reach, bins are joined in pairs.

    bin_s: seconds of a bin now. `cells` maps (block id, bin) to uses.
    """

    def __init__(self, started: float, *, bin_s: float = 0.01, max_bins: int = 96) -> None:
        self.started = started
        self.bin_s = bin_s
        self.cells: dict[tuple[int, int], int] = {}
        self._max_bins = max_bins

    def add(self, block_ids: Iterable[int], now: float, count: int) -> None:
        """Count uses of blocks."""
        at = int(max(now - self.started, 0.0) / self.bin_s)
        while at >= self._max_bins:
            self._join_bins()
            at = int((now - self.started) / self.bin_s)
        cells = self.cells
        for block_id in block_ids:
            cell = block_id, at
            cells[cell] = cells.get(cell, 0) + count

    def _join_bins(self) -> None:
        joined: dict[tuple[int, int], int] = {}
        for (block_id, at), count in self.cells.items():
            joined[block_id, at // 2] = joined.get((block_id, at // 2), 0) + count
        self.cells = joined
        self.bin_s *= 2
