"""Which blocks of the cold store go first: leaves before parents, pinned ones never.

Reading a million entries takes a moment, so victims are queued: one scan orders the leaves, later evictions
take from the queue and check each victim again, since it may have been touched, pinned or given children.
A parent joins the queue when its last child has gone.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.storage.cold_batch import Databases, WriteBatch
from tierkv.storage.cold_entry import ENTRY_BYTES, ENTRY_DTYPE, EntryTable, pack_entry
from tierkv.storage.lmdb_env import ReadTransaction
from tierkv.values.block import HASH_BYTES, BlockHash

__all__ = ["EvictionReport", "VictimOrder", "VictimQueue", "least_recently_used", "load_entries"]

_MAX_QUEUE = 65_536


class VictimOrder(Protocol):
    """Says what each block is worth: the lowest goes first."""

    def __call__(self, entries: EntryTable, now: float) -> npt.NDArray[np.float64]:
        """Return a score for every row; `entries` has the fields of ENTRY_DTYPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionReport:
    """What one eviction removed. hashes: of what went.

    num_pinned, num_continued: chosen blocks that stayed because they are pinned, or because blocks that stay continue
    them; counted where blocks are chosen, not down to a size.
    """

    blocks: int
    freed_bytes: int
    hashes: tuple[BlockHash, ...] = ()
    num_pinned: int = 0
    num_continued: int = 0


def least_recently_used(entries: EntryTable, now: float) -> npt.NDArray[np.float64]:
    """Score blocks by the time of their last access."""
    return entries["last_access"].astype(np.float64)


def load_entries(txn: ReadTransaction, databases: Databases) -> tuple[list[BlockHash], EntryTable]:
    """Return all block hashes and, row by row, their entries. Entries of a wrong length are left out."""
    hashes: list[BlockHash] = []
    packed = bytearray()
    with txn.cursor(db=databases.index) as cursor:
        for key, value in cursor:
            if len(value) == ENTRY_BYTES and len(key) == HASH_BYTES:
                hashes.append(bytes(key))
                packed += value
    return hashes, np.frombuffer(packed, dtype=ENTRY_DTYPE)


class VictimQueue:
    """The leaves of the stored chains, cheapest first. Used by one writer at a time."""

    def __init__(self, order: VictimOrder = least_recently_used) -> None:
        self._order = order
        self._heap: list[_Victim] = []

    def make_room(self, batch: WriteBatch, *, to_bytes: int, keep: frozenset[BlockHash]) -> bool:
        """Remove blocks until at most `to_bytes` are live. Returns whether that was reached.

        keep: blocks that must stay, as the parents of what is to be stored next.
        """
        removed_at_scan = -1
        while batch.live_bytes > to_bytes:
            if not self._heap:
                if len(batch.removed) == removed_at_scan:
                    return False  # a whole scan found nothing that may go
                removed_at_scan = len(batch.removed)
                self._scan(batch)
            if self._heap:
                self._try_next(batch, keep)
        return True

    def forget(self) -> None:
        """Drop the queue: after an abort, what it took for removed is there again."""
        self._heap.clear()

    def _try_next(self, batch: WriteBatch, keep: frozenset[BlockHash]) -> None:
        victim = heapq.heappop(self._heap)
        entry = batch.entry(victim.block_hash)
        if entry is None or entry.pinned or victim.block_hash in keep:
            return
        if entry.last_access != victim.last_access or not batch.remove_leaf(victim.block_hash):
            return
        if not batch.has_children(entry.parent):
            self._push_parent(batch, entry.parent)

    def _push_parent(self, batch: WriteBatch, block_hash: BlockHash) -> None:
        entry = batch.entry(block_hash)
        if entry is None:  # the namespace digest: the chain is gone
            return
        row = np.frombuffer(pack_entry(block_hash, entry), dtype=ENTRY_DTYPE)
        score = float(self._order(row, batch.now)[0])
        heapq.heappush(self._heap, _Victim(score, -entry.depth, block_hash, entry.last_access))

    def _scan(self, batch: WriteBatch) -> None:
        hashes, entries = load_entries(batch.txn, batch.databases)
        parents = set(entries["parent"].tolist())
        leaves = np.fromiter((each not in parents for each in hashes), dtype=bool, count=len(hashes))
        rows = np.flatnonzero(leaves & (entries["pinned"] == 0))
        scores = self._order(entries[rows], batch.now)
        depths = entries["depth"][rows].astype(np.int64)
        best = np.lexsort((-depths, scores))[:_MAX_QUEUE]
        times = entries["last_access"][rows]
        self._heap = [_Victim(float(scores[i]), -int(depths[i]), hashes[rows[i]], float(times[i])) for i in best]


class _Victim(NamedTuple):
    """Compared field by field: among equal scores the deepest goes first."""

    score: float
    minus_depth: int
    block_hash: BlockHash
    last_access: float
