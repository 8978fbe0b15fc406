"""The writing half of the cold store: one transaction at a time; blocks are evicted before others need their room."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeVar

import lmdb

from tierkv.errors import CapacityError, StoreBusyError, StoreError
from tierkv.storage.cold_batch import DamagedPagesError, WriteBatch, groups_of
from tierkv.storage.cold_eviction import (
    Chosen,
    EvictionCandidates,
    EvictionReport,
    StoredPrompt,
    choose_blocks,
    choose_prompt,
    evict_in_batch,
)
from tierkv.storage.cold_notes import Counters, PendingNotes
from tierkv.storage.cold_repair import repair_block
from tierkv.storage.cold_rows import Databases, map_bytes_of, namespace_rows, padded_bytes
from tierkv.storage.cold_tenants import TenantSettings, write_tenants
from tierkv.storage.free_space import free_space, growth_room, require_free
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord
from tierkv.values.block import BlockHash
from tierkv.values.locks import OwnedLock
from tierkv.values.units import format_bytes

__all__ = ["ColdWriter"]

MAX_BATCH_BYTES = 16 << 20  # of one write transaction, whose dirty pages are held in memory that the C library keeps
MAX_BATCH_REMOVALS = 1024
MAX_LIVE_BYTES = 1 << 62  # more than any disk has
MAX_REPAIRS = 64  # of damaged pages that one transaction may come across
PAUSE_S = 10.0  # after a put failed for a full disk or a busy store, all puts are refused for so long
READER_CHECK_S = 60.0

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class _DryRunError(Exception):
    """Aborts a transaction that only finds out what it would change."""


class ColdWriter:
    """Puts, removes and evicts. Thread-safe; one batch at a time among all threads and processes.

    A writer waits for other writers for `write_wait_s` at most; then StoreBusyError is raised, or is an outcome.
    Readers never wait: they leave `notes`, which are written with the next put, flush or `maintain`.
    quota_bytes: holds until a batch has read the stored quota. min_free_bytes: as for `require_free`.
    """

    def __init__(
        self,
        env: LmdbEnv,
        *,
        quota_bytes: int,
        min_free_bytes: int | None,
        clock: Callable[[], float],
        candidates: EvictionCandidates,
        counters: Counters,
        write_wait_s: float = 30.0,
    ) -> None:
        self._env = env
        self.quota_bytes: int = quota_bytes
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._candidates = candidates
        self._counters = counters
        self._write_wait_s = write_wait_s
        self._lock = OwnedLock()
        self.notes: PendingNotes = PendingNotes(clock, read_only=env.read_only)
        self._refused_until = float("-inf")
        self._refusal = PutOutcome.FULL
        self._readers_checked = clock()

    @contextlib.contextmanager
    def batch(self) -> Iterator[WriteBatch]:
        """A write transaction. Raises StoreError, with lmdb.Error as its cause, if it cannot be committed."""
        with self._exclusive(), self._transaction() as batch:
            yield batch

    def maintain(self) -> None:
        """Write all notes, and repair the blocks that are noted as damaged.

        Raises StoreError; accesses, and damage in a busy store, then stay noted.
        """
        with self._exclusive():
            self._repair_damaged()
            if self.notes.have_rows:
                with self._transaction():
                    pass

    def put(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        """Store records in as few transactions as memory allows."""
        outcomes: list[PutOutcome] = []
        try:
            with self._exclusive():
                try:
                    self._repair_damaged()
                except StoreBusyError as exc:  # else the records would wait as long once more
                    self._refuse(PutOutcome.BUSY, exc)
                # Only later batches may use what a batch frees: small batches keep the file of a small quota small.
                for group in groups_of(records, min(MAX_BATCH_BYTES, self.quota_bytes // 128)):
                    outcomes += self._put_group(group)
        except StoreBusyError:
            outcomes += [PutOutcome.BUSY] * (len(records) - len(outcomes))
        self._counters.count_puts(outcomes)
        return outcomes

    def evict(
        self,
        to_bytes: int | None,
        namespace: BlockHash | None = None,
        older_than_s: float | None = None,
        prompt: StoredPrompt | None = None,
        *,
        dry_run: bool = False,
    ) -> EvictionReport:
        """Remove the unpinned blocks that match all filters, if there is a filter, then more down to a size."""
        if dry_run:
            return self._would_evict(partial(evict_in_batch, to_bytes, namespace, older_than_s, prompt))
        removed: list[BlockHash] = []
        freed_bytes = num_continued = num_pinned = 0
        with self._exclusive():
            if namespace is not None or older_than_s is not None or prompt is not None:
                chosen, num_pinned = self._choose(namespace, older_than_s, prompt)
                for start in range(0, len(chosen), MAX_BATCH_REMOVALS):
                    group = chosen[start : start + MAX_BATCH_REMOVALS]
                    report = self._evict(partial(WriteBatch.remove_leaves, block_hashes=group))
                    removed += report.hashes
                    freed_bytes += report.freed_bytes
                num_continued = len(chosen) - len(removed)
            if to_bytes is not None:
                report = self._evict(partial(self._candidates.make_room, to_bytes=to_bytes))
                removed += report.hashes
                freed_bytes += report.freed_bytes
        return EvictionReport(
            blocks=len(removed),
            freed_bytes=freed_bytes,
            hashes=tuple(removed),
            num_pinned=num_pinned,
            num_continued=num_continued,
        )

    def set_tenants(
        self, changes: Mapping[str, TenantSettings | None], *, evict: bool, may_exceed: bool
    ) -> EvictionReport:
        """Store settings of tenants. Raises CapacityError if a tenant has more than its new limit, unless `evict`.

        may_exceed: as for `ColdStore.set_tenants`.
        """

        def work(batch: WriteBatch) -> None:
            quota_bytes = batch.quota_bytes or self.quota_bytes
            write_tenants(batch.txn, batch.databases, changes, quota_bytes, may_exceed=may_exceed)
            batch.read_tenants()
            for tenant in batch.usage.settings.keys() & changes.keys():
                over = 0 if may_exceed else -batch.usage.room(tenant)
                if over > 0 and not evict:
                    raise CapacityError(
                        f"{batch.usage.settings[tenant].name} has {format_bytes(over)} more than its new limit",
                        hint="with evict=True, or --evict, these are evicted",
                    )
                if over > 0:
                    limit = batch.usage.live_bytes(tenant) - over
                    self._candidates.make_room_of_tenant(batch, tenant, to_bytes=limit, keep=frozenset())

        with self._exclusive():
            return self._evict(work)

    def _would_evict(self, evict: Callable[[WriteBatch, EvictionCandidates], EvictionReport]) -> EvictionReport:
        """Return the report of an eviction, and undo it. Raises StoreError."""
        report = EvictionReport(blocks=0, freed_bytes=0)

        def work(batch: WriteBatch) -> None:
            nonlocal report
            report = evict(batch, self._candidates)
            raise _DryRunError

        with self._exclusive(), contextlib.suppress(_DryRunError):
            self._attempt(work)
        return report

    def set_quota(self, quota_bytes: int) -> None:
        """Store another quota. Evicts nothing: the next put does, if more is live. Raises StoreError."""
        with self.batch() as batch:
            batch.set_quota(quota_bytes)
        self._adopt_quota(quota_bytes)

    def require_room(self, num_bytes: int) -> None:
        """Raise CapacityError if no record of so many bytes could be stored, evicting included."""
        if padded_bytes(num_bytes) > self.quota_bytes:
            raise CapacityError(
                f"cold store {self._env.path} has a quota of {format_bytes(self.quota_bytes)}, too small for one block",
                hint="tierkv quota SIZE sets another",
            )
        with self._env.read() as txn:
            live_bytes = sum(row.value_bytes for row in namespace_rows(txn, Databases(*self._env.handles)).values())
        if live_bytes < padded_bytes(num_bytes):  # else it evicts
            require_free(self._env.path, self._min_free_bytes, num_bytes)

    def compact(self) -> None:
        """Rewrite the file without free pages; no batch of this process runs meanwhile."""
        with self._exclusive():
            self._env.compact()

    def attempt(self, work: Callable[[WriteBatch], Result]) -> Result:
        """Do work in one transaction, and again where it repaired damaged pages. Raises StoreError."""
        with self._exclusive():
            return self._attempt(work)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Be the only thread of this process that writes. Raises StoreBusyError."""
        assert not self._lock.is_owned(), "one batch at a time: a second one would wait for the first"
        if not self._lock.acquire(timeout=self._write_wait_s):
            raise StoreBusyError(
                f"cold store {self._env.path}: another thread has been writing for more than {self._write_wait_s:g} s"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _repair_damaged(self) -> None:
        """Repair or remove the blocks that readers found damaged. The caller holds the lock.

        Raises StoreBusyError, and then they stay noted. After another error the next reader notes the block again.
        """
        assert self._lock.is_owned()
        while not self._is_refusing() and (block_hash := self.notes.next_damaged()) is not None:
            removed = 0
            try:
                removed = self._attempt(partial(repair_block, block_hash=block_hash))
            except StoreBusyError:
                raise
            except StoreError as exc:
                _logger.warning("cold store %s: a damaged block could not be removed: %s", self._env.path, exc)
            self.notes.forget_damaged(block_hash)
            if removed:
                self._counters.count_damaged(removed)
                _logger.warning(
                    "cold store %s: block %s is damaged; %d removed", self._env.path, block_hash.hex(), removed
                )

    def _choose(self, namespace: BlockHash | None, older_than_s: float | None, prompt: StoredPrompt | None) -> Chosen:
        """Return the blocks that the filters match. The caller holds the lock."""
        assert self._lock.is_owned()
        with self._transaction() as batch:
            if prompt is not None:
                return choose_prompt(batch, prompt, older_than_s)
            return choose_blocks(batch, namespace, older_than_s)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[WriteBatch]:
        """One write transaction, touches first. The caller holds the lock."""
        assert self._lock.is_owned()
        self._clear_dead_readers()
        rows = self.notes.take_rows()
        try:
            with self._env.write() as txn:
                batch = WriteBatch(self._env, txn, self._clock())
                quota_bytes = batch.quota_bytes or self.quota_bytes
                batch.write_notes(rows)
                batch.end_pins()
                yield batch
                batch.finish()
        except BaseException:
            self._candidates.forget()
            self.notes.put_back(rows)
            raise
        self._adopt_quota(quota_bytes)

    def _adopt_quota(self, quota_bytes: int) -> None:
        """Use the stored quota: another process may have set it."""
        grows = quota_bytes > self.quota_bytes
        self.quota_bytes = quota_bytes
        if grows:
            try:
                self._env.grow_map(map_bytes_of(quota_bytes))
            except StoreError as exc:  # until it grows, less than the quota has room
                _logger.warning("%s", exc)

    def _refuse(self, outcome: PutOutcome, failure: StoreError) -> None:
        """Refuse all records for some seconds."""
        self._refusal = outcome
        self._refused_until = self._clock() + PAUSE_S
        _logger.warning("%s; nothing is stored for %.0f s", failure, PAUSE_S)

    def _put_group(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        """Store records in one transaction; return what became of each. The caller holds the lock."""
        assert self._lock.is_owned()
        if self._is_refusing():
            return [self._refusal] * len(records)
        needed = sum(padded_bytes(record.stored_bytes) for record in records)
        for is_full in (False, True):
            try:
                if is_full:
                    self._evict_spare(2 * needed)
                return self._insert(records, needed)
            except StoreError as exc:
                failure = exc
            if not isinstance(failure.__cause__, lmdb.Error):  # more room would not help
                break
        self._refuse(self._why_refused(failure, needed), failure)
        return [self._refusal] * len(records)

    def _why_refused(self, failure: StoreError, needed: int) -> PutOutcome:
        if isinstance(failure, StoreBusyError):
            return PutOutcome.BUSY
        if isinstance(failure.__cause__, lmdb.MapFullError):
            return PutOutcome.FULL
        with contextlib.suppress(StoreError):
            if free_space(self._env.path, self._min_free_bytes)[0] < needed:
                return PutOutcome.FULL
        return PutOutcome.IO_ERROR

    def _insert(self, records: Sequence[EncodedRecord], needed: int) -> list[PutOutcome]:
        """Make room for records and insert them; the caller holds the lock."""
        assert self._lock.is_owned()
        most_bytes = self._free_pages(records, needed)
        evicted: tuple[list[BlockHash], int] = [], 0

        def work(batch: WriteBatch) -> list[PutOutcome]:
            nonlocal evicted
            limit = min(batch.quota_bytes or self.quota_bytes, most_bytes)
            limits = self._candidates.make_room_for(batch, records, limit=limit)
            evicted = list(batch.removed), batch.removed_bytes
            return [batch.insert_within(record, limit) for record, limit in zip(records, limits, strict=True)]

        outcomes = self._attempt(work)
        self._counters.count_evicted(*evicted)
        return outcomes

    def _free_pages(self, records: Sequence[EncodedRecord], needed: int) -> int:
        """Evict for records that the file may not grow for. Return how many bytes may be live with them.

        LMDB takes pages for new values only from transactions before the last one. So the blocks go in a transaction of
        their own, and another one follows it. The caller holds the lock.
        """
        assert self._lock.is_owned()
        most_bytes, room = MAX_LIVE_BYTES, growth_room(self._env.path, self._min_free_bytes)

        def work(batch: WriteBatch) -> None:
            nonlocal most_bytes
            quota_bytes = batch.quota_bytes or self.quota_bytes
            most_bytes = self._candidates.make_room_in_file(batch, records, limit=quota_bytes, room=room)

        if room < needed and self._evict(work).blocks:
            self._attempt(WriteBatch.renew_quota)
        return most_bytes

    def _evict_spare(self, spare_bytes: int) -> None:
        """Free so many bytes or more: the disk may be far smaller than the quota. The caller holds the lock."""
        assert self._lock.is_owned()
        self._evict(partial(self._candidates.make_spare, spare_bytes=spare_bytes))

    def _evict(self, work: Callable[[WriteBatch], object]) -> EvictionReport:
        """Do work that removes blocks, and count them. The caller holds the lock."""
        assert self._lock.is_owned()

        def removed_by(batch: WriteBatch) -> tuple[list[BlockHash], int]:
            work(batch)
            return batch.removed, batch.removed_bytes

        removed, freed_bytes = self._attempt(removed_by)
        self._counters.count_evicted(removed, freed_bytes)
        return EvictionReport(blocks=len(removed), freed_bytes=freed_bytes, hashes=tuple(removed))

    def _attempt(self, work: Callable[[WriteBatch], Result]) -> Result:
        """Do work in one transaction, and again where it repaired damaged pages. The caller holds the lock."""
        assert self._lock.is_owned()
        for _ in range(MAX_REPAIRS):
            try:
                with self._transaction() as batch:
                    return work(batch)
            except DamagedPagesError:
                continue
        raise StoreError(f"cold store {self._env.path} is damaged", hint="run tierkv verify --repair")

    def _is_refusing(self) -> bool:
        """Return whether a put has failed in the last seconds. A clock that is set back does not make that longer."""
        return 0 < self._refused_until - self._clock() <= PAUSE_S

    def _clear_dead_readers(self) -> None:
        now = self._clock()
        if abs(now - self._readers_checked) >= READER_CHECK_S:  # the clock may have been set back
            self._readers_checked = now
            self._env.clear_dead_readers()
