"""The three tiers of one cache and what both directions of movement share: lock, index, places, counters."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from tierkv.background.work_queue import PriorityThreads
from tierkv.errors import ClosedError, StoreError
from tierkv.index.chosen_eviction import ChosenEviction
from tierkv.index.index import Entry, Index
from tierkv.index.slots import SlotPool
from tierkv.movers.frames import FrameMover
from tierkv.movers.mover import AllReady, Move, Mover, Ready
from tierkv.movers.windows import WindowMover
from tierkv.storage.codecs import Codec
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold import ColdStore
from tierkv.storage.hot import HotPool
from tierkv.storage.outcomes import MissReason
from tierkv.storage.planes import Bytes
from tierkv.storage.state_files import StateFiles
from tierkv.storage.warm import WarmPool
from tierkv.storage.windows import WindowFormat
from tierkv.transfer.costs import CostBySize, LoadKind
from tierkv.transfer.lookup import ColdSource, Hit
from tierkv.transfer.observers import Watch
from tierkv.values.block import BlockHash, ContentDigest, Tier
from tierkv.values.events import EventKind
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import StatsRecorder

__all__ = ["Compression", "Job", "LowerTiers", "Place", "PlaceOwner", "Tiers"]

_WAIT_S = 0.05


class PlaceOwner(Protocol):
    """Whoever lent a warm place that is not this cache's own."""

    @property
    def mover(self) -> Mover:
        """What copies to and from such places."""

    def return_lease(self, slot: int) -> None:
        """End one loan. Waits for nobody."""


class Place(NamedTuple):
    """One block's place in the hot or the warm tier, or among the staging slots, which are of no tier.

    owner: None for a place of this cache's own.
    """

    tier: Tier | None
    slot: int
    owner: PlaceOwner | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """A block to write down: in the hot pool, pinned for this, its K and V computed once `written` has passed.

    parent: the parent's entry, None for a first block; the chain of entries outlives their stay in the index.
    """

    block_hash: BlockHash
    parent_hash: BlockHash
    token_bytes: bytes
    content_digest: ContentDigest
    parent: Entry | None
    block_id: int
    written: Ready


class LowerTiers(Protocol):
    """Warm and cold tiers that are not this cache's own. Nothing here raises for a block that cannot be had."""

    def read(self, hits: Sequence[Hit]) -> tuple[list[Place], MissReason | None]:
        """Return lent warm places of the leading cold hits that could be had, and why the next one could not."""

    def write(self, jobs: Sequence[Job]) -> None:
        """Write blocks down, parents before children; when it returns the hot blocks may be reused."""


@dataclass(slots=True, kw_only=True)
class Compression:
    """What a warm tier that keeps its blocks compressed has beside it.

    staging: raw blocks between the cold store and the hot tier, each for as long as it is in work.
    """

    form: WindowFormat
    mover: WindowMover
    staging: WarmPool
    slots: SlotPool[None]


