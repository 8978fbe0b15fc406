"""The three tiers of one cache and what both directions of movement share: lock, index, places, counters."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from tierkv.block import BlockHash, Tier
from tierkv.index import Index
from tierkv.layout import BlockLayout
from tierkv.lookup import ColdSource
from tierkv.mover import Mover, Ready
from tierkv.stats import StatsRecorder
from tierkv.storage.codecs import Codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.hot import HotPool
from tierkv.storage.state_file import StateFile
from tierkv.storage.warm import WarmPool

__all__ = ["Place", "Tiers"]

_WAIT_S = 0.05


@dataclass(frozen=True, slots=True)
class Place:
    """One block's place in the hot or the warm tier."""

    tier: Tier
    slot: int


@dataclass(slots=True, kw_only=True)
class Tiers:
    """What promotion and demotion work on. `changed` guards everything in the index and the counters.

    in_flight: asynchronous copies and the warm places that they still read.
    arriving: block ids whose bytes are on their way up; who uses one waits for its copy.
    """

    layout: BlockLayout
    namespace: BlockHash
    codec: Codec
    index: Index
    hot: HotPool
    warm: WarmPool
    mover: Mover
    cold: ColdStore | None
    threads: ThreadPoolExecutor
    stats: StatsRecorder = field(default_factory=StatsRecorder)
    changed: threading.Condition = field(default_factory=threading.Condition)
    states: list[StateFile] = field(default_factory=list)
    in_flight: deque[tuple[Ready, list[Place]]] = field(default_factory=deque)
    arriving: dict[int, Ready] = field(default_factory=dict)

    @property
    def sources(self) -> list[ColdSource]:
        """Where a block may lie below the warm tier: the store first, then state files."""
        return [*([self.cold] if self.cold else []), *self.states]

    def unpin(self, places: Iterable[Place]) -> None:
        """Lower the reference counts of places and wake whoever waits for room."""
        with self.changed:
            for place in places:
                self.index.unpin(place.tier, place.slot)
            self.changed.notify_all()

    def track(self, ready: Ready, sources: list[Place], targets: Iterable[int]) -> None:
        """Keep the sources of a promotion pinned until it is done, and let users of its targets wait for it."""
        with self.changed:
            self.in_flight.append((ready, sources))
            self.arriving.update(dict.fromkeys(targets, ready))
            self.reap()

    def reap(self) -> None:
        """Unpin the sources of copies that are done; the caller holds the lock."""
        while self.in_flight and self.in_flight[0][0].is_done():
            done, places = self.in_flight.popleft()
            self.arriving = {slot: ready for slot, ready in self.arriving.items() if ready is not done}
            self.unpin(places)

    def evict_warm(self, count: int) -> None:
        """Make up to `count` more warm slots free; the caller holds the lock."""
        for victim in self.index.select_victims(Tier.WARM, count):
            self.index.detach(victim, Tier.WARM)
            self.stats.evictions[Tier.WARM] += 1

    def try_take_warm(self, count: int) -> list[int]:
        """Return up to `count` warm slots, each pinned once, evicting if need be; perhaps none."""
        with self.changed:
            self.reap()
            pool = self.index.warm
            if pool.free_count < count:
                self.evict_warm(count - pool.free_count)
            return pool.allocate(min(count, pool.free_count))

    def take_warm(self, count: int) -> list[int]:
        """Return one to `count` warm slots, each pinned once; waits for copies in flight if there are none.

        Never waits for a request: at most a few copies and decodes hold every slot of the tier at a time.
        """
        with self.changed:
            while not (slots := self.try_take_warm(count)):
                if self.in_flight:
                    self.in_flight[0][0].synchronize()
                else:
                    self.changed.wait(_WAIT_S)
            return slots

    def wait(self) -> None:
        """Wait a moment for another thread or a copy in flight to make room; the caller holds the lock."""
        self.changed.wait(_WAIT_S)
        self.reap()
