"""Eviction from the cold store: of the blocks with the lowest score, of those that filters match, of a prompt's blocks.

Leaves go before their parents, pinned blocks never. Reading a million entries takes a moment, so candidates are queued:
one scan orders the leaves, later evictions take from the queue. Each candidate is checked again, since it may have been
touched, pinned or given children. A parent enters the queue when its last child is removed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.storage.cold_batch import WriteBatch
from tierkv.storage.cold_rows import ENTRY_BYTES, ENTRY_DTYPE, EntryTable, pack_entry
from tierkv.values.block import HASH_BYTES, BlockHash

__all__ = [
    "Chosen",
    "EvictionCandidates",
    "EvictionReport",
    "EvictionScore",
    "StoredPrompt",
    "choose_blocks",
    "choose_prompt",
    "evict_in_batch",
    "least_recently_used",
]

_MAX_QUEUE = 65_536


class EvictionScore(Protocol):
    """Scores blocks: the block with the lowest score is evicted first."""

    def __call__(self, entries: EntryTable, now: float) -> npt.NDArray[np.float64]:
        """Return a score for every row; `entries` has the fields of ENTRY_DTYPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictionReport:
    """The result of one eviction. hashes: of the removed blocks.

    num_pinned, num_continued: chosen blocks that stayed because they are pinned, or because blocks that stay continue
    them; counted where blocks are chosen, not down to a size.
    """

    blocks: int
    freed_bytes: int
    hashes: tuple[BlockHash, ...] = ()
    num_pinned: int = 0
    num_continued: int = 0


@dataclass(frozen=True, slots=True)
class StoredPrompt:
    """A prompt as a store knows it. hashes: of its whole blocks. token_bytes: of all its tokens."""

    namespace: BlockHash
    hashes: Sequence[BlockHash]
    token_bytes: bytes


class Chosen(NamedTuple):
    """Unpinned blocks to remove, children before parents, and how many more blocks were matched that are pinned."""

    hashes: list[BlockHash]
    num_pinned: int


def least_recently_used(entries: EntryTable, now: float) -> npt.NDArray[np.float64]:
    """Score blocks by the time of their last access."""
    return entries["last_access"].astype(np.float64)


class EvictionCandidates:
    """The leaves of the stored chains, lowest score first. Used by one writer at a time."""

    def __init__(self, score: EvictionScore = least_recently_used) -> None:
        self._score = score
        self._heap: list[_Candidate] = []

    def make_room(self, batch: WriteBatch, *, to_bytes: int, keep: frozenset[BlockHash]) -> bool:
        """Remove blocks until at most `to_bytes` are live. Return whether that was reached.

        keep: blocks that must stay, as the parents of the next blocks to be stored.
        """
        removed_at_scan = -1
        while batch.live_bytes > to_bytes:
            if not self._heap:
                if len(batch.removed) == removed_at_scan:
                    return False  # a whole scan found no block that may be removed
                removed_at_scan = len(batch.removed)
                self._scan(batch)
            if self._heap:
                self._try_next(batch, keep)
        return True

    def forget(self) -> None:
        """Drop the queue: after an abort, blocks that it counted as removed are stored again."""
        self._heap.clear()

    def _try_next(self, batch: WriteBatch, keep: frozenset[BlockHash]) -> None:
        candidate = heapq.heappop(self._heap)
        entry = batch.entry(candidate.block_hash)
        if entry is None or entry.pinned or candidate.block_hash in keep:
            return
        if entry.last_access != candidate.last_access or not batch.remove_leaf(candidate.block_hash):
            return
        if not batch.has_children(entry.parent):
            self._push_parent(batch, entry.parent)

    def _push_parent(self, batch: WriteBatch, block_hash: BlockHash) -> None:
        entry = batch.entry(block_hash)
        if entry is None:  # it is the namespace digest: the whole chain is removed
            return
        row = np.frombuffer(pack_entry(block_hash, entry), dtype=ENTRY_DTYPE)
        score = float(self._score(row, batch.now)[0])
        heapq.heappush(self._heap, _Candidate(score, -entry.depth, block_hash, entry.last_access))

    def _scan(self, batch: WriteBatch) -> None:
        hashes, entries = _load_entries(batch)
        parents = set(entries["parent"].tolist())
        leaves = np.fromiter((each not in parents for each in hashes), dtype=bool, count=len(hashes))
        rows = np.flatnonzero(leaves & (entries["pinned"] == 0))
        scores = self._score(entries[rows], batch.now)
        depths = entries["depth"][rows].astype(np.int64)
        best = np.lexsort((-depths, scores))[:_MAX_QUEUE]
        times = entries["last_access"][rows]
        self._heap = [_Candidate(float(scores[i]), -int(depths[i]), hashes[rows[i]], float(times[i])) for i in best]


