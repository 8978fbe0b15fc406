"""What a process keeps in memory about an open store: counters, and notes of its readers for the next write."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

from tierkv.storage.cold_rows import NamespaceRow
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.values.block import BlockHash

__all__ = ["ColdStats", "Counters", "NotedRows", "PendingNotes"]

MAX_PENDING_TOUCHES = 4096  # then maintenance is due
MAX_KEPT_TOUCHES = 16 * MAX_PENDING_TOUCHES  # beyond that the oldest are forgotten
MAX_PENDING_NAMESPACES = 64  # noted and not written yet; the oldest are forgotten
_MAX_REMEMBERED = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStats:
    """Sizes now, all processes together; counters since this process opened the store.

    live_bytes: values with their padding, which the quota bounds. file_bytes: with LMDB's free pages.
    """

    blocks: int
    raw_bytes: int
    stored_bytes: int
    live_bytes: int
    file_bytes: int
    quota_bytes: int
    hits: int
    misses: dict[MissReason, int]
    puts: dict[PutOutcome, int]
    evicted_blocks: int
    evicted_bytes: int
    damaged_blocks: int


class Counters:
    """Counts of events since the store was opened, and the latest evicted blocks. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._hits = 0
        self._misses: Counter[MissReason] = Counter()
        self._puts: Counter[PutOutcome] = Counter()
        self._evicted_blocks = 0
        self._evicted_bytes = 0
        self._damaged_blocks = 0
        self._evicted: OrderedDict[BlockHash, None] = OrderedDict()

    def count_reads(self, reasons: Iterable[MissReason | None]) -> None:
        """Count hits (None) and misses."""
        with self._lock:
            for reason in reasons:
                if reason is None:
                    self._hits += 1
                else:
                    self._misses[reason] += 1

    def count_puts(self, outcomes: Iterable[PutOutcome]) -> None:
        """Count the outcomes of records."""
        with self._lock:
            self._puts.update(outcomes)

    def count_evicted(self, block_hashes: Iterable[BlockHash], freed_bytes: int) -> None:
        """Count evicted blocks, and remember the latest of them."""
        with self._lock:
            for block_hash in block_hashes:
                self._evicted[block_hash] = None
                self._evicted_blocks += 1
            self._evicted_bytes += freed_bytes
            while len(self._evicted) > _MAX_REMEMBERED:
                self._evicted.popitem(last=False)

    def count_damaged(self, blocks: int) -> None:
        """Count blocks removed because they, or a block before them, were damaged."""
        with self._lock:
            self._damaged_blocks += blocks

    @property
    def has_evicted(self) -> bool:
        """Whether any evicted block is remembered."""
        return bool(self._evicted)

    def was_evicted(self, block_hash: BlockHash) -> bool:
        """Return whether this process evicted the block not long ago."""
        return block_hash in self._evicted

    def stats(self, rows: Collection[NamespaceRow], *, file_bytes: int, quota_bytes: int) -> ColdStats:
        """Return everything as one value. rows: the totals of all namespaces."""
        with self._lock:
            return ColdStats(
                blocks=sum(row.blocks for row in rows),
                raw_bytes=sum(row.raw_bytes for row in rows),
                stored_bytes=sum(row.stored_bytes for row in rows),
                live_bytes=sum(row.value_bytes for row in rows),
                file_bytes=file_bytes,
                quota_bytes=quota_bytes,
                hits=self._hits,
                misses={reason: self._misses[reason] for reason in MissReason},
                puts={outcome: self._puts[outcome] for outcome in PutOutcome},
                evicted_blocks=self._evicted_blocks,
                evicted_bytes=self._evicted_bytes,
                damaged_blocks=self._damaged_blocks,
            )


@dataclass(frozen=True, slots=True)
class NotedRows:
    """Accesses of blocks, (how often, when last), and descriptions of namespaces in use."""

    touches: dict[BlockHash, tuple[int, float]]
    namespaces: dict[BlockHash, bytes]


class PendingNotes:
    """Notes of readers for the next write: accesses, namespaces in use, blocks found damaged. Thread-safe.

    A reader never waits for the write lock: it leaves notes. read_only: no write will come, and nothing is noted.
    """

    def __init__(self, clock: Callable[[], float], *, read_only: bool = False) -> None:
        self._clock = clock
        self._read_only = read_only
        self._lock = threading.Lock()
        self._rows = NotedRows({}, {})
        self._damaged: dict[BlockHash, None] = {}

    def touch(self, block_hashes: Iterable[BlockHash]) -> None:
        """Note accesses of blocks now, in memory until the next put, eviction, flush or close."""
        if self._read_only:
            return
        now = self._clock()
        with self._lock:
            touches = self._rows.touches
            for block_hash in block_hashes:
                count, _ = touches.pop(block_hash, (0, now))
                touches[block_hash] = (count + 1, now)
            _forget_oldest(touches, MAX_KEPT_TOUCHES)

    def note_namespace(self, digest: BlockHash, description: bytes) -> None:
        """Note that a namespace is in use, and its description."""
        with self._lock:
            self._rows.namespaces.pop(digest, None)
            self._rows.namespaces[digest] = description
            _forget_oldest(self._rows.namespaces, MAX_PENDING_NAMESPACES)

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Note a block that a reader found damaged, to be repaired or removed."""
        if not self._read_only:
            with self._lock:
                self._damaged[block_hash] = None

    def is_damaged(self, block_hash: BlockHash) -> bool:
        """Return whether a block has been noted as damaged and is not repaired yet."""
        return block_hash in self._damaged

    def next_damaged(self) -> BlockHash | None:
        """Return the block that was noted as damaged first, or None."""
        with self._lock:
            return next(iter(self._damaged), None)

    def forget_damaged(self, block_hash: BlockHash) -> None:
        """Forget a damaged block: it has been repaired, or the next reader notes it again."""
        with self._lock:
            self._damaged.pop(block_hash, None)

    @property
    def are_due(self) -> bool:
        """Whether it is time to write them."""
        return bool(self._damaged) or len(self._rows.touches) >= MAX_PENDING_TOUCHES

    @property
    def have_rows(self) -> bool:
        """Whether there are accesses or namespaces to write."""
        return bool(self._rows.touches or self._rows.namespaces)

    def take_rows(self) -> NotedRows:
        """Return the accesses and namespaces, for a transaction that writes them."""
        with self._lock:
            rows, self._rows = self._rows, NotedRows({}, {})
        return rows

    def put_back(self, rows: NotedRows) -> None:
        """Keep the rows of a transaction that was aborted, beside the rows noted meanwhile."""
        with self._lock:
            self._rows = NotedRows(rows.touches | self._rows.touches, rows.namespaces | self._rows.namespaces)
            _forget_oldest(self._rows.touches, MAX_KEPT_TOUCHES)


def _forget_oldest(notes: dict[BlockHash, Any], limit: int) -> None:
    while len(notes) > limit:
        del notes[next(iter(notes))]
