"""Eviction from the cold store: of the blocks with the lowest score, of those that filters match, of a prompt's blocks.

Leaves go before their parents, pinned blocks never. Reading a million entries takes a moment, so candidates are queued:
one scan orders the leaves, later evictions take from the queue. Each candidate is checked again, since it may have been
touched, pinned or given children. A parent enters the queue when its last child is removed.

Each tenant with settings has a queue of its own. Blocks of tenants with more than their share go first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from tierkv.storage.cold_batch import WriteBatch
from tierkv.storage.cold_rows import ENTRY_BYTES, ENTRY_DTYPE, EntryTable, pack_entry, padded_bytes
from tierkv.storage.record import EncodedRecord
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
        self._heaps: dict[str | None, list[_Candidate]] = {}
        self._tenants: frozenset[str] = frozenset()

    def make_room_for(self, batch: WriteBatch, records: Sequence[EncodedRecord], *, limit: int) -> list[int]:
        """Make room for records within `limit` live bytes. Return up to how many live bytes each may be inserted.

        A tenant at its limit loses blocks of its own. Then tenants with more than their share lose blocks. If that is
        not enough (blocks are pinned, or all shares together exceed a smaller quota), tenants that stay within their
        own share get room at the cost of others, and tenants that would exceed theirs get none.
        """
        keep = frozenset(each for record in records for each in (record.info.parent, record.info.block_hash))
        usage, incoming = batch.usage, batch.incoming(records)
        for tenant, more_bytes in incoming.items():
            if tenant is not None and usage.room(tenant) < more_bytes:
                to_bytes = max(usage.live_bytes(tenant) + usage.room(tenant) - more_bytes, 0)
                self.make_room_of_tenant(batch, tenant, to_bytes=to_bytes, keep=keep)
        needed = sum(padded_bytes(record.stored_bytes) for record in records)
        within_share: set[str | None] = set()
        reserved = 0
        if incoming or not usage.settings:
            is_made = self._make_room(batch, max(limit - needed, 0), keep, incoming)
            if not is_made and incoming:
                within_share = {
                    each for each, more_bytes in incoming.items() if usage.is_within_share(each, more_bytes)
                }
                reserved = sum(incoming[each] for each in within_share)
            if reserved:
                self._evict_until(batch, keep, lambda: batch.live_bytes <= max(limit - reserved, 0), _any)
        tenants = [usage.tenant_of(record.info.namespace) for record in records]
        return [limit if tenant in within_share else limit - reserved for tenant in tenants]

    def make_room_in_file(self, batch: WriteBatch, records: Sequence[EncodedRecord], *, limit: int, room: int) -> int:
        """Make room for records in a file that may grow by `room` bytes; below 0 it is longer than it may be.

        Return how many bytes may be live with them, also beyond `limit`. Half of what they need is not counted on,
        since trees need pages too. In a file that is too long a 16th stays free, because few values fit the gaps of a
        full one.
        """
        needed = sum(padded_bytes(record.stored_bytes) for record in records)
        most_bytes = batch.live_bytes + max(room - needed // 2, 0)
        if room < 0:
            most_bytes = min(most_bytes, batch.env.file_bytes // 16 * 15)
        self.make_room_for(batch, records, limit=min(limit, most_bytes))
        return most_bytes

    def make_room(self, batch: WriteBatch, *, to_bytes: int) -> bool:
        """Remove blocks until at most `to_bytes` are live. Return whether that was reached.

        Blocks within the shares of tenants go last.
        """
        return self._make_room(batch, to_bytes, frozenset(), {}) or self._evict_until(
            batch, frozenset(), lambda: batch.live_bytes <= to_bytes, _any
        )

    def make_spare(self, batch: WriteBatch, *, spare_bytes: int) -> None:
        """Remove blocks of so many bytes, and of at least a 16th of the live ones."""
        to_bytes = batch.live_bytes - max(batch.live_bytes // 16, spare_bytes)
        self.make_room(batch, to_bytes=max(to_bytes, 0))

    def _make_room(
        self, batch: WriteBatch, to_bytes: int, keep: frozenset[BlockHash], incoming: Mapping[str | None, int]
    ) -> bool:
        """Remove blocks of tenants that have more than their share, with what comes, until `to_bytes` are live."""

        def is_above_share(tenant: str | None, candidate: _Candidate) -> bool:
            return batch.usage.keeps_share(tenant, candidate.value_bytes - incoming.get(tenant, 0))

        return self._evict_until(batch, keep, lambda: batch.live_bytes <= to_bytes, is_above_share)

    def make_room_of_tenant(self, batch: WriteBatch, tenant: str, *, to_bytes: int, keep: frozenset[BlockHash]) -> bool:
        """Remove blocks of one tenant until it has at most `to_bytes`. Return whether that was reached."""
        return self._evict_until(
            batch,
            keep,
            lambda: batch.usage.live_bytes(tenant) <= to_bytes,
            lambda owner, candidate: owner == tenant,
        )

    def forget(self) -> None:
        """Drop the queues: after an abort, blocks that they counted as removed are stored again."""
        self._heaps.clear()

    def _evict_until(
        self,
        batch: WriteBatch,
        keep: frozenset[BlockHash],
        is_done: Callable[[], bool],
        may_evict: Callable[[str | None, _Candidate], bool],
    ) -> bool:
        """Remove the first candidates of queues whose first candidate may go. Return whether it is done."""
        if self._tenants != batch.usage.settings.keys():
            self.forget()
        removed_at_scan = -1
        while not is_done():
            heap = self._best(may_evict)
            if heap is not None:
                self._try_next(batch, heap, keep)
            elif len(batch.removed) == removed_at_scan:
                return False  # a whole scan found no block that may be removed
            else:
                removed_at_scan = len(batch.removed)
                self._scan(batch)
        return True

    def _best(self, may_evict: Callable[[str | None, _Candidate], bool]) -> list[_Candidate] | None:
        """Return the queue with the lowest score among those whose first candidate may go."""
        heaps = (heap for tenant, heap in self._heaps.items() if heap and may_evict(tenant, heap[0]))
        return min(heaps, key=lambda heap: heap[0], default=None)

    def _try_next(self, batch: WriteBatch, heap: list[_Candidate], keep: frozenset[BlockHash]) -> None:
        candidate = heapq.heappop(heap)
        entry = batch.entry(candidate.block_hash)
        if entry is None or entry.pinned or candidate.block_hash in keep:
            return
        if entry.last_access != candidate.last_access or not batch.remove_leaf(candidate.block_hash):
            return
        if not batch.has_children(entry.parent):
            self._push_parent(batch, heap, entry.parent)

    def _push_parent(self, batch: WriteBatch, heap: list[_Candidate], block_hash: BlockHash) -> None:
        entry = batch.entry(block_hash)
        if entry is None:  # it is the namespace digest: the whole chain is removed
            return
        row = np.frombuffer(pack_entry(block_hash, entry), dtype=ENTRY_DTYPE)
        score = float(self._score(row, batch.now)[0])
        heapq.heappush(heap, _Candidate(score, -entry.depth, block_hash, entry.last_access, entry.value_bytes))

    def _scan(self, batch: WriteBatch) -> None:
        hashes, entries = _load_entries(batch)
        parents = set(entries["parent"].tolist())
        leaves = np.fromiter((each not in parents for each in hashes), dtype=bool, count=len(hashes))
        rows = np.flatnonzero(leaves & (entries["pinned"] == 0))
        scores = self._score(entries[rows], batch.now)
        depths = entries["depth"][rows].astype(np.int64)
        order = np.lexsort((-depths, scores))
        times, sizes = entries["last_access"][rows], entries["value_bytes"][rows]
        self._tenants = frozenset(batch.usage.settings)
        self._heaps = {}
        for tenant, best in _by_tenant(batch, entries[rows], order).items():
            self._heaps[tenant] = [
                _Candidate(float(scores[i]), -int(depths[i]), hashes[rows[i]], float(times[i]), int(sizes[i]))
                for i in best[:_MAX_QUEUE]
            ]


def _any(tenant: str | None, candidate: _Candidate) -> bool:
    return True


def _by_tenant(
    batch: WriteBatch, entries: EntryTable, order: npt.NDArray[np.int64]
) -> dict[str | None, npt.NDArray[np.int64]]:
    """Divide numbers of rows among the tenants with settings, and None for all others; their order stays."""
    if not batch.usage.settings:
        return {None: order}
    namespaces, numbers = np.unique(
        np.ascontiguousarray(entries["namespace"]).view(f"S{HASH_BYTES}"), return_inverse=True
    )
    tenants = [batch.usage.tenant_of(bytes(each).ljust(HASH_BYTES, b"\0")) for each in namespaces]
    names = list(dict.fromkeys(tenants))
    owners = np.array([names.index(each) for each in tenants], dtype=np.int64)[numbers[order]]
    return {name: order[owners == number] for number, name in enumerate(names)}


class _Candidate(NamedTuple):
    """Compared field by field: among equal scores the deepest goes first."""

    score: float
    minus_depth: int
    block_hash: BlockHash
    last_access: float
    value_bytes: int


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
        candidates.make_room(batch, to_bytes=to_bytes)
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
