"""MemoryProfiler: records a run of a cache, and makes a report of it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from tierkv.config import CacheConfig
from tierkv.errors import ClosedError, ConfigError
from tierkv.profiling.advice import suggest
from tierkv.profiling.first_tokens import FirstTokenRecorder
from tierkv.profiling.memory_report import MemoryReport
from tierkv.profiling.prefixes import PrefixTable
from tierkv.profiling.profiled_run import Iteration, MemorySnapshot, ProfiledRun
from tierkv.profiling.recorder import Recorder
from tierkv.profiling.tracker import MemoryTracker
from tierkv.values.checks import check_count, check_seconds
from tierkv.values.events import CacheObserver
from tierkv.values.layout import BlockLayout
from tierkv.values.stats import CacheStats

__all__ = ["MemoryProfiler", "ProfiledCache"]

_MAX_SNAPSHOTS = 1000
_MAX_ITERATIONS = 10_000


class ProfiledCache(Protocol):
    """What the profiler needs of a cache; TierCache satisfies it."""

    @property
    def config(self) -> CacheConfig: ...
    @property
    def layout(self) -> BlockLayout: ...
    def stats(self) -> CacheStats: ...
    def add_observer(self, observer: CacheObserver) -> None: ...
    def remove_observer(self, observer: CacheObserver) -> None: ...


class MemoryProfiler:
    """Observes a cache from `observe` (or its construction with one) until `close`. Context manager; thread-safe.

    `start_iteration` and `end_iteration` mark the passes of the caller's loop; each ends with a snapshot unless the
    last one is younger than `snapshot_every_s`. sample_every: of so many decoding steps one goes into the heat map.
    Memory is bounded; the report's notes say what had to be dropped. clock: must be the one that spans use.

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
        self.tracker: MemoryTracker = MemoryTracker(sample_every=sample_every, clock=clock)
        self.prefixes: PrefixTable = PrefixTable()
        self._cache: ProfiledCache | None = None
        self._clock = clock
        self._snapshot_every_s = snapshot_every_s
        self._started = self._ended = clock()
        self._is_observing = False
        self._num_iterations = 0
        self._recorder = Recorder(clock, sample_every)
        self._first_tokens = FirstTokenRecorder()
        if cache:
            self.observe(cache)

    def __enter__(self) -> MemoryProfiler:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def observe(self, cache: ProfiledCache) -> None:
        """Begin to record this cache. One cache to a profiler. Raises ConfigError for a second one."""
        if self._cache is not None:
            raise ConfigError("this profiler observes a cache already", hint="use one profiler for each cache")
        self._cache = cache
        self._is_observing = True
        for observer in (self.tracker, self.prefixes, self._recorder):
            cache.add_observer(observer)
        self.take_snapshot()

    def close(self) -> None:
        """Record nothing more; what was recorded stays. May be called twice, and after the cache was closed."""
        if self._cache is None or not self._is_observing:
            return
        with suppress(ClosedError):
            if self._recorder.iteration:
                self.end_iteration()
            self.take_snapshot()
        self._is_observing = False
        with suppress(ClosedError):
            for observer in (self.tracker, self.prefixes, self._recorder):
                self._cache.remove_observer(observer)

    def start_iteration(self, label: str = "") -> None:
        """Begin a pass of the caller's loop; a pass that is still open ends here."""
        if self._recorder.iteration:
            self.end_iteration()
        thread = threading.current_thread().name
        self._recorder.iteration = Iteration(
            number=self._num_iterations, label=label, thread=thread, started=self._clock()
        )
        self._num_iterations += 1

    def end_iteration(self) -> None:
        """End the pass. Raises ConfigError if none is open."""
        if self._recorder.iteration is None:
            raise ConfigError("no iteration was started", hint="call start_iteration first")
        self._recorder.iteration.ended = self._clock()
        self.iterations.append(self._recorder.iteration)
        self._recorder.iteration = None
        if self._cache and self._clock() - self.snapshots[-1].timestamp >= self._snapshot_every_s:
            with suppress(ClosedError):  # the cache may be closed before the pass ends
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

    def record_first_token(self, *, prompt_tokens: int, cached_tokens: int, seconds: float) -> None:
        """Record the time to a request's first new token: the report says what the cache saved. Any thread.

        Raises ConfigError for figures that make no sense.
        """
        self._first_tokens.add(prompt_tokens, cached_tokens, seconds)

    def take_snapshot(self) -> MemorySnapshot:
        """Record the sizes and counters of this moment. Raises ConfigError while no cache is observed."""
        if self._cache is None:
            raise ConfigError("the profiler observes no cache", hint="MemoryProfiler(cache), or observe(cache)")
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
        """Return what was recorded so far, analyzed. about: more lines for its head, such as the model's name.

        Lacks a snapshot of this moment where the cache is closed by now. Raises ConfigError while none is observed.
        """
        if self._is_observing:
            with suppress(ClosedError):
                self.take_snapshot()
        if self._cache is None:
            raise ConfigError("the profiler observes no cache", hint="MemoryProfiler(cache), or observe(cache)")
        measured = self._recorder.measured(self._cache.config, self._cache.layout, self.snapshots)
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
                first_tokens=self._first_tokens.recorded(),
            )
        )

    def _notes(self) -> Iterator[str]:
        """Yield what the bounds left out, and how uses are counted."""
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
            yield f"Uses while decoding are sampled: one step in {self.tracker.sample_every}, each counted as so many."
