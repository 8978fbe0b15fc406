"""The writing half of the cold store: one transaction at a time, room made before it is needed."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import lmdb

from tierkv.block import BlockHash
from tierkv.errors import StoreError
from tierkv.storage.cold_batch import DamagedPagesError, Databases, WriteBatch, padded_bytes
from tierkv.storage.cold_eviction import EvictionReport, VictimQueue, load_entries
from tierkv.storage.cold_stats import Counters
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord

__all__ = ["ColdWriter"]

MAX_BATCH_BYTES = 64 << 20  # of one write transaction, whose dirty pages are held in memory
MAX_PENDING_TOUCHES = 4096
MAX_BATCH_REMOVALS = 1024
MAX_MENDS = 64  # of damaged pages that one removal may come across
FULL_PAUSE_S = 10.0  # after the disk was full in spite of evicting, puts are refused for so long
READER_CHECK_S = 60.0

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ColdWriter:
    """Puts, removes and evicts. Thread-safe; one batch at a time in this process, LMDB sees to the others."""

    def __init__(
        self,
        env: LmdbEnv,
        *,
        quota_bytes: int,
        min_free_bytes: int,
        clock: Callable[[], float],
        victims: VictimQueue,
        counters: Counters,
    ) -> None:
        self._env = env
        self._databases = Databases.of(env)
        self._quota_bytes = quota_bytes
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._victims = victims
        self._counters = counters
        self._lock = threading.Lock()
        self._touches: dict[BlockHash, tuple[int, float]] = {}
        self._touch_lock = threading.Lock()
        self._full_until = float("-inf")
        self._readers_checked = clock()

    @contextlib.contextmanager
    def batch(self) -> Iterator[WriteBatch]:
        """A write transaction. Raises StoreError, with lmdb.Error as its cause, if it cannot be committed."""
        with self._lock, self._transaction() as batch:
            yield batch

    def touch(self, block_hashes: Iterable[BlockHash]) -> None:
        """Remember accesses; they are written at the beginning of the next batch."""
        now = self._clock()
        with self._touch_lock:
            for block_hash in block_hashes:
                count, _ = self._touches.get(block_hash, (0, now))
                self._touches[block_hash] = (count + 1, now)
            due = len(self._touches) >= MAX_PENDING_TOUCHES
        if due and self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(StoreError), self._transaction():
                    pass
            finally:
                self._lock.release()

    def flush(self) -> None:
        """Write pending accesses. Raises StoreError."""
        if self._touches:
            with self.batch():
                pass

    def put(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        """Store records in as few transactions as memory allows."""
        outcomes: list[PutOutcome] = []
        with self._lock:
            # What a batch frees, only later ones may use: a small quota needs small batches to keep its file small.
            for group in _groups(records, min(MAX_BATCH_BYTES, self._quota_bytes // 128)):
                outcomes += self._put_group(group)
        self._counters.count_puts(outcomes)
        return outcomes

    def evict(self, *, to_bytes: int | None, namespace: BlockHash | None, older_than_s: float | None) -> EvictionReport:
        """Remove the unpinned blocks that match both filters (if one is given), then more down to a size."""
        reports: list[EvictionReport] = []
        with self._lock:
            if namespace is not None or older_than_s is not None:
                chosen = self._choose(namespace, older_than_s)
                for start in range(0, len(chosen), MAX_BATCH_REMOVALS):
                    group = chosen[start : start + MAX_BATCH_REMOVALS]
                    reports.append(self._evict(functools.partial(_remove_leaves, block_hashes=group)))
            if to_bytes is not None:
                make_room = functools.partial(self._victims.make_room, to_bytes=to_bytes, keep=frozenset())
                reports.append(self._evict(make_room))
        return EvictionReport(
            blocks=sum(report.blocks for report in reports), freed_bytes=sum(report.freed_bytes for report in reports)
        )

    def remove_subtree(self, block_hash: BlockHash) -> int:
        """Remove a block and all that follow it; return how many there were. Raises StoreError."""
        with self._lock:
            return self._attempt(lambda batch: batch.remove_subtree(block_hash))

    def compact(self) -> None:
        """Rewrite the file without free pages; no batch of this process runs meanwhile."""
        with self._lock:
            self._env.compact()
            self._databases = Databases.of(self._env)

    def _choose(self, namespace: BlockHash | None, older_than_s: float | None) -> list[BlockHash]:
        """Return what the filters match, children before parents."""
        with self._transaction() as batch:
            hashes, entries = load_entries(batch.txn, self._databases)
            now = batch.now
        matches = entries["pinned"] == 0
        if older_than_s is not None:
            matches &= entries["last_access"] < now - older_than_s
        rows = matches.nonzero()[0].tolist()
        if namespace is not None:
            rows = [row for row in rows if entries["namespace"][row].tobytes() == namespace]
        depths = entries["depth"]
        rows.sort(key=lambda row: -int(depths[row]))
        return [hashes[row] for row in rows]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[WriteBatch]:
        """One write transaction, touches first. The lock must be held."""
        self._clear_dead_readers()
        with self._touch_lock:
            touches, self._touches = self._touches, {}
        try:
            with self._env.write() as txn:
                batch = WriteBatch(self._env, txn, self._databases, self._clock())
                for block_hash, (count, at) in touches.items():
                    batch.touch(block_hash, count=count, at=at)
                yield batch
                batch.finish()
        except BaseException as exc:
            self._victims.forget()
            with self._touch_lock:
                self._touches = touches | self._touches
            if isinstance(exc, lmdb.Error):
                raise StoreError(f"cold store {self._env.path} cannot be written: {exc}") from exc
            raise

    def _put_group(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        if self._clock() < self._full_until:
            return [PutOutcome.FULL] * len(records)
        needed = sum(padded_bytes(record.stored_bytes) for record in records)
        for is_full in (False, True):
            try:
                if is_full:
                    self._evict_spare(2 * needed)
                return self._insert(records, needed)
            except StoreError as exc:
                failure = exc
        full = isinstance(failure.__cause__, lmdb.MapFullError) or self._free_bytes() < needed
        self._full_until = self._clock() + FULL_PAUSE_S
        _logger.warning("%s; nothing is stored for %.0f s", failure, FULL_PAUSE_S)
        return [PutOutcome.FULL if full else PutOutcome.IO_ERROR] * len(records)

    def _insert(self, records: Sequence[EncodedRecord], needed: int) -> list[PutOutcome]:
        evicted: tuple[list[BlockHash], int] = [], 0

        def work(batch: WriteBatch) -> list[PutOutcome]:
            nonlocal evicted
            limit = self._limit(batch, needed)
            self._victims.make_room(batch, to_bytes=max(limit - needed, 0), keep=keep)
            evicted = list(batch.removed), batch.removed_bytes
            return [_insert_within(batch, record, limit) for record in records]

        keep = frozenset(each for record in records for each in (record.info.parent, record.info.block_hash))
        outcomes = self._attempt(work)
        self._counters.count_evicted(*evicted)
        return outcomes

    def _evict_spare(self, spare_bytes: int) -> None:
        """Free so much, and at least a 16th of what is live: the disk may be far smaller than the quota."""

        def work(batch: WriteBatch) -> None:
            to_bytes = batch.live_bytes - max(batch.live_bytes // 16, spare_bytes)
            self._victims.make_room(batch, to_bytes=max(to_bytes, 0), keep=frozenset())

        self._evict(work)

    def _evict(self, work: Callable[[WriteBatch], object]) -> EvictionReport:
        """Do something that removes blocks, and count them. The lock must be held."""

        def removed_by(batch: WriteBatch) -> tuple[list[BlockHash], int]:
            work(batch)
            return batch.removed, batch.removed_bytes

        removed, freed_bytes = self._attempt(removed_by)
        self._counters.count_evicted(removed, freed_bytes)
        return EvictionReport(blocks=len(removed), freed_bytes=freed_bytes)

    def _attempt(self, work: Callable[[WriteBatch], Result]) -> Result:
        """Do work in one transaction; again in another one where it came across damaged pages, which are mended
        then. The lock must be held.
        """
        for _ in range(MAX_MENDS):
            try:
                with self._transaction() as batch:
                    return work(batch)
            except DamagedPagesError:
                continue
        raise StoreError(f"cold store {self._env.path} is damaged", hint="run tierkv verify --repair")

    def _limit(self, batch: WriteBatch, needed: int) -> int:
        """Return how many bytes may be live: the quota, or what there is where the disk has no more room."""
        if self._free_bytes() - needed >= self._min_free_bytes:
            return self._quota_bytes
        return min(self._quota_bytes, batch.live_bytes)

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._env.path).free

    def _clear_dead_readers(self) -> None:
        now = self._clock()
        if now - self._readers_checked >= READER_CHECK_S:
            self._readers_checked = now
            self._env.clear_dead_readers()


def _remove_leaves(batch: WriteBatch, block_hashes: Sequence[BlockHash]) -> None:
    for block_hash in block_hashes:
        batch.remove_leaf(block_hash)


def _insert_within(batch: WriteBatch, record: EncodedRecord, limit: int) -> PutOutcome:
    """Insert a record if the live bytes then stay within a limit."""
    if batch.live_bytes + padded_bytes(record.stored_bytes) <= limit:
        return batch.insert(record)
    known = batch.entry(record.info.block_hash) is not None
    return PutOutcome.EXISTS if known else PutOutcome.FULL


def _groups(records: Sequence[EncodedRecord], max_bytes: int) -> Iterator[list[EncodedRecord]]:
    """Yield the records in order, in groups of at most so many bytes, or of one record."""
    group: list[EncodedRecord] = []
    size = 0
    for record in records:
        if group and size + record.stored_bytes > max_bytes:
            yield group
            group, size = [], 0
        group.append(record)
        size += record.stored_bytes
    if group:
        yield group
