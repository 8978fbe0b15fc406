"""What a profiler records while it observes a cache, folded into bounded memory."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tierkv.config import CacheConfig
from tierkv.profiling.measured import Eviction, Measured
from tierkv.profiling.profiled_run import HeatMap, Iteration, MemorySnapshot
from tierkv.profiling.tracker import StepSampler
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import BlockHash, Tier
from tierkv.values.events import BlockEvent, EventKind, MemoryRegion, RequestEvent, Span
from tierkv.values.layout import BlockLayout

__all__ = ["EvictionRecorder", "Recorder", "ReuseRecorder"]

_MAX_SPANS = 50_000
_PRESENT = {MissReason.RECOMPUTED.value, MissReason.OTHER_RANK.value}  # misses of blocks that some tier had


class Recorder:
    """Records requests, evictions, uses and spans. Satisfies `CacheObserver`; thread-safe.

    iteration: the one that requests are counted into now, if any.
    """

    def __init__(self, clock: Callable[[], float], sample_every: int) -> None:
        self.spans: deque[Span] = deque(maxlen=_MAX_SPANS)
        self.dropped_spans: int = 0
        self.evictions: EvictionRecorder = EvictionRecorder()
        self.reuse: ReuseRecorder = ReuseRecorder()
        self.heat: HeatMap = HeatMap(clock())
        self._clock = clock
        self._sample_every = sample_every
        self._sampler = StepSampler(sample_every, seed=1)
        self.iteration: Iteration | None = None
        self._largest_request = 0
        self._peak_hot_blocks = 0
        self._costs: dict[str, tuple[int, float]] = {}
        self._skips: dict[str, tuple[int, int]] = {}
        self._misses: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def on_memory(self, region: MemoryRegion) -> None:
        """Ignore memory: the tracker records it."""

    def on_block(self, event: BlockEvent) -> None:
        """Record arrivals, evictions and writes that were dropped."""
        now = self._clock()
        with self._lock:
            if event.kind is EventKind.SKIP:
                count, size = self._skips.get(event.reason, (0, 0))
                self._skips[event.reason] = count + 1, size + event.num_bytes
            elif event.kind is EventKind.EVICT and event.tier:
                self.evictions.record_eviction(event.tier, event.block_hash, now)
            elif event.kind is EventKind.MOVE:
                pass  # it stays in its tier
            elif event.tier in (Tier.HOT, Tier.WARM) and event.slot is not None:  # a daemon's have none here
                self.evictions.record_arrival(event.tier, event.block_hash, now)
                if event.kind is EventKind.REGISTER and event.tier is Tier.HOT:
                    self.reuse.record_arrival(event.block_hash)

    def on_request(self, event: RequestEvent) -> None:
        """Record which blocks a request asked for, and which tier answered each."""
        now = self._clock()
        with self._lock:
            self._largest_request = max(self._largest_request, len(event.asked))
            self._peak_hot_blocks = max(self._peak_hot_blocks, event.hot_blocks)
            self.reuse.record_request([block_hash for block_hash in event.asked if block_hash])
            for block in event.blocks:
                if block.block_hash:
                    was_lost = block.tier is None and block.reason not in _PRESENT
                    self.evictions.record_request(block.block_hash, block.tier, now, was_lost=was_lost)
                if block.tier is None:
                    count, tokens = self._misses.get(block.reason, (0, 0))
                    self._misses[block.reason] = count + 1, tokens + block.num_tokens
                elif block.tier is Tier.HOT and block.slot is not None:
                    self.heat.add([block.slot], now, 1)
            if self.iteration:
                _count_into(self.iteration, event)

    def on_use(self, block_ids: Sequence[int]) -> None:
        """Record a sampled step's use of its blocks."""
        if not self._sampler.is_due():
            return
        now = self._clock()
        with self._lock:
            self.heat.add(block_ids, now, self._sample_every)

    def on_span(self, span: Span) -> None:
        """Record a span, and add it to the cost of a block."""
        with self._lock:
            self.dropped_spans += len(self.spans) == self.spans.maxlen
            self.spans.append(span)
            blocks: Any = span.detail.get("blocks", 0)
            count, seconds = self._costs.get(span.name, (0, 0.0))
            self._costs[span.name] = count + int(blocks), seconds + span.seconds

    def measured(self, config: CacheConfig, layout: BlockLayout, snapshots: Sequence[MemorySnapshot]) -> Measured:
        """Return the figures of the run so far. snapshots: from its beginning to its end."""
        with self._lock:
            return Measured(
                config=config,
                block_bytes=layout.block_bytes,
                before=snapshots[0].stats,
                after=snapshots[-1].stats,
                largest_request=self._largest_request,
                peak_hot_blocks=max(self._peak_hot_blocks, *(each.stats.of(Tier.HOT).blocks for each in snapshots)),
                distances=tuple(self.reuse.distances()),
                evictions=tuple(self.evictions.evictions),
                work=dict(self._costs),
                skips=dict(self._skips),
                misses=dict(self._misses),
            )


