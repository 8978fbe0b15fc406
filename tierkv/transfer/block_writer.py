"""BlockWriter: copies blocks to warm slots, encodes them and puts them into the store, on the write thread."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tierkv.background.work_queue import Priority
from tierkv.errors import StoreError
from tierkv.index.index import Entry
from tierkv.movers.mover import Move
from tierkv.remote_tiers.source import RemoteSource
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.transfer.memory import Compression
from tierkv.transfer.tiers import Job, Place, Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier
from tierkv.values.events import EventKind

__all__ = ["Batch", "BlockWriter"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks to write down together, and the raw slots to copy them to, which become the warm tier's if `is_kept`."""

    jobs: Sequence[Job]
    slots: Sequence[int] = ()
    is_kept: bool = False


class BlockWriter:
    """Writes blocks down, a few at a time, by one thread.

    `staging`: a warm slot (staging slots, if the warm tier is compressed) that it never frees. Threads that wait for
    room wait for the write thread, so it must never wait for them.
    """

    def __init__(self, tiers: Tiers, *, most_blocks: int) -> None:
        self._tiers = tiers
        pool = tiers.memory.compression.slots if tiers.memory.compression else tiers.index.warm
        self.staging: list[int] = pool.allocate(
            max(1, min(most_blocks, pool.capacity // 2)) if tiers.memory.compression else 1
        )
        tiers.memory.reserved_raw += len(self.staging)
        self._failed: set[BlockHash] = set()

    def begin(self, jobs: Sequence[Job]) -> Batch:
        """Take slots for the leading jobs, as many as there are slots for, at least one."""
        if self._tiers.lower:
            return Batch(jobs)
        slots: list[int] = []
        if not self._tiers.memory.compression:
            try:
                slots = self._tiers.try_take_warm(len(jobs))
            except Exception:  # noqa: BLE001 - of the user's policy: the write thread's own slot serves
                _log.exception("no room was made in the warm tier")
        return Batch(jobs[: len(slots or self.staging)], slots or self.staging, is_kept=bool(slots))

    def write(self, batch: Batch) -> None:
        """Write a batch that was begun, and unpin its blocks. Blocks that cannot be written are counted, not raised."""
        tiers = self._tiers
        if tiers.lower:
            try:
                if tiers.stores:
                    tiers.lower.write(batch.jobs)
            finally:
                self._note_failed(batch.jobs)
                tiers.unpin_all(Tier.HOT, [job.block_id for job in batch.jobs])
            return
        try:
            self._write(batch.jobs, batch.slots, is_kept=batch.is_kept)
        except StoreError as exc:
            _log.warning("%d blocks were not written to lower tiers: %s", len(batch.jobs), exc)
            with tiers.changed:
                for job in batch.jobs:
                    tiers.skip(job, "io_error")

    def has_failed(self, entry: Entry) -> bool:
        """Return whether no lower tier has taken a block when it was written: then it may be evicted all the same.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        return entry.block_hash in self._failed

    def note_failure(self, job: Job) -> None:
        """Remember a block that no lower tier has taken; forget about it if one has it.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        entry = self._tiers.entry_of(job)
        if entry and entry.warm_slot is None and not entry.in_cold:
            self._failed.add(job.block_hash)
        elif entry:
            self._failed.discard(job.block_hash)

    def forget(self, entries: Iterable[Entry]) -> None:
        """Forget about blocks that are gone; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        if self._failed:
            self._failed.difference_update(entry.block_hash for entry in entries)

    def _write(self, jobs: Sequence[Job], slots: Sequence[int], *, is_kept: bool) -> None:
        """Write blocks down through `slots`, which become the warm tier's if `is_kept`."""
        tiers = self._tiers
        held = [Place(Tier.HOT, job.block_id) for job in jobs]
        try:
            with tiers.span("demote") as detail:
                detail["blocks"] = len(jobs)
                if tiers.memory.compression:
                    self._write_compressed(jobs, tiers.memory.compression)
                raw = list(zip(jobs if is_kept else self._missing(jobs), slots, strict=False))
                for job, slot in raw:
                    copied = tiers.memory.mover.demote([Move(job.block_id, slot)], after=job.written)
                if raw:
                    copied.synchronize()
            with tiers.changed:
                if is_kept:
                    for job, slot in raw:
                        self._attach_warm(job, slot)
            tiers.unpin(held)
            held = []
            with tiers.span("store cold") as detail:
                detail["blocks"] = self._store(raw)
        finally:
            self._note_failed(jobs)
            tiers.unpin(held)
            tiers.unpin(Place(Tier.WARM, slot) for slot in slots if is_kept)

    def _note_failed(self, jobs: Sequence[Job]) -> None:
        with self._tiers.changed:
            for job in jobs:
                self.note_failure(job)

    def _write_compressed(self, jobs: Sequence[Job], compression: Compression) -> None:
        """Keep blocks compressed in the warm tier, those that fit a slot there."""
        tiers = self._tiers
        with tiers.changed:
            entries = [self._tiers.entry_of(job) for job in jobs]
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
        """Record that a warm slot has a job's block, unless another slot has it; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        entry = self._tiers.insert(job)
        if entry and entry.warm_slot is None:
            self._tiers.attach(entry, Tier.WARM, slot, EventKind.DEMOTE)
            self._tiers.stats.bytes_in[Tier.WARM] += self._tiers.layout.token_bytes * entry.num_tokens

    def _missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Return the jobs whose block the store lacks; without a store all, if a remote tier may lack them."""
        cold = self._writable_store
        if not cold or not jobs:
            return list(jobs) if self._writable_remote else []
        found = cold.lookup_many([job.block_hash for job in jobs])
        return [job for job, entry in zip(jobs, found, strict=True) if entry is None]

    @property
    def _writable_store(self) -> ColdStore | None:
        cold = self._tiers.cold if self._tiers.stores else None
        return None if cold is None or cold.read_only else cold

    @property
    def _writable_remote(self) -> RemoteSource | None:
        return self._tiers.remote if self._tiers.stores else None

    def _store(self, raw: Sequence[tuple[Job, int]]) -> int:
        """Encode blocks from their raw slots and put those that the store lacks, parents before children.

        Remote tiers get the same blocks, or all where there is no store, from a queue of their own. Return how many.
        """
        tiers = self._tiers
        cold, remote = self._writable_store, self._writable_remote
        if cold is None and remote is None:
            return 0
        missing = [(job, slot) for job, slot in raw if remote is None or remote.lookup(job.block_hash) is None]
        if cold:
            slots = {job.block_hash: slot for job, slot in raw}
            missing = [(job, slots[job.block_hash]) for job in self._missing([job for job, _ in raw])]
        records = tiers.memory.threads.map(Priority.DEMOTION, self._encode, missing)
        if remote:
            for record in records:
                remote.write(record)
        outcomes = cold.put(records) if cold else []
        with tiers.changed:
            for (job, _), outcome in zip(missing, outcomes, strict=False):
                if outcome not in (PutOutcome.STORED, PutOutcome.EXISTS):
                    self._tiers.skip(job, outcome.value)
                    continue
                if tiers.observers.are_there:
                    tiers.observers.block(EventKind.DEMOTE, Tier.COLD, job)
                tiers.stats.bytes_in[Tier.COLD] += tiers.layout.token_bytes * (len(job.token_bytes) // TOKEN_BYTES)
                entry = self._tiers.entry_of(job)
                if entry:
                    entry.in_cold = True
        return len(missing)

    def _encode(self, job_and_slot: tuple[Job, int]) -> EncodedRecord:
        job, slot = job_and_slot
        assert job.content_digest, "the write thread computes the digest before it writes"
        info = BlockInfo.of(job, namespace=self._tiers.namespace, content_digest=job.content_digest)
        memory = self._tiers.memory
        return encode_record(info, memory.raw.slots[slot], layout=memory.layout, codec=memory.codec)
