"""MemoryProfiler: records a run of a cache, and reports what it meant."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from tierkv.config import CacheConfig
from tierkv.errors import ClosedError, ConfigError
from tierkv.profiling.advice import Measured, suggest
from tierkv.profiling.memory_report import MemoryReport
from tierkv.profiling.prefixes import PrefixTable
from tierkv.profiling.profile import EvictionLog, HeatMap, Iteration, MemorySnapshot
from tierkv.profiling.profiled_run import ProfiledRun
from tierkv.profiling.reuse import ReuseRecorder
from tierkv.profiling.step_sampler import StepSampler
from tierkv.profiling.tracker import MemoryTracker
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import Tier
from tierkv.values.checks import check_count, check_seconds
from tierkv.values.events import BlockEvent, CacheObserver, EventKind, MemoryRegion, RequestEvent, Span
from tierkv.values.layout import BlockLayout
from tierkv.values.stats import CacheStats

__all__ = ["MemoryProfiler", "ProfiledCache"]

_MAX_SNAPSHOTS = 1000
_MAX_SPANS = 50_000
_MAX_ITERATIONS = 10_000
_HAD = {MissReason.RECOMPUTED.value, MissReason.OTHER_RANK.value}  # misses of blocks that were there


class ProfiledCache(Protocol):
    """What the profiler needs of a cache; TierCache has it."""

    @property
    def config(self) -> CacheConfig: ...
    @property
    def layout(self) -> BlockLayout: ...
    def stats(self) -> CacheStats: ...
    def add_observer(self, observer: CacheObserver) -> None: ...
    def remove_observer(self, observer: CacheObserver) -> None: ...


class MemoryProfiler:
    """Watches a cache from `watch` (or its construction with one) until `close`. Context manager; thread-safe.

    `start_iteration` and `end_iteration` mark the passes of the caller's loop; each ends with a snapshot unless the
    last one is younger than `snapshot_every_s`. sample_every: of so many steps of decoding one goes into the heat map.
    Everything kept is bounded; what had to be dropped is in the report's notes. clock: must be the one that spans use.

    >>> with MemoryProfiler(cache) as profiler, profiler.iteration("one request"):
    ...     cache.release(cache.acquire(token_ids))
    >>> report = profiler.generate_report()
    """

    def __init__(
        self,
        cache: ProfiledCache | None = None,
        *,
        snapshot_every_s: float = 0.02,
        sample_every: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        snapshot_every_s = check_seconds("snapshot_every_s", snapshot_every_s)
        sample_every = check_count("sample_every", sample_every, least=1)
        self.snapshots: list[MemorySnapshot] = []
        self.iterations: deque[Iteration] = deque(maxlen=_MAX_ITERATIONS)
        self.tracker = MemoryTracker(sample_every=sample_every, clock=clock)
        self.prefixes = PrefixTable()
        self._cache: ProfiledCache | None = None
        self._clock = clock
        self._snapshot_every_s = snapshot_every_s
        self._started = self._ended = clock()
        self._is_watching = False
        self._num_iterations = 0
        self._recorder = _Recorder(clock, sample_every)
        if cache:
            self.watch(cache)

    def __enter__(self) -> MemoryProfiler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def watch(self, cache: ProfiledCache) -> None:
        """Begin to record this cache. One cache to a profiler."""
        if self._cache is not None:
            raise ConfigError("this profiler watches a cache already", hint="use one profiler for each cache")
        self._cache = cache
        self._is_watching = True
        for observer in (self.tracker, self.prefixes, self._recorder):
            cache.add_observer(observer)
        self.take_snapshot()

    def close(self) -> None:
        """Record nothing more; what was recorded stays. May be called twice, and after the cache was closed."""
        if self._cache is None or not self._is_watching:
            return
        with suppress(ClosedError):
            if self._recorder.iteration:
                self.end_iteration()
            self.take_snapshot()
        self._is_watching = False
        with suppress(ClosedError):
            for observer in (self.tracker, self.prefixes, self._recorder):
                self._cache.remove_observer(observer)

    def start_iteration(self, label: str = "") -> None:
        """Begin a pass of the caller's loop; one that is still open ends here."""
        if self._recorder.iteration:
            self.end_iteration()
        thread = threading.current_thread().name
        self._recorder.iteration = Iteration(
            number=self._num_iterations, label=label, thread=thread, started=self._clock()
        )
        self._num_iterations += 1

    def end_iteration(self) -> None:
        """End the pass. Raises ConfigError if none was begun."""
        if self._recorder.iteration is None:
            raise ConfigError("no iteration was started", hint="call start_iteration first")
        self._recorder.iteration.ended = self._clock()
        self.iterations.append(self._recorder.iteration)
        self._recorder.iteration = None
        if self._cache and self._clock() - self.snapshots[-1].timestamp >= self._snapshot_every_s:
            with suppress(ClosedError):  # the pass has ended, although the cache has too
                self.take_snapshot()

    @contextmanager
    def iteration(self, label: str = "") -> Iterator[None]:
        """Begin a pass and end it."""
        self.start_iteration(label)
        try:
            yield
        finally:
            if self._recorder.iteration:
                self.end_iteration()

    def take_snapshot(self) -> MemorySnapshot:
        """Record the sizes and counters of this moment. Raises ConfigError while no cache is watched."""
        if self._cache is None:
            raise ConfigError("the profiler watches no cache", hint="MemoryProfiler(cache), or watch(cache)")
        self._ended = self._clock()
        snapshot = MemorySnapshot(
            timestamp=self._ended,
            total_allocated=self.tracker.total_allocated,
            stats=self._cache.stats(),
        )
        self.snapshots.append(snapshot)
        if len(self.snapshots) > _MAX_SNAPSHOTS:  # half as many, twice as far apart
            del self.snapshots[1:-1:2]
            self._snapshot_every_s = max(2 * self._snapshot_every_s, 1e-3)
        return snapshot

    def generate_report(self, *, title: str = "Memory profile", about: dict[str, str] | None = None) -> MemoryReport:
        """Return what was recorded so far, analyzed. about: more lines for its head, as the model's name.

        What the run ended as is missing where the cache is closed by now. Raises ConfigError while no cache is watched.
        """
        if self._is_watching:
            with suppress(ClosedError):
                self.take_snapshot()
        if self._cache is None:
            raise ConfigError("the profiler watches no cache", hint="MemoryProfiler(cache), or watch(cache)")
        measured = self._recorder.measured(self._cache, self.snapshots)
        return MemoryReport(
            ProfiledRun(
                title=title,
                about=about or {},
                started=self._started,
                ended=self._ended,
                measured=measured,
                snapshots=tuple(self.snapshots),
                iterations=tuple(self.iterations),
                spans=tuple(self._recorder.spans),
                heat=self._recorder.heat,
                allocations=self.tracker.get_allocation_summary(),
                pools=tuple(each for each in self.tracker.list_allocations() if not each.block_hash),
                prefixes=tuple(self.prefixes.largest(12)),
                suggestions=tuple(suggest(measured)),
                notes=tuple(self._notes()),
            )
        )

    def _notes(self) -> Iterator[str]:
        """Say what the bounds cost."""
        recorder = self._recorder
        if recorder.dropped_spans:
            yield f"{recorder.dropped_spans} spans, the oldest, are not in the trace."
        if self._num_iterations > _MAX_ITERATIONS:
            yield f"Of {self._num_iterations} iterations the last {_MAX_ITERATIONS} are shown."
        if recorder.evictions.dropped:
            yield f"{recorder.evictions.dropped} evictions, the oldest, are not in the analysis."
        if recorder.reuse.dropped_requests:
            yield f"{recorder.reuse.dropped_requests} requests, the latest, are not in the curve of hits over size."
        if self.tracker.sample_every > 1:
            yield f"Uses while decoding are sampled: one step in {self.tracker.sample_every}, counted as so many."


