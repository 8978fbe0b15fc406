"""The writing half of the cold store: one transaction at a time, room made before it is needed."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import lmdb

from tierkv.errors import CapacityError, StoreBusyError, StoreError
from tierkv.storage.cold_batch import DamagedPagesError, Handles, WriteBatch, namespace_rows, padded_bytes
from tierkv.storage.cold_entry import ColdEntry
from tierkv.storage.cold_eviction import EvictionReport, VictimQueue, load_entries
from tierkv.storage.cold_prompt import StoredPrompt, find_stored
from tierkv.storage.cold_stats import Counters
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord
from tierkv.values.block import BlockHash
from tierkv.values.locks import OwnedLock
from tierkv.values.units import format_bytes

__all__ = ["ColdWriter", "map_bytes_of", "require_free"]

MAX_BATCH_BYTES = 64 << 20  # of one write transaction, whose dirty pages are held in memory
MAX_PENDING_TOUCHES = 4096  # then they are due to be written
MAX_KEPT_TOUCHES = 16 * MAX_PENDING_TOUCHES  # the oldest are forgotten where nobody writes them
MAX_BATCH_REMOVALS = 1024
MAX_MENDS = 64  # of damaged pages that one removal may come across
PAUSE_S = 10.0  # after a put failed, the disk full in spite of evicting or the store busy, for so long all do
MAX_PENDING_NAMESPACES = 64  # that are noted and not written yet; the oldest are forgotten
READER_CHECK_S = 60.0
DEFAULT_FREE_BYTES = 1 << 30  # what stays free on a large volume; of a small one, that share
DEFAULT_FREE_SHARE = 20
_SPARE_MAP_BYTES = 64 << 20

_logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class _NotDoneError(Exception):
    """Ends a transaction that was only to find out what it would do."""


def map_bytes_of(quota_bytes: int) -> int:
    """Address space of the map. With less than a quarter over the quota LMDB fragments until puts fail."""
    size = quota_bytes + quota_bytes // 4 + _SPARE_MAP_BYTES
    return -(-size // (1 << 20)) * (1 << 20)


class ColdWriter:
    """Puts, removes and evicts. Thread-safe; one batch at a time among all threads and processes.

    Whoever waits for others who write does so for `write_wait_s` at most, then StoreBusyError is raised, or is an
    outcome. Readers never wait: what they want written (`touch`, `note_damaged`) is noted, and written with the
    next put, flush or `tend`.
    quota_bytes: until a batch has read the one that is stored. min_free_bytes: None leaves 1 GiB free, or a 20th of a
    volume that is smaller than 20 GiB.
    """

    def __init__(
        self,
        env: LmdbEnv,
        *,
        quota_bytes: int,
        min_free_bytes: int | None,
        clock: Callable[[], float],
        victims: VictimQueue,
        counters: Counters,
        write_wait_s: float = 30.0,
    ) -> None:
        self._env = env
        self._handles = Handles(env)
        self.quota_bytes = quota_bytes
        self._min_free_bytes = min_free_bytes
        self._clock = clock
        self._victims = victims
        self._counters = counters
        self._write_wait_s = write_wait_s
        self._lock = OwnedLock()
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
            self._namespaces.pop(digest, None)
            self._namespaces[digest] = description
            while len(self._namespaces) > MAX_PENDING_NAMESPACES:
                del self._namespaces[next(iter(self._namespaces))]

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
                try:
                    self._settle()
                except StoreBusyError as exc:  # the records would wait as long once more
                    self._refuse(PutOutcome.BUSY, exc)
                # What a batch frees, only later ones may use: a small quota needs small batches to keep its file small.
                for group in _groups(records, min(MAX_BATCH_BYTES, self.quota_bytes // 128)):
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

    def would_evict(self, to_bytes: int) -> EvictionReport:
        """Return what evicting down to a size would remove. Changes nothing. Raises StoreError."""
        report = EvictionReport(blocks=0, freed_bytes=0)

        def work(batch: WriteBatch) -> None:
            nonlocal report
            self._victims.make_room(batch, to_bytes=to_bytes, keep=frozenset())
            report = EvictionReport(blocks=len(batch.removed), freed_bytes=batch.removed_bytes)
            raise _NotDoneError

        with self._exclusive(), contextlib.suppress(_NotDoneError):
            self._attempt(work)
        return report

    def set_quota(self, quota_bytes: int) -> None:
        """Store another quota. Evicts nothing: the next put does, if more is live. Raises StoreError."""
        with self.batch() as batch:
            batch.set_quota(quota_bytes)
        self._adopt_quota(quota_bytes)

    def require_room(self, num_bytes: int) -> None:
        """Raise CapacityError if not even one record of so many bytes would be stored, evicting included."""
        if padded_bytes(num_bytes) > self.quota_bytes:
            raise CapacityError(
                f"cold store {self._env.path} has a quota of {format_bytes(self.quota_bytes)}, too small for one block",
                hint="tierkv quota SIZE sets another",
            )
        with self._env.read() as txn:
            live_bytes = sum(row.value_bytes for row in namespace_rows(txn, self._handles.now).values())
        if live_bytes < padded_bytes(num_bytes):  # else it evicts
            require_free(self._env.path, self._min_free_bytes, num_bytes)

    def remove_subtree(self, block_hash: BlockHash) -> int:
        """Remove a block and all that follow it; return how many there were. Raises StoreError."""
        with self._exclusive():
            return self._attempt(lambda batch: batch.remove_subtree(block_hash))

    def compact(self) -> None:
        """Rewrite the file without free pages; no batch of this process runs meanwhile."""
        with self._exclusive():
            self._env.compact()

    def attempt(self, work: Callable[[WriteBatch], Result]) -> Result:
        """Do work in one transaction, in another one again where it came across damaged pages. Raises StoreError."""
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

    def _settle(self) -> None:
        """Mend or remove what readers found damaged. The caller holds the lock. Raises StoreError; only a busy store is
        worth another attempt, at anything else it is left to the next reader.
        """
        assert self._lock.is_owned()
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
        """Return the unpinned blocks that the filters match, children before parents, and how many pinned ones do.

        The caller holds the lock.
        """
        assert self._lock.is_owned()
        with self._transaction() as batch:
            now = batch.now
            if prompt is not None:
                found = find_stored(batch, prompt)
                chosen = [*found.behind, *found.own]
                if older_than_s is not None:
                    chosen = [each for each in chosen if _is_unused(batch.entry(each), now - older_than_s)]
                return chosen, found.num_pinned
            hashes, entries = load_entries(batch.txn, batch.databases)
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
        """One write transaction, touches first. The caller holds the lock."""
        assert self._lock.is_owned()
        self._clear_dead_readers()
        with self._notes_lock:
            touches, self._touches = self._touches, {}
            namespaces, self._namespaces = self._namespaces, {}
        try:
            with self._env.write() as txn:
                batch = WriteBatch(self._env, txn, self._handles.now, self._clock())
                quota_bytes = batch.quota_bytes or self.quota_bytes
                for digest, description in namespaces.items():
                    batch.register(digest, description)
                for block_hash, (count, at) in touches.items():
                    batch.touch(block_hash, count=count, at=at)
                yield batch
                batch.finish()
        except BaseException:
            self._victims.forget()
            with self._notes_lock:
                self._touches = touches | self._touches
                self._namespaces = namespaces | self._namespaces
                self._forget_oldest_touches()
            raise
        self._adopt_quota(quota_bytes)

    def _adopt_quota(self, quota_bytes: int) -> None:
        """Go by the quota that is stored: another process may have set it."""
        grows = quota_bytes > self.quota_bytes
        self.quota_bytes = quota_bytes
        if grows:
            try:
                self._env.grow_map(map_bytes_of(quota_bytes))
            except StoreError as exc:  # until it can, less than the quota has room
                _logger.warning("%s", exc)

    def _refuse(self, outcome: PutOutcome, failure: StoreError) -> None:
        """Take no more records for some seconds."""
        self._refusal = outcome
        self._refused_until = self._clock() + PAUSE_S
        _logger.warning("%s; nothing is stored for %.0f s", failure, PAUSE_S)

    def _put_group(self, records: Sequence[EncodedRecord]) -> list[PutOutcome]:
        """Store records in one transaction, or say why not; the caller holds the lock."""
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
            if not isinstance(failure.__cause__, lmdb.Error):  # nothing that room would help against
                break
        self._refuse(self._why_refused(failure, needed), failure)
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
        """Make room for records and insert them; the caller holds the lock."""
        assert self._lock.is_owned()
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
        """Free so much, and at least a 16th of what is live: the disk may be far smaller than the quota.

        The caller holds the lock.
        """
        assert self._lock.is_owned()

        def work(batch: WriteBatch) -> None:
            to_bytes = batch.live_bytes - max(batch.live_bytes // 16, spare_bytes)
            self._victims.make_room(batch, to_bytes=max(to_bytes, 0), keep=frozenset())

        self._evict(work)

    def _evict(self, work: Callable[[WriteBatch], object]) -> EvictionReport:
        """Do something that removes blocks, and count them. The caller holds the lock."""
        assert self._lock.is_owned()

        def removed_by(batch: WriteBatch) -> tuple[list[BlockHash], int]:
            work(batch)
            return batch.removed, batch.removed_bytes

        removed, freed_bytes = self._attempt(removed_by)
        self._counters.count_evicted(removed, freed_bytes)
        return EvictionReport(blocks=len(removed), freed_bytes=freed_bytes, hashes=tuple(removed))

    def _attempt(self, work: Callable[[WriteBatch], Result]) -> Result:
        """Do work in one transaction; again in another one where it came across damaged pages, which are mended
        then. The caller holds the lock.
        """
        assert self._lock.is_owned()
        for _ in range(MAX_MENDS):
            try:
                with self._transaction() as batch:
                    return work(batch)
            except DamagedPagesError:
                continue
        raise StoreError(f"cold store {self._env.path} is damaged", hint="run tierkv verify --repair")

    def _limit(self, batch: WriteBatch, needed: int) -> int:
        """Return how many bytes may be live: the quota, or what there is where the disk has no more room."""
        quota_bytes = batch.quota_bytes or self.quota_bytes
        if self._free_bytes() - needed >= _floor_bytes(self._env.path, self._min_free_bytes):
            return quota_bytes
        return min(quota_bytes, batch.live_bytes)

    def _is_refusing(self) -> bool:
        """Tell whether a put has failed not long ago. A clock that was set back since does not make that longer."""
        return 0 < self._refused_until - self._clock() <= PAUSE_S

    def _free_bytes(self) -> int:
        return _disk_usage(self._env.path).free

    def _clear_dead_readers(self) -> None:
        now = self._clock()
        if abs(now - self._readers_checked) >= READER_CHECK_S:  # it may have been set back
            self._readers_checked = now
            self._env.clear_dead_readers()


class _Usage(NamedTuple):
    total: int
    free: int


def require_free(path: Path, min_free_bytes: int | None, num_bytes: int = 0) -> None:
    """Raise CapacityError if a volume has not so many bytes beside those that must stay free, StoreError."""
    free, floor = _disk_usage(path).free, _floor_bytes(path, min_free_bytes)
    if free - num_bytes < floor:
        raise CapacityError(
            f"cold store {path} can keep no block: {format_bytes(free)} are free on its volume, of which "
            f"{format_bytes(floor)} must stay free",
            hint="lower min_free_bytes, or free disk space",
        )


def _floor_bytes(path: Path, min_free_bytes: int | None) -> int:
    if min_free_bytes is not None:
        return min_free_bytes
    return min(DEFAULT_FREE_BYTES, _disk_usage(path).total // DEFAULT_FREE_SHARE)


def _disk_usage(path: Path) -> _Usage:
    try:
        usage = shutil.disk_usage(path)
    except OSError as exc:
        raise StoreError(f"cold store {path} has lost its directory: {exc}") from exc
    return _Usage(usage.total, usage.free)


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