@dataclass(slots=True, kw_only=True)
class Tiers:
    """What promotion and demotion work on. `changed` guards everything in the index and the counters.

    frames: decodes cold blocks on the GPU, where that can be had.
    threads: read and encode blocks, num_threads of them, a request's first; loaders: one a request that loads while it
    computes.
    load_costs, step_costs: the seconds that cold blocks add to a request, by their number, and that computing takes, by
    the number of new tokens, as measured here.
    in_flight: asynchronous copies and the warm places that they still read.
    leaving: when the last reader or writer of a released sequence's blocks, on whatever stream, is through.
    arriving: block ids whose bytes are on their way up, or are still being computed by whoever committed them; who uses
    one waits for that. computing: the latter, in order of their commits.
    reserved_raw: raw places that are never given back.
    write_wait_s: how long a request waits for the write thread.
    is_closing: nobody shall wait for room any more; see `require_open`.
    chosen: evicts blocks on demand, and knows those that go with their last user; set by the demoter.
    lower: who has the warm and the cold tier instead of this cache, which then has no warm slot and no source.
    """

    layout: BlockLayout
    namespace: BlockHash
    codec: Codec
    index: Index
    hot: HotPool
    warm: WarmPool
    mover: Mover
    compression: Compression | None
    frames: FrameMover | None
    cold: ColdStore | None
    threads: PriorityThreads
    num_threads: int
    loaders: ThreadPoolExecutor
    watch: Watch
    changed: OwnedCondition
    stats: StatsRecorder
    load_costs: defaultdict[LoadKind, CostBySize] = field(default_factory=lambda: defaultdict(CostBySize))
    step_costs: CostBySize = field(default_factory=CostBySize)
    states: StateFiles = field(default_factory=StateFiles)
    in_flight: deque[tuple[Ready, list[Place]]] = field(default_factory=deque)
    arriving: dict[int, Ready] = field(default_factory=dict)
    leaving: dict[int, Ready] = field(default_factory=dict)
    computing: deque[tuple[Ready, list[int]]] = field(default_factory=deque)
    reserved_raw: int = 0
    write_wait_s: float = 5.0
    is_closing: bool = False
    lower: LowerTiers | None = None
    chosen: ChosenEviction = field(init=False)

    @property
    def sources(self) -> list[ColdSource]:
        """Where a block may lie below the warm tier: the store first, then state files."""
        return [*([self.cold] if self.cold else []), *self.states.files]

    @property
    def _raw_pool(self) -> SlotPool[Any]:
        return self.compression.slots if self.compression else self.index.warm

    @property
    def raw_slots(self) -> Bytes:
        """Blocks as they are, [slots, block_bytes], beside the hot tier: the warm tier's own, or the staging slots."""
        return self.compression.staging.slots if self.compression else self.warm.slots

    def unpin(self, places: Iterable[Place]) -> None:
        """Lower the reference counts of places and wake whoever waits for room."""
        with self.changed:
            for place in places:
                if place.owner:
                    place.owner.return_lease(place.slot)
                elif place.tier is not None:
                    self.index.unpin(place.tier, place.slot)
                elif self.compression:
                    self.compression.slots.unpin(place.slot)
            self.changed.notify_all()

    def unpin_all(self, tier: Tier, slots: Sequence[int]) -> None:
        """Lower the reference counts of several places of one tier and wake whoever waits for room."""
        with self.changed:
            self.index.unpin_all(tier, slots)
            self.changed.notify_all()

    def bring_up(
        self,
        places: Sequence[Place],
        targets: Sequence[int],
        *,
        coded: Sequence[CodedBlock] = (),
        after: Ready | None = None,
    ) -> Ready:
        """Start to bring blocks, all from the warm tier or all raw places, into block ids. Raises StoreError.

        coded: what lies in each raw place, where a GPU is to decode it. Whatever this raises, nothing is under way.
        """
        try:
            return self._bring_up(places, targets, coded, after)
        except StoreError:
            raise
        except BaseException:  # such as an interrupt between two copies
            self.mover.drain()
            raise

    def _bring_up(
        self, places: Sequence[Place], targets: Sequence[int], coded: Sequence[CodedBlock], after: Ready | None
    ) -> Ready:
        moves = [Move(place.slot, to) for place, to in zip(places, targets, strict=True)]
        with self.watch.span("promote") as detail:
            detail["blocks"] = len(moves)
            if owner := places[0].owner:
                return owner.mover.promote(moves)
            if self.compression and places[0].tier is Tier.WARM:
                return self.compression.mover.promote(moves)
            kinds = list(coded) or [CodedBlock()] * len(moves)
            decoded = [move for move, kind in zip(moves, kinds, strict=True) if not kind.frame_sizes]
            left = [(move, kind) for move, kind in zip(moves, kinds, strict=True) if kind.frame_sizes]
            parts: list[Ready] = []
            if left:
                assert self.frames, "nobody else asks for coded blocks"
                parts.append(self.frames.promote([m for m, _ in left], [kind for _, kind in left], after=after))
            try:
                if decoded:
                    parts.append(self.mover.promote(decoded, after=after))
            except StoreError:
                for part in parts:  # the caller gives all places back, and these are still being written
                    with contextlib.suppress(RuntimeError):
                        part.synchronize()
                raise
            return parts[0] if len(parts) == 1 else AllReady(parts)

    def leave(self, block_ids: Sequence[int]) -> None:
        """Note that what the current stream does with blocks so far must end before others write them."""
        if self.mover.is_cuda:
            used = self.mover.mark()
            with self.changed:
                self.leaving.update(dict.fromkeys(block_ids, used))

    def wait_for_users(self, block_ids: Sequence[int]) -> None:
        """Make the current stream wait for whoever still uses blocks that were given up; the caller holds the lock."""
        assert self.changed.is_owned()
        users = [self.arriving.pop(block_id, None) for block_id in block_ids]
        users += [self.leaving.pop(block_id, None) for block_id in block_ids]
        for ready in {id(each): each for each in users if each}.values():
            ready.wait()

    def track(self, ready: Ready, sources: list[Place], targets: Iterable[int]) -> None:
        """Keep the sources of a promotion pinned until it is done, and let users of its targets wait for it."""
        with self.changed:
            self.in_flight.append((ready, sources))
            self.arriving.update(dict.fromkeys(targets, ready))
            self.reap()

    def job_of(self, entry: Entry, written: Ready) -> Job:
        """Return the job that writes a hot entry down; the caller holds the lock."""
        assert self.changed.is_owned()
        assert entry.block_id is not None, "only a hot block can be written down"
        parent = None if entry.parent.parent is entry.parent else entry.parent  # the trunk's parent is itself
        content_digest = self.index.content_digest_of(entry)
        return Job(
            entry.block_hash, entry.parent_hash, entry.token_bytes, content_digest, parent, entry.block_id, written
        )

    def note_computing(self, block_ids: list[int], written: Ready) -> None:
        """Let users of blocks that were just committed wait until they are written: they may run on another stream.

        The caller holds the lock. Nothing to note on a CPU, where they are.
        """
        assert self.changed.is_owned()
        if block_ids and not written.is_done():
            self.computing.append((written, block_ids))
            self.arriving.update(dict.fromkeys(block_ids, written))

    def written(self, entry: Entry) -> Ready:
        """Return when the bytes of a hot entry are there; the caller holds the lock."""
        assert self.changed.is_owned()
        arriving = None if entry.block_id is None else self.arriving.get(entry.block_id)
        return arriving or self.mover.mark()

    def reap(self) -> None:
        """Unpin the sources of copies that are done, and forget who was waited for; the caller holds the lock."""
        assert self.changed.is_owned()
        while self.computing and self.computing[0][0].is_done():
            done, block_ids = self.computing.popleft()
            for block_id in block_ids:
                if self.arriving.get(block_id) is done:
                    del self.arriving[block_id]
        while self.in_flight and self.in_flight[0][0].is_done():
            done, places = self.in_flight.popleft()
            self.arriving = {slot: ready for slot, ready in self.arriving.items() if ready is not done}
            self.unpin(places)

    def end_copies(self) -> None:
        """Wait for the copies in flight and give back what they read: lent places would keep a connection open."""
        while self.in_flight:
            ready, places = self.in_flight.popleft()
            with contextlib.suppress(RuntimeError):  # of a device that has failed: nothing is copied any more
                ready.synchronize()
            self.unpin(places)

    def attach(self, entry: Entry, tier: Tier, slot: int, kind: EventKind) -> None:
        """Record that `slot` holds an entry's bytes, and say how they came there; the caller holds the lock."""
        assert self.changed.is_owned()
        self.index.attach(entry, tier, slot)
        self.watch.block(kind, tier, entry, slot=slot)

    def skip(self, job: Job, reason: str) -> None:
        """Count a block that was not written down; the caller holds the lock."""
        assert self.changed.is_owned()
        self.stats.skip_reasons[reason] += 1
        self.watch.block(EventKind.SKIP, None, job, reason=reason)

    def evict(self, victims: Sequence[Entry], tier: Tier) -> list[Entry]:
        """Make a tier forget entries, children before parents, and return them; one with children there stays.

        The caller holds the lock.
        """
        assert self.changed.is_owned()
        slots = {entry: entry.place(tier) for entry in victims} if self.watch else {}
        evicted = self.index.evict(victims, tier)
        self.stats.evictions[tier] += len(evicted)
        if slots:
            for entry in evicted:
                self.watch.block(EventKind.EVICT, tier, entry, slot=slots[entry])
        return evicted

    def evict_warm(self, count: int) -> list[Entry]:
        """Make up to `count` more warm slots free; return what was evicted. The caller holds the lock."""
        assert self.changed.is_owned()
        return self.evict(self.index.select_victims(Tier.WARM, count), Tier.WARM)

    def try_take_warm(self, count: int) -> list[int]:
        """Return up to `count` warm slots, each pinned once, evicting if need be; perhaps none."""
        with self.changed:
            self.reap()
            pool = self.index.warm
            if pool.free_count < count:
                self.evict_warm(count - pool.free_count)
            return pool.allocate(min(count, pool.free_count))

    def take_raw(self, count: int) -> list[Place]:
        """Return one to `count` places in `raw_slots`, each pinned once; waits for copies in flight if there are none.

        The caller must hold no warm place while it waits: then those who hold some are copies and decodes, which
        end, and the write thread. Returns none where nobody holds any and the user has pinned the blocks in all of
        them, and where the write thread keeps them for longer than `write_wait_s`. Raises ClosedError rather than wait.
        """
        deadline = time.monotonic() + self.write_wait_s
        with self.changed:
            while not (places := self.try_take_raw(count)):
                if self.in_flight:
                    self.in_flight[0][0].synchronize()
                elif self._raw_pool.referenced_count <= self.reserved_raw or time.monotonic() >= deadline:
                    break
                else:
                    self.require_open()
                    self.changed.wait(_WAIT_S)
            return places

    def try_take_raw(self, count: int) -> list[Place]:
        """Return up to `count` places in `raw_slots`, each pinned once; perhaps none."""
        if self.compression is None:
            return [Place(Tier.WARM, slot) for slot in self.try_take_warm(count)]
        with self.changed:
            self.reap()
            slots = self.compression.slots
            return [Place(None, slot) for slot in slots.allocate(min(count, slots.free_count))]

    def require_open(self) -> None:
        """Raise ClosedError once the cache is being closed."""
        if self.is_closing:
            raise ClosedError("the cache is being closed")

    def wait(self) -> None:
        """Wait a moment for another thread or a copy in flight to make room; the caller holds the lock."""
        assert self.changed.is_owned()
        self.changed.wait(_WAIT_S)
        self.reap()

    def copy_warm(self, slot: int) -> Bytes:
        """Return a copy of the block in a warm slot, as it is in the hot tier; the caller holds the lock."""
        assert self.changed.is_owned()
        if self.compression is None:
            return np.array(self.warm.slots[slot])
        block = np.empty(self.layout.block_bytes, dtype=np.uint8)
        self.compression.form.decompress(self.warm.slots[slot], block)
        return block

    def close(self) -> None:
        """Give back threads and memory, once everything in flight has ended."""
        self.loaders.shutdown()
        self.threads.shutdown()
        if self.compression:
            self.compression.mover.close()
        self.mover.close()
        self.warm.close()
        if self.compression:
            self.compression.staging.close()