class _Recorder:
    """The profiler's own observer."""

    def __init__(self, clock: Callable[[], float], sample_every: int) -> None:
        self.spans: deque[Span] = deque(maxlen=_MAX_SPANS)
        self.dropped_spans = 0
        self.evictions = EvictionLog()
        self.reuse = ReuseRecorder()
        self.heat = HeatMap(clock())
        self._clock = clock
        self._sample_every = sample_every
        self._sampler = StepSampler(sample_every, seed=1)
        self.iteration: Iteration | None = None
        self._largest_request = 0
        self._peak_hot_blocks = 0
        self._costs: dict[str, tuple[int, float]] = {}
        self._skips: dict[str, tuple[int, int]] = {}
        self._lost: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()

    def on_memory(self, region: MemoryRegion) -> None:
        """Nothing to record: the tracker does."""

    def on_block(self, event: BlockEvent) -> None:
        """Record arrivals, evictions and writes that were dropped."""
        now = self._clock()
        with self._lock:
            if event.kind is EventKind.SKIP:
                count, size = self._skips.get(event.reason, (0, 0))
                self._skips[event.reason] = count + 1, size + event.num_bytes
            elif event.kind is EventKind.EVICT and event.tier:
                self.evictions.evict(
                    event.tier, event.block_hash, now, num_tokens=event.num_tokens, num_bytes=event.num_bytes
                )
            elif event.kind is EventKind.MOVE:
                pass  # neither new nor gone
            elif event.tier in (Tier.HOT, Tier.WARM) and event.slot is not None:  # a daemon's warm tier tells no more
                self.evictions.arrive(event.tier, event.block_hash, now)
                if event.kind is EventKind.REGISTER and event.tier is Tier.HOT:
                    self.reuse.arrival(event.block_hash)

    def on_request(self, event: RequestEvent) -> None:
        """Record what was asked for and who answered."""
        now = self._clock()
        with self._lock:
            self._largest_request = max(self._largest_request, len(event.asked))
            self._peak_hot_blocks = max(self._peak_hot_blocks, event.hot_blocks)
            self.reuse.request([block_hash for block_hash in event.asked if block_hash])
            for block in event.blocks:
                if block.block_hash:
                    was_lost = block.tier is None and block.reason not in _HAD
                    self.evictions.ask(block.block_hash, block.tier, now, was_lost=was_lost)
                if block.tier is None:
                    count, tokens = self._lost.get(block.reason, (0, 0))
                    self._lost[block.reason] = count + 1, tokens + block.num_tokens
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
        """Record a span, and what it cost a block."""
        with self._lock:
            self.dropped_spans += len(self.spans) == self.spans.maxlen
            self.spans.append(span)
            blocks: Any = span.detail.get("blocks", 0)
            count, seconds = self._costs.get(span.name, (0, 0.0))
            self._costs[span.name] = count + int(blocks), seconds + span.seconds

    def measured(self, cache: ProfiledCache, snapshots: Sequence[MemorySnapshot]) -> Measured:
        """Return everything that the analysis works on."""
        with self._lock:
            return Measured(
                config=cache.config,
                block_bytes=cache.layout.block_bytes,
                block_size=cache.layout.block_size,
                before=snapshots[0].stats,
                after=snapshots[-1].stats,
                largest_request=self._largest_request,
                peak_hot_blocks=max(self._peak_hot_blocks, *(each.stats.of(Tier.HOT).blocks for each in snapshots)),
                distances=tuple(self.reuse.distances()),
                evictions=tuple(self.evictions.evictions),
                work=dict(self._costs),
                skips=dict(self._skips),
                misses=dict(self._lost),
            )


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
