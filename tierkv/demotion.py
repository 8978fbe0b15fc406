"""The way down: blocks are copied to the warm tier and encoded into the cold one behind the request."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import ceil
from typing import TypeAlias

from tierkv.block import TOKEN_BYTES, BlockHash, Tier
from tierkv.errors import CapacityError, ConfigError, StoreError
from tierkv.events import EventKind
from tierkv.index import Entry
from tierkv.movers.mover import Move, Ready
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.tiers import Compression, Job, Place, Tiers
from tierkv.work_queue import Priority
from tierkv.write_behind import WriteBehind

__all__ = ["AfterWrites", "Demoter", "Offloading"]

_log = logging.getLogger(__name__)

_BATCH_BLOCKS = 8
_QUEUE_BLOCKS = 4096
_STALL_S = 30.0  # beyond the wait for others who write: a batch that takes longer is not waited for at the end
_STALLED = "stalled"


AfterWrites: TypeAlias = Callable[[], None]
"""What is called when everything queued before it has been written; it raises nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """When the hot pool is fuller than `threshold`, a `ratio` of what nobody uses is demoted behind the request.

    Both are shares above 0, up to 1: of the places that the pool may take, and of the cached blocks.
    """

    threshold: float = 0.9
    ratio: float = 0.2

    def __post_init__(self) -> None:
        for name in ("threshold", "ratio"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"offload_{name} must lie above 0 and be at most 1, got {getattr(self, name)}")


