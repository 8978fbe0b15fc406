"""Salvaging a data file that LMDB must not see: each record describes itself, so its sound blocks are saved.

The damaged file is read with plain reads, page by page. A record begins right after the header of a page, so
it is found without any tree; its checksum says whether it is whole. Index entries and descriptions of namespaces
carry checksums too and are saved where a leaf still has them; a block without its entry loses its age, its
counts and its pin. Recently evicted blocks may come back with the rest: they are as true as before.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tierkv.errors import ConfigError, CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.cold_children import CHILD_ROW_BYTES
from tierkv.storage.cold_eviction import EvictionCandidates
from tierkv.storage.cold_notes import Counters
from tierkv.storage.cold_rows import (
    ENTRY_BYTES,
    FORMAT_KEY,
    NAMES,
    NAMESPACE_PREFIX,
    QUOTA_KEY,
    STORE_VERSION,
    ColdEntry,
    NamespaceRow,
    add_checksum,
    check_format,
    map_bytes_of,
    padded_bytes,
    unpack_entry,
    unpack_quota,
    unpack_row,
    with_history,
)
from tierkv.storage.cold_tenants import TENANT_PREFIX, TenantSettings, unpack_tenant, write_tenants
from tierkv.storage.cold_writer import ColdWriter
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.storage.lmdb_file import open_store_file
from tierkv.storage.lmdb_format import BIG_FLAG, LEAF_FLAG, NODE_BYTES, PAGE_HEADER_BYTES, newest_meta
from tierkv.storage.lmdb_search import LeafValue, find_leaf
from tierkv.storage.lmdb_tree import Keys, check_trees
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import HEADER_BYTES, MAGIC, parse_record, record_bytes_of
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES

__all__ = ["ColdSalvager"]

_CHUNK_BYTES = 4 << 20
_BATCH_BLOCKS = 16
_MAX_ROW_BYTES = 2 * DESCRIPTION_LIMIT_BYTES  # of a namespace, whose description is nearly all of it
_MAX_READS = 16  # of the file's length: records do not overlap, but the sizes in damaged headers may
_NODE = struct.Struct("<IHH")  # of a leaf: length of the value, flags, length of the key
_LEVEL_AT = CHILD_ROW_BYTES - HASH_BYTES - 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Place:
    """A sound record in the damaged file."""

    offset: int
    size: int
    parent: BlockHash
    namespace: BlockHash


@dataclass(slots=True)
class _Remains:
    """Everything sound that was found."""

    places: dict[BlockHash, _Place] = field(default_factory=dict)
    entries: dict[BlockHash, ColdEntry] = field(default_factory=dict)
    rows: dict[BlockHash, NamespaceRow] = field(default_factory=dict)
    tenants: dict[str, TenantSettings] = field(default_factory=dict)
    quota_bytes: int = 0
    read_bytes: int = 0
    damaged: int = 0
    other_formats: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdSalvager:
    """Checks a cold store's data file, and makes a new store from a file that must not be used.

    quota_bytes: up to so much is saved, more where the store's quota was larger. If that is beyond the store's quota,
    the next put evicts the blocks that were not used for longest.
    """

    quota_bytes: int
    clock: Callable[[], float]

    def check(self, fd: int) -> None:
        """Raise CorruptBlockError if LMDB must not see the file, FormatVersionError if it is another version's."""
        with contextlib.suppress(KeyError):  # its first process was killed before it wrote the version
            check_format(find_leaf(fd, b"meta", FORMAT_KEY).held)
        keys = check_trees(fd)
        if not keys.keys() <= set(NAMES):
            raise CorruptBlockError("it has databases that no cold store has")
        blocks, index, children = (keys.get(name, np.empty(0, "S1")) for name in (b"blocks", b"index", b"children"))
        if not np.array_equal(blocks, index):
            raise CorruptBlockError("its blocks are not those of its index")
        if _sum_of_children(children) != _sum_of_hashes(index):
            raise CorruptBlockError("its list of children is not that of its blocks")

    def rebuild(self, damaged: Path, directory: Path) -> None:
        """Make a store in `directory` from the sound blocks of a damaged data file, at most the quota of them."""
        fd = open_store_file(damaged)
        try:
            remains = _scan(fd)
            quota_bytes = max(remains.quota_bytes, self.quota_bytes)
            with contextlib.closing(LmdbEnv(directory, map_bytes=map_bytes_of(quota_bytes), names=NAMES)) as env:
                writer = ColdWriter(
                    env,
                    quota_bytes=quota_bytes,
                    min_free_bytes=0,
                    clock=self.clock,
                    candidates=EvictionCandidates(),
                    counters=Counters(),
                )
                saved = _write(fd, remains, writer, quota_bytes)
                env.sync()
        finally:
            os.close(fd)
        _logger.warning(
            "cold store %s: %d blocks saved of a damaged file; %d are damaged themselves, %d of another format",
            damaged.parent,
            saved,
            remains.damaged,
            remains.other_formats,
        )


