"""Offloader: makes room in the hot pool, and has blocks written to the lower tiers in the background."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import takewhile
from math import ceil
from typing import TypeAlias

from tierkv.background.work_queue import WriteBehind
from tierkv.errors import CapacityError, StoreError
from tierkv.index.chosen_eviction import ChosenEviction
from tierkv.index.index import Entry
from tierkv.movers.mover import Ready
from tierkv.transfer.block_writer import BlockWriter
from tierkv.transfer.offloading import Offloading
from tierkv.transfer.tiers import Job, Tiers
from tierkv.values.block import BlockHash, Tier

__all__ = ["AfterWrites", "Offloader", "Offloading"]

_log = logging.getLogger(__name__)

_BATCH_BLOCKS = 8
_QUEUE_BLOCKS = 4096
_STALL_S = 30.0  # at the end, how long a batch may take beyond the wait for the store's write lock
_STALLED = "stalled"


AfterWrites: TypeAlias = Callable[[], None]
"""Called when everything queued before it has been written; it raises nothing."""


class Offloader:
    """Has blocks written down by one thread, the write thread, and makes room in the hot pool. `writer`: its work."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self.writer: BlockWriter = BlockWriter(tiers, most_blocks=_BATCH_BLOCKS)
        tiers.chosen = ChosenEviction(tiers.index, (Tier.HOT, Tier.WARM), self._evict_chosen, tiers.changed)
        self._offloading: Offloading | None = None
        self._is_offloading = False
        self._is_maintaining = False
        self._queue: WriteBehind[Job | AfterWrites] = WriteBehind(
            self._process, capacity=_QUEUE_BLOCKS, batch_size=_BATCH_BLOCKS
        )

    def write_down(self, entry: Entry, written: Ready) -> None:
        """Queue an entry's hot block for the lower tiers; the caller holds the lock.

        A full queue drops the block, which is counted: a request never waits for a disk.
        """
        assert self._tiers.changed.is_owned()
        self._enqueue(self._tiers.job_of(entry, written))

    def write_down_all(self, entries: Sequence[Entry], written: Ready) -> None:
        """Do as `write_down` for several entries, parents before children."""
        assert self._tiers.changed.is_owned()
        tiers = self._tiers
        jobs = tiers.jobs_of(entries, written)
        tiers.index.hot.pin_all([job.block_id for job in jobs])
        for job in jobs[self._queue.try_put_all(jobs) :]:
            tiers.index.unpin(Tier.HOT, job.block_id)
            tiers.skip(job, "queue_full")

    def write_partial(
        self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes, block_id: int, written: Ready
    ) -> None:
        """Do as `write_down` for a partly filled block, which has no entry. It and its parent are pinned.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        index = self._tiers.index
        content_digest = index.content_digest_after(parent_hash, token_bytes)
        self._enqueue(
            Job(block_hash, parent_hash, token_bytes, content_digest, index.peek(parent_hash), block_id, written)
        )

    def _enqueue(self, job: Job) -> None:
        """Pin a job's block and queue it, or drop it if the queue is full; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        self._tiers.index.hot.pin(job.block_id)
        if not self._queue.try_put(job):
            self._tiers.index.unpin(Tier.HOT, job.block_id)
            self._tiers.skip(job, "queue_full")

    def after_writes(self, action: AfterWrites) -> bool:
        """Call something when everything queued so far has been written. False if the queue is full."""
        return self._queue.try_put(action)

    def take_hot(self, count: int) -> list[int]:
        """Return `count` block ids, each pinned once; evicts and demotes blocks as needed.

        Waits for writes for at most `write_wait_s`, not at all while a write hangs for longer than that; then the
        oldest writes are dropped. Raises CapacityError if the blocks in use still leave too little room, and
        ClosedError where it would wait.
        """
        tiers = self._tiers
        pool = tiers.index.hot
        deadline = time.monotonic() + tiers.write_wait_s
        with tiers.changed:
            while True:
                tiers.reap()
                short = count + pool.used_count - pool.limit
                was_idle = short > 0 and not self._queue.pending and not tiers.copies.in_flight
                if short > 0 and count <= pool.limit - pool.referenced_count:  # otherwise evicting does not help
                    self.evict_hot(short)
                if pool.free_count < count and self._is_too_late(deadline):
                    self._drop_writes(count)
                if pool.free_count >= count:
                    block_ids = pool.allocate(count)
                    tiers.copies.wait_for_users(block_ids)
                    self._offload_soon()
                    return block_ids
                is_idle = was_idle and not self._queue.pending
                # Wait twice as long: the batch in work may hold the blocks that are needed.
                if is_idle or (time.monotonic() >= deadline + tiers.write_wait_s and not tiers.copies.in_flight):
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
        """Drop queued writes, oldest first, until `count` hot blocks are free; none where that does not suffice.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
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
        """Drop up to `count` of the oldest writes. Return how many those were; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        dropped = self._queue.drop_oldest(count, lambda job: isinstance(job, Job))
        for job in dropped:
            assert isinstance(job, Job)
            self._tiers.index.unpin(Tier.HOT, job.block_id)
            self._tiers.skip(job, _STALLED)
            self.writer.note_failure(job)
        return len(dropped)

    def evict_hot(self, count: int, *, write_first: bool = True) -> list[Entry]:
        """Evict up to `count` blocks, and return them; blocks that no lower tier has are queued to be written instead.

        Without `write_first` those are lost, and counted. The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        tiers = self._tiers
        selected = tiers.index.select_evictions(Tier.HOT, count)
        if None not in [entry.warm_slot for entry in selected]:  # usually
            return self.evict(selected)
        ready: list[Entry] = []
        for entry in selected:
            if entry.warm_slot is not None or not self._must_write_first(entry):
                ready.append(entry)
            elif write_first:
                self.write_down(entry, tiers.copies.written(entry))
            else:
                tiers.skip(tiers.job_of(entry, tiers.memory.mover.mark()), _STALLED)
                ready.append(entry)
        return self.evict(ready)  # not one whose child is still to be written

    def evict_written(self, count: int) -> int:
        """Evict up to `count` blocks, and wait until those that no lower tier has are written. Return how many went.

        The caller does not hold the lock.
        """
        assert not self._tiers.changed.is_owned()
        num_gone = self._evict_reaped(count)
        while num_gone < count:
            self._queue.flush()
            num_more = self._evict_reaped(count - num_gone)
            if not num_more:
                break
            num_gone += num_more
        return num_gone

    def _evict_reaped(self, count: int) -> int:
        with self._tiers.changed:
            self._tiers.reap()
            evicted = self.evict_hot(count)
            self._tiers.changed.notify_all()
            return len(evicted)

    def evict(self, entries: Sequence[Entry]) -> list[Entry]:
        """Evict just these blocks, children before parents, and return them; one with hot children stays.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        evicted = self._tiers.evict(entries, Tier.HOT)
        self.writer.forget(evicted)
        return evicted

    def _evict_chosen(self, entries: Sequence[Entry], tier: Tier) -> list[Entry]:
        return self.evict(entries) if tier is Tier.HOT else self._tiers.evict(entries, tier)

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
        """Evict and offload what is due, now that blocks may have come out of use."""
        pool, chosen = self._tiers.index.hot, self._tiers.chosen
        if chosen.marked:
            with self._tiers.changed:
                chosen.retry()
                self._tiers.changed.notify_all()
        if pool.limit < pool.capacity:
            self._evict_excess()
        if self._offloading:
            with self._tiers.changed:
                self._offload_soon()

    def set_offloading(self, offloading: Offloading | None) -> None:
        """Offload ahead of requests from now on; None ends it."""
        with self._tiers.changed:
            self._offloading = offloading
            self._offload_soon()

    def flush(self) -> None:
        """Wait until everything queued so far lies where it was to be written."""
        self._queue.flush()

    def wait_for_writes(self) -> bool:
        """Do as `flush`, but return False where one write takes longer than a request waits."""
        return self._queue.flush(stall_s=self._tiers.write_wait_s)

    def _leave_out_marked(self, jobs: list[Job]) -> list[Job]:
        """Return the jobs whose blocks were not evicted meanwhile; unpin the blocks of the rest."""
        tiers = self._tiers
        with tiers.changed:
            marked = tiers.chosen.marked
            kept = [job for job in jobs if tiers.index.peek(job.block_hash) not in marked and job.parent not in marked]
            for job in jobs:
                if job not in kept:
                    tiers.index.unpin(Tier.HOT, job.block_id)
                    tiers.skip(job, "evicted")
            tiers.changed.notify_all()
        return kept

    def maintain_store(self) -> None:
        """Have the write thread write the touches and damage that reads have noted, if it is time for that."""
        cold = self._tiers.cold
        if cold and cold.notes.are_due and not self._is_maintaining:
            self._is_maintaining = self._queue.try_put(self._maintain)

    def close(self) -> bool:
        """Write what is queued and stop; what could not be written is logged. May be called twice.

        Return whether the write thread has ended. If not, it hangs in a write, and everything in `tiers`, which it may
        still touch, must be kept.
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

    def _maintain(self) -> None:
        self._is_maintaining = False
        cold = self._tiers.cold
        try:
            if cold:
                cold.maintain()
        except StoreError as exc:
            _log.warning("what readers have noted is not written yet: %s", exc)

    def _evict_excess(self) -> int:
        """Evict the blocks beyond the hot pool's limit. Return how many still are."""
        pool = self._tiers.index.hot
        with self._tiers.changed:
            self._tiers.reap()
            if pool.excess_count:
                self.evict_hot(pool.excess_count)
                self._tiers.changed.notify_all()
            return pool.excess_count

    def _offload_soon(self) -> None:
        """Have the write thread offload a share of the unused blocks, if the hot pool is too full.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        if not self._is_offloading and self._num_to_offload():
            self._is_offloading = self._queue.try_put(self._offload)

    def _num_to_offload(self) -> int:
        """Return how many blocks are to be offloaded now; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        pool, offloading = self._tiers.index.hot, self._offloading
        if not offloading or pool.used_count <= offloading.threshold * pool.limit:
            return 0
        return ceil(offloading.ratio * pool.idle_count)

    def _offload(self) -> None:
        """Choose blocks to offload, and write down those that the warm tier lacks; all are evicted after that."""
        tiers = self._tiers
        with tiers.changed:
            count = self._num_to_offload()
            entries = tiers.index.select_evictions(Tier.HOT, count) if count else []
            for entry in entries:
                if entry.warm_slot is None and not (tiers.lower and entry.in_cold):
                    self.write_down(entry, tiers.copies.written(entry))
            self._is_offloading = bool(entries) and self._queue.try_put(partial(self._evict_offloaded, entries))

    def _evict_offloaded(self, entries: Sequence[Entry]) -> None:
        """Evict the unused blocks that a lower tier has by now, children before parents."""
        tiers = self._tiers
        with tiers.changed:
            self._is_offloading = False
            for entry in entries:
                if tiers.index.is_evictable(entry, Tier.HOT) and (entry.warm_slot is not None or entry.in_cold):
                    self.evict([entry])
            tiers.changed.notify_all()

    def _must_write_first(self, entry: Entry) -> bool:
        """Return whether evicting a block now would lose it; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        has_copy = entry.warm_slot is not None or entry.in_cold
        return not has_copy and not self.writer.has_failed(entry)

    def _process(self, work: list[Job | AfterWrites]) -> None:
        """Carry out the first jobs of the queue.

        Jobs without a slot go back into the queue before this batch is written: they can be dropped while it hangs.
        """
        while work:
            jobs = [each for each in takewhile(lambda each: isinstance(each, Job), work) if isinstance(each, Job)]
            if not jobs:
                action = work.pop(0)
                assert not isinstance(action, Job)
                action()
                continue
            if self._tiers.chosen.marked:
                num_before = len(jobs)
                jobs = self._leave_out_marked(jobs)
                work = [*jobs, *work[num_before:]]
                if not jobs:
                    self.keep_room()
                    continue
            batch = self.writer.begin(self._tiers.with_digests(jobs))
            work = work[len(batch.jobs) :]
            if len(batch.jobs) < len(jobs):
                self._queue.put_back(work)
                work = []
            try:
                self.writer.write(batch)
                self.keep_room()  # what had to be written before it might go
            except Exception:  # noqa: BLE001 - of the user's policy or observer; later jobs go on
                _log.exception("writing %d blocks to lower tiers failed", len(batch.jobs))