class Demoter:
    """Writes blocks down and makes room in the hot pool.

    One thread does the writing. It keeps a warm slot (staging slots, if the warm tier is compressed) of its own,
    so that it always gets on: everyone who waits for room waits for it. `staging` are these slots.
    """

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        pool = tiers.compression.slots if tiers.compression else tiers.index.warm
        self.staging = pool.allocate(max(1, min(_BATCH_BLOCKS, pool.capacity // 2)) if tiers.compression else 1)
        tiers.reserved_raw += len(self.staging)
        self._failed: set[BlockHash] = set()
        self._offloading: Offloading | None = None
        self._is_offloading = False
        self._is_tending = False
        self._queue: WriteBehind[Job | AfterWrites] = WriteBehind(
            self._process, capacity=_QUEUE_BLOCKS, batch_size=_BATCH_BLOCKS
        )

    def write_down(self, entry: Entry, written: Ready) -> None:
        """Queue an entry's hot block for the lower tiers; the caller holds the lock.

        A full queue drops the block, which is counted: a request never waits for a disk.
        """
        self._offer(Job.of(entry, self._tiers.index.seal_of(entry), written))

    def write_tail(
        self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes, block_id: int, written: Ready
    ) -> None:
        """Do as `write_down` for a partly filled block, which has no entry; the caller holds it and its parent."""
        index = self._tiers.index
        seal = index.seal_behind(parent_hash, token_bytes)
        self._offer(Job(block_hash, parent_hash, token_bytes, seal, index.peek(parent_hash), block_id, written))

    def _offer(self, job: Job) -> None:
        self._tiers.index.hot.pin(job.block_id)
        if not self._queue.offer(job):
            self._tiers.index.unpin(Tier.HOT, job.block_id)
            self._tiers.skip(job, "queue_full")

    def after_writes(self, action: AfterWrites) -> bool:
        """Call something when everything queued so far has been written. False if the queue is full."""
        return self._queue.offer(action)

    def take_hot(self, count: int) -> list[int]:
        """Return `count` block ids, each pinned once, evicting and demoting as needed and as is of use.

        Waits for writes for at most `write_wait_s`, not at all while they stand still for longer than that; then the
        oldest ones are dropped. Raises CapacityError if there is not that much room beside what is in use even so, and
        ClosedError where it would wait.
        """
        tiers = self._tiers
        pool = tiers.index.hot
        deadline = time.monotonic() + tiers.write_wait_s
        with tiers.changed:
            while True:
                tiers.reap()
                was_idle = not self._queue.pending and not tiers.in_flight
                short = count + pool.used_count - pool.limit
                if short > 0 and count <= pool.limit - pool.referenced_count:  # else it would be in vain
                    self.evict_hot(short)
                if pool.free_count < count and self._is_too_late(deadline):
                    self._drop_writes(count)
                if pool.free_count >= count:
                    block_ids = pool.allocate(count)
                    tiers.wait_for_users(block_ids)
                    self._offload_soon()
                    return block_ids
                is_idle = was_idle and not self._queue.pending
                # Twice as late: what the batch in work holds may still be what is needed.
                if is_idle or (time.monotonic() >= deadline + tiers.write_wait_s and not tiers.in_flight):
                    raise CapacityError(
                        f"the hot pool has no room for {count} more blocks: {pool.referenced_count} of "
                        f"{pool.limit} are in use, and what is left is too little or pinned",
                        hint="raise hot_bytes"
                        + (" or the memory budget" if pool.limit < pool.capacity else "")
                        + ", or run fewer sequences at once",
                    )
                tiers.require_open()
                tiers.wait()

    def _is_too_late(self, deadline: float) -> bool:
        return time.monotonic() >= deadline or self._queue.stalled_s >= self._tiers.write_wait_s

    def _drop_writes(self, count: int) -> None:
        """Give queued writes up, oldest first, until `count` hot blocks are free; none where that would be in vain.

        The caller holds the lock.
        """
        pool = self._tiers.index.hot
        holders = Counter(job.block_id for job in self._queue.queued() if isinstance(job, Job))
        num_held = sum(pool.reference_count(block_id) == held for block_id, held in holders.items())
        if count > pool.limit - pool.referenced_count + num_held:
            return
        while (short := count - pool.free_count) > 0:
            evicted = len(self.evict_hot(short, write_first=False))
            if not evicted and not self._drop_oldest(short):
                return

    def _drop_oldest(self, count: int) -> int:
        dropped = self._queue.drop_oldest(count, lambda job: isinstance(job, Job))
        for job in dropped:
            assert isinstance(job, Job)
            self._tiers.index.unpin(Tier.HOT, job.block_id)
            self._tiers.skip(job, _STALLED)
            self._note_failure(job)
        return len(dropped)

    def evict_hot(self, count: int, *, write_first: bool = True) -> list[Entry]:
        """Evict up to `count` blocks, and return them; those that no lower tier has yet are queued to be written first.

        Without `write_first` these are lost, and counted. The caller holds the lock.
        """
        tiers = self._tiers
        ready: list[Entry] = []
        for victim in tiers.index.select_victims(Tier.HOT, count):
            if not self._must_write_first(victim):
                ready.append(victim)
            elif write_first:
                self.write_down(victim, tiers.written(victim))
            else:
                tiers.skip(Job.of(victim, tiers.index.seal_of(victim), tiers.mover.mark()), _STALLED)
                ready.append(victim)
        evicted = tiers.evict(ready, Tier.HOT)  # not one whose child is still to be written
        self._failed.difference_update(entry.block_hash for entry in evicted)
        return evicted

    def shrink(self) -> int:
        """Evict until the hot pool is within its limit, waiting for the writes that this needs.

        Return how many blocks are beyond it all the same: they are in use, or pinned.
        """
        pool = self._tiers.index.hot
        while excess := self._evict_excess():
            self._queue.flush()  # what had to be written first may go now
            if self._evict_excess() >= excess:
                break
        return pool.excess_count

    def keep_room(self) -> None:
        """Do what the hot pool's limit, and offloading, ask for now that blocks may have come out of use."""
        pool = self._tiers.index.hot
        if pool.limit < pool.capacity:
            self._evict_excess()
        if self._offloading:
            with self._tiers.changed:
                self._offload_soon()

    def set_offloading(self, offloading: Offloading | None) -> None:
        """Keep room in the hot pool ahead of requests from now on, or no more."""
        with self._tiers.changed:
            self._offloading = offloading
            self._offload_soon()

    def flush(self) -> None:
        """Wait until everything queued so far lies where it was to be written."""
        self._queue.flush()

    def tend(self) -> None:
        """Have the write thread write what reads have left to be written in the store, if it is time for that."""
        cold = self._tiers.cold
        if cold and cold.is_due and not self._is_tending:
            self._is_tending = self._queue.offer(self._tend)

    def close(self) -> bool:
        """Write what is queued and stop; what could not be written is logged. May be called twice.

        Return whether the write thread has ended. If not, it stands still within a write, and all that it may touch
        when it wakes up, which is everything in `tiers`, must be kept.
        """
        tiers = self._tiers
        before = tiers.stats.skip_reasons.copy()
        left = self._queue.close(stall_s=tiers.write_wait_s + _STALL_S)
        with tiers.changed:
            for job in left:
                if isinstance(job, Job):
                    tiers.index.unpin(Tier.HOT, job.block_id)
                    tiers.skip(job, _STALLED)
            lost = tiers.stats.skip_reasons - before
            if in_work := self._queue.pending:
                lost["in work"] = in_work
        if lost:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(lost.items()))
            _log.warning(
                "%d blocks were not written to lower tiers before the cache was closed: %s", lost.total(), reasons
            )
        return not self._queue.is_running

    def _tend(self) -> None:
        self._is_tending = False
        cold = self._tiers.cold
        try:
            if cold:
                cold.tend()
        except StoreError as exc:
            _log.warning("what readers have noted is not written yet: %s", exc)

    def _evict_excess(self) -> int:
        """Evict what is beyond the hot pool's limit. Return how many still are."""
        pool = self._tiers.index.hot
        with self._tiers.changed:
            self._tiers.reap()
            if pool.excess_count:
                self.evict_hot(pool.excess_count)
                self._tiers.changed.notify_all()
            return pool.excess_count

    def _offload_soon(self) -> None:
        """Have the write thread offload a share of what nobody uses, if the hot pool is too full.

        The caller holds the lock.
        """
        if not self._is_offloading and self._num_to_offload():
            self._is_offloading = self._queue.offer(self._offload)

    def _num_to_offload(self) -> int:
        pool, offloading = self._tiers.index.hot, self._offloading
        if not offloading or pool.used_count <= offloading.threshold * pool.limit:
            return 0
        return ceil(offloading.ratio * pool.idle_count)

    def _offload(self) -> None:
        """Choose what is to be offloaded, and write down what the warm tier lacks; it goes once that is done."""
        tiers = self._tiers
        with tiers.changed:
            count = self._num_to_offload()
            victims = tiers.index.select_victims(Tier.HOT, count) if count else []
            for entry in victims:
                if entry.warm_slot is None and not (tiers.lower and entry.in_cold):
                    self.write_down(entry, tiers.written(entry))
            self._is_offloading = bool(victims) and self._queue.offer(partial(self._evict_offloaded, victims))

    def _evict_offloaded(self, victims: Sequence[Entry]) -> None:
        """Evict what a lower tier has by now, children before parents, if still nobody uses it."""
        tiers = self._tiers
        with tiers.changed:
            self._is_offloading = False
            for entry in victims:
                if tiers.index.is_evictable(entry, Tier.HOT) and (entry.warm_slot is not None or entry.in_cold):
                    tiers.evict([entry], Tier.HOT)
            tiers.changed.notify_all()

    def _must_write_first(self, entry: Entry) -> bool:
        has_copy = entry.warm_slot is not None or entry.in_cold
        return not has_copy and entry.block_hash not in self._failed

    def _process(self, work: list[Job | AfterWrites]) -> None:
        for is_job, run in groupby(work, lambda each: isinstance(each, Job)):
            if is_job:
                self._write([each for each in run if isinstance(each, Job)])
                self.keep_room()  # what had to be written before it might go
            else:
                for action in run:
                    assert not isinstance(action, Job)
                    action()

    def _write(self, jobs: list[Job]) -> None:
        if self._tiers.lower:
            try:
                self._tiers.lower.write(jobs)
            finally:
                self._note_failed(jobs)
                self._tiers.unpin_all(Tier.HOT, [job.block_id for job in jobs])
            return
        while jobs:
            slots = [] if self._tiers.compression else self._tiers.try_take_warm(len(jobs))
            is_kept = bool(slots)
            slots = slots or self.staging
            batch, jobs = jobs[: len(slots)], jobs[len(slots) :]
            try:
                self._write_batch(batch, slots, is_kept=is_kept)
            except StoreError as exc:
                _log.warning("%d blocks were not written to lower tiers: %s", len(batch), exc)
                with self._tiers.changed:
                    for job in batch:
                        self._tiers.skip(job, "io_error")
            except BaseException:
                self._tiers.unpin(Place(Tier.HOT, job.block_id) for job in jobs)
                raise

    def _write_batch(self, jobs: list[Job], slots: Sequence[int], *, is_kept: bool) -> None:
        """Write blocks down by way of `slots`, which become the warm tier's if `is_kept`."""
        tiers = self._tiers
        held = [Place(Tier.HOT, job.block_id) for job in jobs]
        try:
            with tiers.watch.span("demote") as detail:
                detail["blocks"] = len(jobs)
                if tiers.compression:
                    self._write_compressed(jobs, tiers.compression)
                raw = list(zip(jobs if is_kept else self._missing(jobs), slots, strict=False))
                for job, slot in raw:
                    copied = tiers.mover.demote([Move(job.block_id, slot)], after=job.written)
                if raw:
                    copied.synchronize()
            with tiers.changed:
                if is_kept:
                    for job, slot in raw:
                        self._attach_warm(job, slot)
            tiers.unpin(held)
            held = []
            with tiers.watch.span("store cold") as detail:
                detail["blocks"] = self._store(raw)
        finally:
            self._note_failed(jobs)
            tiers.unpin(held)
            tiers.unpin(Place(Tier.WARM, slot) for slot in slots if is_kept)

    def _note_failed(self, jobs: Sequence[Job]) -> None:
        """Remember which blocks no lower tier has taken, so that they may be evicted all the same."""
        with self._tiers.changed:
            for job in jobs:
                self._note_failure(job)

    def _note_failure(self, job: Job) -> None:
        entry = self._entry_of(job)
        if entry and entry.warm_slot is None and not entry.in_cold:
            self._failed.add(job.block_hash)

    def _write_compressed(self, jobs: Sequence[Job], compression: Compression) -> None:
        """Keep blocks compressed in the warm tier, those that fit a slot there."""
        tiers = self._tiers
        with tiers.changed:
            entries = [self._entry_of(job) for job in jobs]
            wanted = [job for job, e in zip(jobs, entries, strict=True) if e is None or e.warm_slot is None]
            slots = tiers.try_take_warm(len(wanted))
        kept = list(zip(wanted, slots, strict=False))
        if not kept:
            return
        try:
            fits = compression.mover.demote(
                [Move(job.block_id, slot) for job, slot in kept],
                num_tokens=[len(job.token_bytes) // TOKEN_BYTES for job, _ in kept],
                after=[job.written for job, _ in kept],
            )
            with tiers.changed:
                for (job, slot), is_there in zip(kept, fits, strict=True):
                    if is_there:
                        self._attach_warm(job, slot)
        finally:
            tiers.unpin(Place(Tier.WARM, slot) for slot in slots)

    def _attach_warm(self, job: Job, slot: int) -> None:
        entry = self._tiers.index.insert(job.block_hash, job.parent_hash, job.token_bytes, seal=job.seal)
        if entry and entry.warm_slot is None:
            self._tiers.attach(entry, Tier.WARM, slot, EventKind.DEMOTE)
            self._tiers.stats.bytes_in[Tier.WARM] += self._tiers.layout.packed_bytes(entry.num_tokens)

    def _entry_of(self, job: Job) -> Entry | None:
        return self._tiers.index.get(job.block_hash, job.parent_hash, job.token_bytes, seal=job.seal)

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs whose block the store lacks; none without a store."""
        cold = self._tiers.cold
        return [job for job in jobs if not cold.contains(job.block_hash)] if cold else []

    def _store(self, raw: Sequence[tuple[Job, int]]) -> int:
        """Encode blocks from their raw slots and put those that the store lacks, parents before children.

        Return how many it lacked.
        """
        tiers = self._tiers
        cold = tiers.cold
        if cold is None:
            return 0
        slots = {job.block_hash: slot for job, slot in raw}
        missing = [(job, slots[job.block_hash]) for job in self._missing([job for job, _ in raw])]
        outcomes = cold.put(tiers.threads.map(Priority.DEMOTION, self._encode, missing))
        with tiers.changed:
            for (job, _), outcome in zip(missing, outcomes, strict=True):
                if outcome not in (PutOutcome.STORED, PutOutcome.EXISTS):
                    self._tiers.skip(job, outcome.value)
                    continue
                tiers.watch.block(EventKind.DEMOTE, Tier.COLD, job)
                tiers.stats.bytes_in[Tier.COLD] += tiers.layout.packed_bytes(len(job.token_bytes) // 4)
                entry = self._entry_of(job)
                if entry:
                    entry.in_cold = True
        return len(missing)

    def _encode(self, job_and_slot: tuple[Job, int]) -> EncodedRecord:
        job, slot = job_and_slot
        info = BlockInfo(
            block_hash=job.block_hash,
            parent=job.parent_hash,
            namespace=self._tiers.namespace,
            seal=job.seal,
            token_bytes=job.token_bytes,
        )
        return encode_record(info, self._tiers.raw_slots[slot], layout=self._tiers.layout, codec=self._tiers.codec)