@dataclass(slots=True)
class _Residence:
    """A block's time in a tier."""

    since: float
    last_used: float
    hits: int = 0


class EvictionRecorder:
    """Matches evictions with later requests for the same block. Keeps the latest `max_evictions`."""

    def __init__(self, *, max_evictions: int = 20_000) -> None:
        self.evictions: deque[Eviction] = deque()
        self.dropped: int = 0
        self._max_evictions = max_evictions
        self._residences: dict[tuple[Tier, BlockHash], _Residence] = {}
        self._gone: OrderedDict[tuple[Tier, BlockHash], tuple[Eviction, int]] = OrderedDict()
        self._counts = dict.fromkeys(Tier, 0)

    def record_arrival(self, tier: Tier, block_hash: BlockHash, now: float) -> None:
        """Record that a tier received a block."""
        self._residences[tier, block_hash] = _Residence(now, now)

    def record_eviction(self, tier: Tier, block_hash: BlockHash, now: float) -> None:
        """Record that a tier forgot a block."""
        residence = self._residences.pop((tier, block_hash), _Residence(now, now))
        eviction = Eviction(
            time=now,
            tier=tier,
            block_hash=block_hash,
            age_s=now - residence.since,
            idle_s=now - residence.last_used,
            hits=residence.hits,
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

    def record_request(self, block_hash: BlockHash, answered_by: Tier | None, now: float, *, was_lost: bool) -> None:
        """Record that a request asked for a block. was_lost: no tier had it, so it is computed again."""
        for tier in (Tier.HOT, Tier.WARM):
            residence = self._residences.get((tier, block_hash))
            if residence:
                residence.last_used = now
                residence.hits += tier is answered_by
            gone = self._gone.pop((tier, block_hash), None)
            if gone:
                eviction, count = gone
                eviction.asked_after_blocks = self._counts[tier] - count
                eviction.was_lost = was_lost


@dataclass(frozen=True, slots=True)
class _LastUses:
    """The times of last use, counted by prefix: a Fenwick tree."""

    tree: list[int]

    def add(self, time: int, change: int) -> None:
        time += 1
        while time < len(self.tree):
            self.tree[time] += change
            time += time & -time

    def count_up_to(self, time: int) -> int:
        time += 1
        total = 0
        while time:
            total += self.tree[time]
            time -= time & -time
        return total


class ReuseRecorder:
    """Records which blocks were asked for and which were computed, in order, for their LRU stack distances.

    One pass gives the hits at every capacity at once, because an LRU cache of n blocks holds a subset of one of n + 1.
    Source: Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", 1970.
    max_uses: bounds what is kept. dropped_requests: requests that exceeded that bound.
    """

    def __init__(self, *, max_uses: int = 1_000_000) -> None:
        self.dropped_requests: int = 0
        self._max_uses = max_uses
        self._numbers: dict[BlockHash, int] = {}
        self._uses: list[tuple[tuple[int, ...], bool]] = []
        self._num_uses = 0

    def record_request(self, block_hashes: Sequence[BlockHash]) -> None:
        """Record that a request asked for these blocks, first to last."""
        self._record(block_hashes, is_request=True)

    def record_arrival(self, block_hash: BlockHash) -> None:
        """Record that a block was computed and kept."""
        self._record([block_hash], is_request=False)

    def distances(self) -> list[int | None]:
        """Return, for each block asked for, how many blocks were used since its last use; None if never used.

        An LRU cache of n blocks hits where the distance is below n. Of one request's blocks the later one counts as
        older, as in the index: children are evicted before parents.
        """
        last_uses = _LastUses([0] * (self._num_uses + 2))
        last_use: dict[int, int] = {}
        found: list[int | None] = []
        now = 0
        for blocks, is_request in self._uses:
            if is_request:
                for block in blocks:
                    used = last_use.get(block)
                    found.append(None if used is None else len(last_use) - last_uses.count_up_to(used))
            for block in reversed(blocks):
                if block in last_use:
                    last_uses.add(last_use[block], -1)
                last_uses.add(now, 1)
                last_use[block] = now
                now += 1
        return found

    def _record(self, block_hashes: Sequence[BlockHash], *, is_request: bool) -> None:
        if self._num_uses + len(block_hashes) > self._max_uses:
            self.dropped_requests += is_request
            return
        numbers = tuple(self._numbers.setdefault(each, len(self._numbers)) for each in block_hashes)
        self._uses.append((numbers, is_request))
        self._num_uses += len(numbers)


def _count_into(iteration: Iteration, event: RequestEvent) -> None:
    iteration.requests += event.num_tokens > 0  # a second part of a request has none
    iteration.prompt_tokens += event.num_tokens
    for block in event.blocks:
        if block.tier:
            iteration.hits[block.tier] += 1
        else:
            iteration.misses += 1
    for tier, tokens in event.hit_tokens.items():
        iteration.hit_tokens[tier] += tokens