def _scan(fd: int) -> _Remains:
    """Read the file once, page by page."""
    try:
        page_bytes = newest_meta(fd).page_bytes
    except CorruptBlockError:
        page_bytes = mmap.PAGESIZE
    remains = _Remains()
    magic = np.frombuffer(MAGIC, dtype=np.uint8)
    for offset, chunk in _iter_chunks(fd, page_bytes):
        pages = chunk.reshape(-1, page_bytes)
        begins = (pages[:, PAGE_HEADER_BYTES : PAGE_HEADER_BYTES + len(MAGIC)] == magic).all(axis=1)
        for row in np.flatnonzero(begins).tolist():
            _take_record(fd, offset + row * page_bytes + PAGE_HEADER_BYTES, remains)
        for leaf in _iter_leaf_values(chunk, page_bytes):
            _take_leaf(fd, leaf, page_bytes, remains)
    return remains


def _iter_leaf_values(chunk: Bytes, page_bytes: int) -> Iterator[LeafValue]:
    """Yield the readable values of the leaves among some pages, which may hold anything."""
    kinds = chunk.view("<u2").reshape(-1, page_bytes // 2)[:, 5]
    for row in np.flatnonzero(kinds == LEAF_FLAG).tolist():
        page = chunk[row * page_bytes : (row + 1) * page_bytes].tobytes()
        lower = min(int.from_bytes(page[12:14], "little"), page_bytes)
        for at in np.frombuffer(page[PAGE_HEADER_BYTES : lower & ~1], dtype="<u2").tolist():
            if at + NODE_BYTES > page_bytes:
                continue
            size, flags, key_bytes = _NODE.unpack_from(page, at)
            start = at + NODE_BYTES + key_bytes
            held = page[start : start + (8 if flags & BIG_FLAG else size)]
            yield LeafValue(page[at + NODE_BYTES : start], size, held, bool(flags & BIG_FLAG))


def _iter_chunks(fd: int, page_bytes: int) -> Iterator[tuple[int, Bytes]]:
    """Yield (offset, whole pages)."""
    offset = 0
    while True:
        raw = os.pread(fd, _CHUNK_BYTES, offset)
        whole = len(raw) // page_bytes * page_bytes
        if not whole:
            return
        yield offset, np.frombuffer(raw, dtype=np.uint8, count=whole)
        offset += whole


def _take_record(fd: int, offset: int, remains: _Remains) -> None:
    try:
        size = record_bytes_of(os.pread(fd, HEADER_BYTES, offset))
        file_bytes = os.fstat(fd).st_size
        if offset + size > file_bytes or remains.read_bytes > _MAX_READS * file_bytes:
            raise CorruptBlockError("it was cut short")
        remains.read_bytes += size
        info = parse_record(os.pread(fd, size, offset)).info
    except FormatVersionError:
        remains.other_formats += 1
        return
    except StoreError:
        remains.damaged += 1
        return
    remains.places[info.block_hash] = _Place(offset, size, info.parent, info.namespace)


def _take_leaf(fd: int, leaf: LeafValue, page_bytes: int, remains: _Remains) -> None:
    """Keep the newest sound entry of a block and row of a namespace."""
    with contextlib.suppress(CorruptBlockError):
        if len(leaf.key) == HASH_BYTES and leaf.size == ENTRY_BYTES:
            entry = unpack_entry(leaf.key, leaf.held)
            known = remains.entries.get(leaf.key)
            if known is None or entry.last_access >= known.last_access:
                remains.entries[leaf.key] = entry
        elif leaf.key == QUOTA_KEY and not leaf.is_big:  # of several, the largest evicts nothing
            remains.quota_bytes = max(remains.quota_bytes, unpack_quota(leaf.held) or 0)
        elif (
            leaf.key.startswith(TENANT_PREFIX) and not leaf.is_big
        ):  # the newest leaf is not known: the first one stays
            tenant = leaf.key[len(TENANT_PREFIX) :].decode("ascii", "replace")
            remains.tenants.setdefault(tenant, unpack_tenant(tenant, leaf.held))
        elif (
            leaf.size <= _MAX_ROW_BYTES
            and leaf.key.startswith(NAMESPACE_PREFIX)
            and len(leaf.key) == len(NAMESPACE_PREFIX) + HASH_BYTES
        ):
            digest = leaf.key[len(NAMESPACE_PREFIX) :]
            row = unpack_row(leaf.read(fd, page_bytes))
            if digest not in remains.rows or row.last_used >= remains.rows[digest].last_used:
                remains.rows[digest] = row


def _write(fd: int, remains: _Remains, writer: ColdWriter, quota_bytes: int) -> int:
    """Put the blocks that were found, parents before children; return how many were stored."""
    with writer.batch() as batch:
        batch.txn.put(FORMAT_KEY, add_checksum(STORE_VERSION), db=batch.databases.meta)
        if remains.quota_bytes:
            batch.set_quota(remains.quota_bytes)
        for digest, old in remains.rows.items():
            row = batch.namespace(digest)
            row.description, row.created, row.last_used = old.description, old.created, old.last_used
            row.tenant = old.tenant
        with contextlib.suppress(ConfigError):  # older rows that contradict each other
            write_tenants(batch.txn, batch.databases, remains.tenants, quota_bytes, may_exceed=True)
    order = _plan(remains, quota_bytes)
    saved = 0
    for start in range(0, len(order), _BATCH_BLOCKS):
        group = order[start : start + _BATCH_BLOCKS]
        places = [remains.places[block_hash] for block_hash in group]
        records = []
        for place in places:  # checked a second time: another program may write to the file
            with contextlib.suppress(StoreError):
                records.append(parse_record(os.pread(fd, place.size, place.offset)))
        saved += writer.put(records).count(PutOutcome.STORED)
        with writer.batch() as batch:
            for block_hash in group:
                entry, old_entry = batch.entry(block_hash), remains.entries.get(block_hash)
                if entry and old_entry:
                    batch.write_entry(block_hash, with_history(entry, old_entry))
    return saved


def _plan(remains: _Remains, quota_bytes: int) -> list[BlockHash]:
    """Return the blocks to keep, last used first, each after its parent; blocks that no chain reaches are left out.

    A parent counts as used when its children were.
    """
    used: dict[BlockHash, float] = {}
    depth: dict[BlockHash, int] = {}
    for leaf in remains.places:
        chain = _chain(leaf, remains, depth)
        if chain is None:
            continue
        last = float("-inf")
        for block_hash in reversed(chain):  # from the leaf up
            entry = remains.entries.get(block_hash)
            last = max(last, entry.last_access if entry else float("-inf"))
            used[block_hash] = max(last, used.get(block_hash, float("-inf")))
        _raise_parents(chain[0], last, remains, used)
    order = sorted(used, key=lambda block_hash: (-used[block_hash], depth[block_hash]))
    total = 0
    for count, block_hash in enumerate(order):
        total += padded_bytes(remains.places[block_hash].size)
        if total > quota_bytes:
            return order[:count]
    return order


def _chain(leaf: BlockHash, remains: _Remains, depth: dict[BlockHash, int]) -> list[BlockHash] | None:
    """Return the blocks from the first of unknown depth to `leaf`, and note their depths; None if a parent is lost."""
    chain: list[BlockHash] = []
    seen: set[BlockHash] = set()
    at = leaf
    while at not in depth:
        place = remains.places.get(at)
        if place is None or at in seen:
            return None
        chain.append(at)
        seen.add(at)
        if place.parent == place.namespace:
            break
        at = place.parent
    chain.reverse()
    before = depth.get(at, -1)
    for number, block_hash in enumerate(chain, 1):
        depth[block_hash] = before + number
    return chain or [leaf]


def _raise_parents(first: BlockHash, last: float, remains: _Remains, used: dict[BlockHash, float]) -> None:
    """Let the parents of a chain's first block be used as late as the chain is."""
    at = remains.places[first].parent
    while at in used and used[at] < last:
        used[at] = last
        at = remains.places[at].parent


def _sum_of_children(children: Keys) -> tuple[int, int]:
    """Return the sum of the hashes of all children, each taken once."""
    if not len(children):
        return 0, 0
    if children.dtype.itemsize != CHILD_ROW_BYTES:
        raise CorruptBlockError("its list of children is damaged")
    rows = children.view(np.uint8).reshape(len(children), CHILD_ROW_BYTES)
    rows = rows[rows[:, _LEVEL_AT] == 0]
    return _sum_of_hashes(np.ascontiguousarray(rows[:, -HASH_BYTES:]).reshape(-1).view(f"S{HASH_BYTES}"))


def _sum_of_hashes(hashes: Keys) -> tuple[int, int]:
    if not len(hashes):
        return 0, 0
    if hashes.dtype.itemsize != HASH_BYTES:
        raise CorruptBlockError("a block has no hash of its own")
    halves = np.ascontiguousarray(hashes).view("<u8").reshape(-1, 2)
    return int(halves[:, 0].sum()), int(halves[:, 1].sum())