class _Candidate(NamedTuple):
    """Compared field by field: among equal scores the deepest goes first."""

    score: float
    minus_depth: int
    block_hash: BlockHash
    last_access: float


def evict_in_batch(
    to_bytes: int | None,
    namespace: BlockHash | None,
    older_than_s: float | None,
    prompt: StoredPrompt | None,
    batch: WriteBatch,
    candidates: EvictionCandidates,
) -> EvictionReport:
    """Do in one batch what `ColdStore.evict` does in several, for a dry run."""
    num_pinned = num_continued = 0
    if namespace is not None or older_than_s is not None or prompt is not None:
        chosen, num_pinned = (
            choose_blocks(batch, namespace, older_than_s)
            if prompt is None
            else choose_prompt(batch, prompt, older_than_s)
        )
        batch.remove_leaves(chosen)
        num_continued = len(chosen) - len(batch.removed)
    if to_bytes is not None:
        candidates.make_room(batch, to_bytes=to_bytes, keep=frozenset())
    return EvictionReport(
        blocks=len(batch.removed),
        freed_bytes=batch.removed_bytes,
        hashes=tuple(batch.removed),
        num_pinned=num_pinned,
        num_continued=num_continued,
    )


def choose_blocks(batch: WriteBatch, namespace: BlockHash | None, older_than_s: float | None) -> Chosen:
    """Return the blocks of a namespace, where given, that were not used for so long, where given."""
    hashes, entries = _load_entries(batch)
    since = batch.now - older_than_s if older_than_s is not None else float("inf")
    rows = (entries["last_access"] < since).nonzero()[0].tolist()
    if namespace is not None:
        rows = [row for row in rows if entries["namespace"][row].tobytes() == namespace]
    depths, pinned = entries["depth"], entries["pinned"]
    unpinned = [row for row in rows if not pinned[row]]
    unpinned.sort(key=lambda row: -int(depths[row]))
    return Chosen([hashes[row] for row in unpinned], len(rows) - len(unpinned))


def choose_prompt(batch: WriteBatch, prompt: StoredPrompt, older_than_s: float | None) -> Chosen:
    """Return the stored blocks that begin with a prompt, then the prompt's own blocks in front of those.

    Hash, parent and token ids of the prompt's own blocks are compared. older_than_s: as for `choose_blocks`.
    """
    own: list[BlockHash] = []
    parent, at = prompt.namespace, 0
    for block_hash in prompt.hashes:
        entry = batch.entry(block_hash)
        tokens = batch.read_tokens(block_hash)
        end = at + len(tokens or b"")
        if entry is None or entry.parent != parent or not tokens or prompt.token_bytes[at:end] != tokens:
            break
        own.append(block_hash)
        parent, at = block_hash, end
    found: list[BlockHash] = []  # the blocks that begin with the prompt
    if len(own) == len(prompt.hashes):
        rest = prompt.token_bytes[at:]
        found = [own.pop()] if own and not rest else _children_with(batch, parent, rest)
    for block_hash in found:  # grows while it is walked
        found += batch.iter_children(block_hash)
    chosen: list[BlockHash] = []
    num_pinned = 0
    for block_hash in (*reversed(found), *reversed(own)):
        entry = batch.entry(block_hash)
        if entry is not None and entry.pinned:
            num_pinned += 1
        elif entry is None or older_than_s is None or entry.last_access < batch.now - older_than_s:
            chosen.append(block_hash)
    return Chosen(chosen, num_pinned)


def _children_with(batch: WriteBatch, parent: BlockHash, first_tokens: bytes) -> list[BlockHash]:
    """Return the stored blocks that follow a block and begin with these tokens."""
    return [
        child
        for child in batch.iter_children(parent)
        if not first_tokens or (batch.read_tokens(child) or b"").startswith(first_tokens)
    ]


def _load_entries(batch: WriteBatch) -> tuple[list[BlockHash], EntryTable]:
    """Return all block hashes and, row by row, their entries. Entries of a wrong length are left out."""
    hashes: list[BlockHash] = []
    packed = bytearray()
    with batch.txn.cursor(db=batch.databases.entries) as cursor:
        for key, value in cursor:
            if len(value) == ENTRY_BYTES and len(key) == HASH_BYTES:
                hashes.append(bytes(key))
                packed += value
    return hashes, np.frombuffer(packed, dtype=ENTRY_DTYPE)
