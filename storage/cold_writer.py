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
from tierkv.errors import StoreBusyError, StoreError
from tierkv.storage.cold_batch import DamagedPagesError, Databases, WriteBatch, padded_bytes
from tierkv.storage.cold_entry import ColdEntry
from tierkv.storage.cold_eviction import EvictionReport, VictimQueue, load_entries
from tierkv.storage.cold_prompt import StoredPrompt, find_stored
from tierkv.storage.cold_stats import Counters
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord

__all__ = ["ColdWriter"]

MAX_BATCH_BYTES = 64 << 20  # of one write transaction, whose dirty pages are held in memory
MAX_PENDING_TOUCHES = 4096  # then they are due to be written
MAX_KEPT_TOUCHES = 16 * MAX_PENDING_TOUCHES  # the oldest are forgotten where nobody writes them
MAX_BATCH_REMOVALS = 1024
MAX_MENDS = 64  # of damaged pages that one removal may come across
PAUSE_S = 10.0  # after a put failed, the disk full in spite of evicting or the store busy, for so long all do
READER_CHECK_S = 60.0

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class ColdWriter:
    """Puts, removes and evicts. Thread-safe; one batch at a time among all threads and processes.

    Whoever waits for others who write does so for `write_wait_s` at most, then StoreBusyError is raised, or is an
    outcome. Readers never wait: what they want written (`touch`, `note_damaged`) is noted, and written with the
    next put, flush or `tend`.
    """

    def __init__(
        self,
        env: LmdbEnv,
        *,
        quota_bytes: int,
        min_free_bytes: int,
        clock: Callable[[], float],
        victims: VictimQueue,
        counters: Counters,
        write_wait_s: float = 30.0,
    ) -> None:
        self._env = env
        self._databases = Databases.of(env)
        self._quota_bytes = quota_bytes
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._victims = victims
        self._counters = counters
        self._write_wait_s = write_wait_s
        self._lock = threading.Lock()
        self._touches: dict[BlockHash, tuple[int, float]] = {}
        self._damaged: dict[BlockHash, None] = {}
        self._namespaces: dict[BlockHash, bytes] = {}
        self._notes_lock = threading.Lock()
        self._refused_until = float("-inf")
        self._refusal = PutOutcome.FULL
        self._readers_checked = clock()

    @contextlib.contextmanager
    def batch(self) -> Iterator[WriteBatch]:
        """A write transaction. Raises StoreError, with lmdb.Error as its cause, if it cannot be committed."""
        with self._exclusive(), self._transaction() as batch:
            yield batch

    def touch(self, block_hashes: Iterable[BlockHash]) -> None:
        """Note accesses; they are written at the beginning of the next batch. Waits for nobody."""
        now = self._clock()
        with self._notes_lock:
            for block_hash in block_hashes:
                count, _ = self._touches.pop(block_hash, (0, now))
                self._touches[block_hash] = (count + 1, now)
            self._forget_oldest_touches()

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Note a block that a reader found damaged: it, or its entry, is to be mended or removed. Waits for nobody."""
        with self._notes_lock:
            self._damaged[block_hash] = None

    def is_damaged(self, block_hash: BlockHash) -> bool:
        """Tell whether a block has been noted as damaged and nothing has been done about it yet."""
        return block_hash in self._damaged

    def note_namespace(self, digest: BlockHash, description: bytes) -> None:
        """Note that a namespace is in use, and what it is. Waits for nobody."""
        with self._notes_lock:
            self._namespaces[digest] = description

    @property
    def is_due(self) -> bool:
        """Whether it is time for a `tend`."""
        return bool(self._damaged) or len(self._touches) >= MAX_PENDING_TOUCHES

    def tend(self) -> None:
        """Write everything that has been noted. Raises StoreError; then accesses, and damage if busy, stay noted."""
        with self._exclusive():
            self._settle()
            if self._touches or self._namespaces:
                with self._transaction():
                    pass

    def put(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        """Store records in as few transactions as memory allows."""
        outcomes: list[PutOutcome] = []
        try:
            with self._exclusive():
                with contextlib.suppress(StoreError):
                    self._settle()
                # What a batch frees, only later ones may use: a small quota needs small batches to keep its file small.
                for group in _groups(records, min(MAX_BATCH_BYTES, self._quota_bytes // 128)):
                    outcomes += self._put_group(group)
        except StoreBusyError:
            outcomes += [PutOutcome.BUSY] * (len(records) - len(outcomes))
        self._counters.count_puts(outcomes)
        return outcomes

    def evict(
        self,
        *,
        to_bytes: int | None,
        namespace: BlockHash | None,
        older_than_s: float | None,
        prompt: StoredPrompt | None = None,
    ) -> EvictionReport:
        """Remove the unpinned blocks that match all filters (if one is given), then more down to a size."""
        reports: list[EvictionReport] = []
        num_chosen = num_pinned = 0
        with self._exclusive():
            if namespace is not None or older_than_s is not None or prompt is not None:
                chosen, num_pinned = self._choose(namespace, older_than_s, prompt)
                num_chosen = len(chosen)
                for start in range(0, len(chosen), MAX_BATCH_REMOVALS):
                    group = chosen[start : start + MAX_BATCH_REMOVALS]
                    reports.append(self._evict(functools.partial(_remove_leaves, block_hashes=group)))
                num_chosen -= sum(report.blocks for report in reports)
            if to_bytes is not None:
                make_room = functools.partial(self._victims.make_room, to_bytes=to_bytes, keep=frozenset())
                reports.append(self._evict(make_room))
        return EvictionReport(
            blocks=sum(report.blocks for report in reports),
            freed_bytes=sum(report.freed_bytes for report in reports),
            hashes=tuple(block_hash for report in reports for block_hash in report.hashes),
            num_pinned=num_pinned,
            num_continued=num_chosen,
        )

    def remove_subtree(self, block_hash: BlockHash) -> int:
        """Remove a block and all that follow it; return how many there were. Raises StoreError."""
        with self._exclusive():
            return self._attempt(lambda batch: batch.remove_subtree(block_hash))

    def compact(self) -> None:
        """Rewrite the file without free pages; no batch of this process runs meanwhile."""
        with self._exclusive():
            self._env.compact()
            self._databases = Databases.of(self._env)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Be the only thread of this process that writes. Raises StoreBusyError."""
        if not self._lock.acquire(timeout=self._write_wait_s):
            raise StoreBusyError(
                f"cold store {self._env.path}: another thread has been writing for more than {self._write_wait_s:g} s"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _settle(self) -> None:
        """Mend or remove what readers found damaged. The lock must be held. Raises StoreError; only a busy store is
        worth another attempt, at anything else it is left to the next reader.
        """
        while self._damaged and not self._is_refusing():
            block_hash = next(iter(self._damaged))
            removed = 0
            try:
                removed = self._attempt(functools.partial(WriteBatch.settle, block_hash=block_hash))
            except StoreBusyError:
                raise
            except StoreError as exc:
                _logger.warning("cold store %s: a damaged block could not be removed: %s", self._env.path, exc)
            with self._notes_lock:
                self._damaged.pop(block_hash, None)
            if removed:
                self._counters.count_damaged(removed)
                _logger.warning(
                    "cold store %s: block %s is damaged; %d removed", self._env.path, block_hash.hex(), removed
                )

    def _forget_oldest_touches(self) -> None:
        while len(self._touches) > MAX_KEPT_TOUCHES:
            del self._touches[next(iter(self._touches))]

    def _choose(
        self, namespace: BlockHash | None, older_than_s: float | None, prompt: StoredPrompt | None
    ) -> tuple[list[BlockHash], int]:
        """Return the unpinned blocks that the filters match, children before parents, and how many pinned ones do."""
        with self._transaction() as batch:
            now = batch.now
            if prompt is not None:
                found = find_stored(batch, prompt)
                chosen = [*found.behind, *found.own]
                if older_than_s is not None:
                    chosen = [each for each in chosen if _is_unused(batch.entry(each), now - older_than_s)]
                return chosen, found.num_pinned
            hashes, entries = load_entries(batch.txn, self._databases)
        matches = entries["last_access"] < (now - older_than_s if older_than_s is not None else float("inf"))
        rows = matches.nonzero()[0].tolist()
        if namespace is not None:
            rows = [row for row in rows if entries["namespace"][row].tobytes() == namespace]
        depths, pinned = entries["depth"], entries["pinned"]
        unpinned = [row for row in rows if not pinned[row]]
        unpinned.sort(key=lambda row: -int(depths[row]))
        return [hashes[row] for row in unpinned], len(rows) - len(unpinned)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[WriteBatch]:
        """One write transaction, touches first. The lock must be held."""
        self._clear_dead_readers()
        with self._notes_lock:
            touches, self._touches = self._touches, {}
            namespaces, self._namespaces = self._namespaces, {}
        try:
            with self._env.write() as txn:
                batch = WriteBatch(self._env, txn, self._databases, self._clock())
                for digest, description in namespaces.items():
                    batch.register(digest, description)
                for block_hash, (count, at) in touches.items():
                    batch.touch(block_hash, count=count, at=at)
                yield batch
                batch.finish()
        except BaseException as exc:
            self._victims.forget()
            with self._notes_lock:
                self._touches = touches | self._touches
                self._namespaces = namespaces | self._namespaces
                self._forget_oldest_touches()
            if isinstance(exc, lmdb.Error):
                raise StoreError(f"cold store {self._env.path} cannot be written: {exc}") from exc
            raise

    def _put_group(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
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
            if not isinstance(failure.__cause__, lmdb.Error):  # nothing that room would help against
                break
        self._refusal = self._why_refused(failure, needed)
        self._refused_until = self._clock() + PAUSE_S
        _logger.warning("%s; nothing is stored for %.0f s", failure, PAUSE_S)
        return [self._refusal] * len(records)

    def _why_refused(self, failure: StoreError, needed: int) -> PutOutcome:
        if isinstance(failure, StoreBusyError):
            return PutOutcome.BUSY
        if isinstance(failure.__cause__, lmdb.MapFullError):
            return PutOutcome.FULL
        with contextlib.suppress(StoreError):
            if self._free_bytes() < needed:
                return PutOutcome.FULL
        return PutOutcome.IO_ERROR

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
        return EvictionReport(blocks=len(removed), freed_bytes=freed_bytes, hashes=tuple(removed))

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

    def _is_refusing(self) -> bool:
        """Tell whether a put has failed not long ago. A clock that was set back since does not make that longer."""
        return 0 < self._refused_until - self._clock() <= PAUSE_S

    def _free_bytes(self) -> int:
        try:
            return shutil.disk_usage(self._env.path).free
        except OSError as exc:
            raise StoreError(f"cold store {self._env.path} has lost its directory: {exc}") from exc

    def _clear_dead_readers(self) -> None:
        now = self._clock()
        if abs(now - self._readers_checked) >= READER_CHECK_S:  # it may have been set back
            self._readers_checked = now
            self._env.clear_dead_readers()


def _remove_leaves(batch: WriteBatch, block_hashes: Sequence[BlockHash]) -> None:
    for block_hash in block_hashes:
        batch.remove_leaf(block_hash)


def _is_unused(entry: ColdEntry | None, since: float) -> bool:
    return entry is None or entry.last_access < since


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
