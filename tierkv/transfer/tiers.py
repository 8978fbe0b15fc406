"""Tiers: what the requests and the background threads of one cache share, and the lock that guards it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tierkv.errors import ClosedError, StoreError
from tierkv.index.chosen_eviction import ChosenEviction
from tierkv.index.index import Entry, Index
from tierkv.index.slots import SlotPool
from tierkv.movers.mover import AllReady, Move, Ready
from tierkv.remote_tiers.remotes import Remotes
from tierkv.remote_tiers.source import RemoteSource
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.state_files import StateFiles
from tierkv.transfer.copies import Copies, Job, Place, PlaceOwner
from tierkv.transfer.lookup import ColdSource, Hit, Lookup, look_up
from tierkv.transfer.memory import TierMemory
from tierkv.transfer.observers import Observers
from tierkv.values.block import BlockHash, ContentDigest, HashFunction, Tier
from tierkv.values.events import EventKind
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import StatsRecorder
from tierkv.values.untracked import untrack_all

__all__ = ["Copies", "Job", "LowerTiers", "Place", "PlaceOwner", "Tiers"]

_WAIT_S = 0.05
_new_tuple = tuple.__new__


class LowerTiers(Protocol):
    """Warm and cold tiers of another process. No method raises for a block that cannot be had."""

    def read(self, hits: Sequence[Hit]) -> tuple[list[Place], MissReason | None]:
        """Return leased warm places of the leading cold hits that could be had, and why the next one could not."""

    def write(self, jobs: Sequence[Job]) -> None:
        """Write blocks down, parents before children; when it returns the hot blocks may be reused."""


@dataclass(slots=True, kw_only=True)
class Tiers:
    """The tiers of one cache. `changed` guards everything in the index, the counters and `copies`.

    write_wait_s: how long a request waits for the write thread.
    is_closing: no thread may wait for room any more; see `require_open`.
    chosen: evicts blocks on demand, and knows those that go with their last user; set by the offloader.
    stores: write blocks to the store, the daemon and remote tiers; False where another rank writes the same blocks.
    lower: has the warm and the cold tier instead of this cache, which then has no warm slot and no source.
    """

    layout: BlockLayout
    namespace: BlockHash
    changed: OwnedCondition
    index: Index
    stats: StatsRecorder
    observers: Observers
    hash_function: HashFunction
    min_partial_tokens: int
    memory: TierMemory
    cold: ColdStore | None
    write_wait_s: float = 5.0
    is_closing: bool = False
    stores: bool = True
    lower: LowerTiers | None = None
    states: StateFiles = field(default_factory=StateFiles)
    remotes: Remotes | None = None
    remote: RemoteSource | None = None  # of this namespace in `remotes`
    copies: Copies = field(init=False)
    chosen: ChosenEviction = field(init=False)

    def __post_init__(self) -> None:
        self.copies = Copies(self.memory.mover, self.changed)

    @property
    def sources(self) -> list[ColdSource]:
        """Where a block may lie below the warm tier: the store first, then state files, then remote tiers."""
        return [*filter(None, [self.cold]), *self.states.files, *filter(None, [self.remote])]

    def find(self, token_bytes: bytes, max_tokens: int) -> Lookup:
        """Return what this cache's own tiers have of a prompt's first `max_tokens` tokens; the caller holds the lock.

        token_bytes: the prompt as little-endian uint32.
        """
        assert self.changed.is_owned()
        found = look_up(
            self.index,
            self.sources,
            token_bytes,
            block_size=self.layout.block_size,
            max_tokens=max_tokens,
            min_partial_tokens=self.min_partial_tokens,
            hash_function=self.hash_function,
            lookup_run=self.cold.lookup_run if self.cold else None,
        )
        return found.before(self.chosen.marked) if self.chosen.marked else found

    def entry_of(self, block: Hit | Job) -> Entry | None:
        """Return the entry of a block, if the index knows it; the caller holds the lock."""
        assert self.changed.is_owned()
        return self.index.get(
            block.block_hash, block.parent_hash, block.token_bytes, content_digest=self._digest_of(block)
        )

    def insert(self, block: Hit | Job) -> Entry | None:
        """Return the entry of a block, a new one if need be; None as `Index.insert`. The caller holds the lock."""
        assert self.changed.is_owned()
        return self.index.insert(
            block.block_hash, block.parent_hash, block.token_bytes, content_digest=self._digest_of(block)
        )

    def with_digests(self, jobs: Iterable[Job]) -> list[Job]:
        """Return jobs with their content digests. On the write thread, because 128 of them take 0.15 ms."""
        with self.changed:
            return [job if job.content_digest else job._replace(content_digest=self._digest_of(job)) for job in jobs]

    def _digest_of(self, block: Hit | Job) -> ContentDigest | None:
        """Return a block's content digest, where one is to be compared; the caller holds the lock."""
        assert self.changed.is_owned()
        if block.content_digest is None and isinstance(block, Job):
            assert block.entry, "a job without a content digest has an entry"
            return self.index.content_digest_of(block.entry)
        return block.content_digest

    @property
    def _raw_pool(self) -> SlotPool[Any]:
        return self.memory.compression.slots if self.memory.compression else self.index.warm

    def unpin(self, places: Iterable[Place]) -> None:
        """Lower the reference counts of places, and wake threads that wait for room."""
        with self.changed:
            for place in places:
                if place.owner:
                    place.owner.return_lease(place.slot)
                elif place.tier is not None:
                    self.index.unpin(place.tier, place.slot)
                else:
                    self._raw_pool.unpin(place.slot)
            self.changed.notify_all()

    def unpin_all(self, tier: Tier, slots: Sequence[int]) -> None:
        """Lower the reference counts of several places of one tier, and wake threads that wait for room."""
        with self.changed:
            self.index.unpin_all(tier, slots)
            self.changed.notify_all()

    def load(
        self,
        places: Sequence[Place],
        targets: Sequence[int],
        *,
        coded: Sequence[CodedBlock] = (),
        after: Ready | None = None,
    ) -> Ready:
        """Start to copy blocks, all from the warm tier or all from raw places, into block ids.

        coded: what lies in each raw place, where a GPU is to decode it. Raises StoreError. After an error no copy is in
        flight.
        """
        moves = [Move(place.slot, to) for place, to in zip(places, targets, strict=True)]
        try:
            with self.span("promote") as detail:
                detail["blocks"] = len(moves)
                return self._load(moves, places[0], coded, after)
        except StoreError:
            raise
        except BaseException:  # such as an interrupt between two copies
            self.memory.mover.drain()
            raise

    def _load(self, moves: Sequence[Move], first: Place, coded: Sequence[CodedBlock], after: Ready | None) -> Ready:
        memory = self.memory
        if first.owner:
            return first.owner.mover.promote(moves)
        if memory.compression and first.tier is Tier.WARM:
            return memory.compression.mover.promote(moves)
        kinds = list(coded) or [CodedBlock()] * len(moves)
        decoded = [move for move, kind in zip(moves, kinds, strict=True) if not kind.frame_sizes]
        still_coded = [(move, kind) for move, kind in zip(moves, kinds, strict=True) if kind.frame_sizes]
        parts: list[Ready] = []
        if still_coded:
            assert memory.frames, "blocks stay coded only where a GPU decodes them"
            coded_moves, coded_kinds = [move for move, _ in still_coded], [kind for _, kind in still_coded]
            parts.append(memory.frames.promote(coded_moves, coded_kinds, after=after))
        try:
            if decoded:
                parts.append(memory.mover.promote(decoded, after=after))
        except StoreError:
            for part in parts:  # the caller unpins all places, and these copies still read theirs
                with contextlib.suppress(RuntimeError):
                    part.synchronize()
            raise
        return parts[0] if len(parts) == 1 else AllReady(parts)

    def track(self, ready: Ready, sources: list[Place], targets: Iterable[int]) -> None:
        """Keep the sources of a promotion pinned until it is done, and let users of its targets wait for it."""
        with self.changed:
            self.copies.in_flight.append((ready, sources))
            self.copies.arriving.update(dict.fromkeys(targets, ready))
            self.reap()

    def reap(self) -> None:
        """Unpin the sources of copies that are done, and blocks whose pins have ended; the caller holds the lock."""
        assert self.changed.is_owned()
        self.index.end_pins()
        if places := self.copies.reap():
            self.unpin(places)

    def end_copies(self) -> None:
        """Wait for the copies in flight and unpin what they read: leased places would keep a connection open."""
        while self.copies.in_flight:
            ready, places = self.copies.in_flight.popleft()
            with contextlib.suppress(RuntimeError):  # of a device that has failed: nothing is copied any more
                ready.synchronize()
            self.unpin(places)

    def job_of(self, entry: Entry, written: Ready) -> Job:
        """Return the job that writes a hot entry down; the caller holds the lock."""
        assert self.changed.is_owned()
        return self.jobs_of((entry,), written)[0]

    def jobs_of(self, entries: Iterable[Entry], written: Ready) -> list[Job]:
        """Do as `job_of` for several entries."""
        assert self.changed.is_owned()
        jobs: list[Job] = []
        root = self.index.root_entry
        for entry in entries:
            above, block_id = entry.parent, entry.block_id
            assert block_id is not None, "only a hot block can be written down"
            parent = None if above is root else above
            fields = (entry.block_hash, above.block_hash, entry.token_bytes, None, parent, block_id, written, entry)
            jobs.append(_new_tuple(Job, fields))  # in half the time of Job(...)
        untrack_all(jobs)  # thousands may be queued, and full garbage collections would follow
        return jobs

    def attach(self, entry: Entry, tier: Tier, slot: int, kind: EventKind) -> None:
        """Record that `slot` holds an entry's bytes, and notify observers of how they came there.

        The caller holds the lock.
        """
        assert self.changed.is_owned()
        self.index.attach(entry, tier, slot)
        if self.observers.are_there:
            self.observers.block(kind, tier, entry, slot=slot)

    def span(self, name: str) -> contextlib.AbstractContextManager[dict[str, int | float | str]]:
        """Time the work inside for observers, if there are any; the caller may add detail to what is yielded."""
        return self.observers.span(name) if self.observers.are_there else contextlib.nullcontext({})

    def skip(self, job: Job, reason: str) -> None:
        """Count a block that was not written down; the caller holds the lock."""
        assert self.changed.is_owned()
        self.stats.skip_reasons[reason] += 1
        self.observers.block(EventKind.SKIP, None, job, reason=reason)

    def evict(self, entries: Sequence[Entry], tier: Tier) -> list[Entry]:
        """Make a tier forget entries, children before parents, and return them; one with children there stays.

        The caller holds the lock.
        """
        assert self.changed.is_owned()
        slots = {entry: entry.place(tier) for entry in entries} if self.observers.are_there else {}
        evicted = self.index.evict(entries, tier)
        self.stats.evictions[tier] += len(evicted)
        if slots:
            for entry in evicted:
                self.observers.block(EventKind.EVICT, tier, entry, slot=slots[entry])
        return evicted

    def evict_warm(self, count: int) -> list[Entry]:
        """Make up to `count` more warm slots free; return what was evicted. The caller holds the lock."""
        assert self.changed.is_owned()
        return self.evict(self.index.select_evictions(Tier.WARM, count), Tier.WARM)

    def try_take_warm(self, count: int) -> list[int]:
        """Return up to `count` warm slots, each pinned once, evicting if need be; perhaps none."""
        with self.changed:
            self.reap()
            pool = self.index.warm
            if pool.free_count < count:
                self.evict_warm(count - pool.free_count)
            return pool.allocate(min(count, pool.free_count))

    def take_raw(self, count: int) -> list[Place]:
        """Return one to `count` places in the raw pool, each pinned once; waits for copies in flight if there are none.

        A caller that waits must hold no warm place: then only copies, decodes and the write thread hold any, and all
        of them end. Returns none where the user has pinned the blocks in all of them, and where the write thread keeps
        them for longer than `write_wait_s`. Raises ClosedError rather than wait.
        """
        deadline = time.monotonic() + self.write_wait_s
        with self.changed:
            while not (places := self.try_take_raw(count)):
                if self.copies.in_flight:
                    self.copies.in_flight[0][0].synchronize()
                elif self._raw_pool.referenced_count <= self.memory.reserved_raw or time.monotonic() >= deadline:
                    break
                else:
                    self.require_open()
                    self.changed.wait(_WAIT_S)
            return places

    def try_take_raw(self, count: int) -> list[Place]:
        """Return up to `count` places in the raw pool, each pinned once; perhaps none."""
        if self.memory.compression is None:
            return [Place(Tier.WARM, slot) for slot in self.try_take_warm(count)]
        with self.changed:
            self.reap()
            slots = self.memory.compression.slots
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
