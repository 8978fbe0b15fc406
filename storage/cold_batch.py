"""Everything that one write transaction does to the cold store, so that its databases always agree.

Two rules keep a forged hash harmless. A block is stored only after the parent that its content digest was made of. A
block never stays when its parent is removed. A chain is followed by hash: a forged block in a parent's place would
change what its children mean. (A reader of a block compares its content digest once more.)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import lmdb
import numpy as np

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import fits_namespace
from tierkv.storage.cold_children import ChildrenTable
from tierkv.storage.cold_descriptions import lossy_codec_in, salt_digest_in
from tierkv.storage.cold_notes import NotedRows
from tierkv.storage.cold_pins import expired_pins, set_pin_end
from tierkv.storage.cold_rows import (
    BLOCKS,
    MAX_VALUE_BYTES,
    NAMESPACE_PREFIX,
    NO_DESCRIPTION,
    OVERFLOW_HEADER_BYTES,
    QUOTA_KEY,
    ColdEntry,
    Databases,
    NamespaceRow,
    entry_of,
    get_entry,
    load_rows,
    pack_entry,
    pack_quota,
    pack_row,
    padded_bytes,
    read_block_info,
    read_block_tokens,
    unpack_quota,
)
from tierkv.storage.cold_tenants import TenantUsage, load_tenants
from tierkv.storage.lmdb_env import LmdbEnv, WriteTransaction
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import BlockInfo, EncodedRecord, mismatch, parse_record, read_header
from tierkv.values.block import BlockHash

__all__ = ["DamagedPagesError", "WriteBatch", "descriptions_limit", "groups_of"]

MAX_UNUSED = 1024  # namespaces without a block that are remembered


class DamagedPagesError(StoreError):
    """LMDB refused the pages of a block. Their header has been repaired: the same work passes in a new transaction."""


@dataclass(slots=True)
class WriteBatch:
    """Changes within one write transaction. The counters are valid only once it has committed.

    children: the children table. rows: of all namespaces, changed in place and written by `finish`. usage: what tenants
    have, and may have.
    removed, removed_bytes: the blocks that this batch has removed, and the bytes of their values.
    """

    env: LmdbEnv
    txn: WriteTransaction
    now: float
    databases: Databases = field(init=False)
    children: ChildrenTable = field(init=False)
    rows: dict[BlockHash, NamespaceRow] = field(init=False)
    usage: TenantUsage = field(init=False)
    removed: list[BlockHash] = field(default_factory=list)
    removed_bytes: int = 0
    _new: set[BlockHash] = field(default_factory=set)
    _rows_before: dict[BlockHash, NamespaceRow] = field(init=False)
    _registered: set[BlockHash] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.databases = Databases(*self.env.handles)
        self.children = ChildrenTable(self.txn, self.databases.children)
        sound, damaged = load_rows(self.txn, self.databases)
        self.rows = sound | damaged
        self.read_tenants()
        self._rows_before = {digest: copy.copy(row) for digest, row in sound.items()}

    def read_tenants(self) -> None:
        """Read the settings of tenants, and count what the tenants have."""
        self.usage = TenantUsage(load_tenants(self.txn, self.databases), self.rows)

    @property
    def quota_bytes(self) -> int | None:
        """The store's quota; None where none is stored, or a damaged one."""
        return unpack_quota(self.txn.get(QUOTA_KEY, db=self.databases.meta))

    def set_quota(self, quota_bytes: int) -> None:
        """Store a quota, for every process that has the store open and for all later ones."""
        self.txn.put(QUOTA_KEY, pack_quota(quota_bytes), db=self.databases.meta)

    def renew_quota(self) -> None:
        """Store the quota again, so that LMDB has something to commit."""
        if (packed := self.txn.get(QUOTA_KEY, db=self.databases.meta)) is not None:
            self.txn.put(QUOTA_KEY, bytes(packed), db=self.databases.meta)

    @property
    def live_bytes(self) -> int:
        """Bytes of all values with their padding."""
        return sum(row.value_bytes for row in self.rows.values())

    def entry(self, block_hash: BlockHash) -> ColdEntry | None:
        """Return a block's entry, or None if it is not stored or its entry is damaged."""
        try:
            return get_entry(self.txn, self.databases, block_hash)
        except CorruptBlockError:
            return None

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a stored block's token ids, or None if it is absent or its header unreadable."""
        return read_block_tokens(self.txn, self.databases, block_hash)

    def value(self, block_hash: BlockHash) -> memoryview | None:
        """Return a block's value. Where LMDB finds a wrong page, repair its header and raise DamagedPagesError."""
        try:
            return self.txn.get(block_hash, db=self.databases.blocks)
        except lmdb.CorruptedError as exc:
            self.env.data.repair_value_header(BLOCKS, block_hash, None)
            raise DamagedPagesError(f"the pages of block {block_hash.hex()} were damaged", hint="try again") from exc

    def has_children(self, block_hash: BlockHash) -> bool:
        """Return whether a stored block follows this one."""
        return next(self.iter_children(block_hash), None) is not None

    def iter_children(self, block_hash: BlockHash) -> Iterator[BlockHash]:
        """Yield the stored blocks that follow this one."""
        return (child for child in self.children.iter_children(block_hash) if self._follows(child, block_hash))

    def insert(self, record: EncodedRecord) -> PutOutcome:
        """Store a block, its entry and its place in the tree. Replace a damaged one; one of another format stays."""
        info = record.info
        present = self.value(info.block_hash)
        if present is not None:
            try:
                header = read_header(present)
                same = mismatch(header.info, info) is None
                if not same:
                    return PutOutcome.COLLISION
                if self.entry(info.block_hash) is not None and self.allows_codec(info.namespace, header.codec.name):
                    return PutOutcome.EXISTS
            except FormatVersionError:
                return PutOutcome.FORMAT
            except StoreError:
                pass
            self.remove_subtree(info.block_hash)
        entry = self.new_entry(record)
        if entry is None or not self.follows_its_parent(info):
            return PutOutcome.NO_PARENT
        if entry.value_bytes > MAX_VALUE_BYTES:
            return PutOutcome.FULL
        self.txn.put(info.block_hash, _padded(record).data, db=self.databases.blocks)
        self._new.add(info.block_hash)
        self.write_entry(info.block_hash, entry)
        self.children.insert(info.parent, info.token_bytes, info.block_hash, self.read_tokens)
        self.count(entry, 1)
        return PutOutcome.STORED

    def insert_within(self, record: EncodedRecord, limit: int) -> PutOutcome:
        """Do as `insert` if the live bytes then stay within a limit, and those of the tenant within the tenant's."""
        size = padded_bytes(record.stored_bytes)
        is_within_limit = size <= self.usage.room(self.usage.tenant_of(record.info.namespace))
        if is_within_limit and self.live_bytes + size <= limit:
            return self.insert(record)
        known = self.entry(record.info.block_hash) is not None
        return PutOutcome.EXISTS if known else PutOutcome.FULL if is_within_limit else PutOutcome.TENANT_LIMIT

    def incoming(self, records: Sequence[EncodedRecord]) -> dict[str | None, int]:
        """Return how many bytes each tenant with settings, and None for the others, has of records to be stored.

        Those that are stored already count not, nor those whose parents are neither stored nor among them.
        """
        found: dict[str | None, int] = {}
        parents: set[BlockHash] = set()
        for record in records if self.usage.settings else ():
            info = record.info
            is_stored = self.entry(info.block_hash) is not None
            if info.parent == info.namespace or info.parent in parents or self.entry(info.parent) is not None:
                parents.add(info.block_hash)
                if not is_stored:
                    tenant = self.usage.tenant_of(info.namespace)
                    found[tenant] = found.get(tenant, 0) + padded_bytes(record.stored_bytes)
        return found

    def new_entry(self, record: EncodedRecord) -> ColdEntry | None:
        """Return the entry of a record that is stored now, or None if its parent is not stored."""
        info = record.info
        depth = 0
        if info.parent != info.namespace:
            parent = self.entry(info.parent)
            if parent is None or parent.namespace != info.namespace:
                return None
            depth = parent.depth + 1
        return entry_of(record, depth=depth, now=self.now)

    def follows_its_parent(self, info: BlockInfo) -> bool:
        """Return whether the stored parent is the block that the content digest was made of."""
        if info.parent == info.namespace:
            return info.follows(None)
        value = self.value(info.parent)
        try:
            return value is not None and info.follows(read_header(value).info)
        except StoreError:
            return False

    def allows_codec(self, namespace: BlockHash, codec: str) -> bool:
        """Return whether records of a codec fit a namespace; True where the namespace has no description."""
        row = self.rows.get(namespace)
        lossy_codec = lossy_codec_in(row.description, namespace) if row else None
        return lossy_codec is None or fits_namespace(codec, lossy_codec)

    def write_entry(self, block_hash: BlockHash, entry: ColdEntry) -> None:
        """Replace an entry; sizes, parent and namespace must stay the same."""
        self.txn.put(block_hash, pack_entry(block_hash, entry), db=self.databases.entries)

    def touch(self, block_hash: BlockHash, *, count: int, at: float) -> None:
        """Record accesses of a block, if it is still stored."""
        entry = self.entry(block_hash)
        if entry is not None:
            at = max(at, entry.last_access)
            self.write_entry(block_hash, replace(entry, access_count=entry.access_count + count, last_access=at))

    def set_pinned(self, block_hash: BlockHash, pinned: bool, *, until: float | None = None) -> None:
        """Mark a block as never to be evicted, or no longer so. until: when the pin ends; None for never."""
        entry = self.entry(block_hash)
        if entry is None:
            return
        set_pin_end(self.txn, self.databases, block_hash, until if pinned else None)
        if entry.pinned != pinned:
            self.write_entry(block_hash, replace(entry, pinned=pinned))

    def end_pins(self) -> None:
        """Unpin the blocks whose pins have ended."""
        for block_hash in expired_pins(self.txn, self.databases, self.now):
            self.set_pinned(block_hash, False)

    def remove_leaf(self, block_hash: BlockHash) -> bool:
        """Remove a block that no stored block follows. Return False, and do nothing, for any other."""
        if self.has_children(block_hash):
            return False
        return self._remove(block_hash)

    def remove_leaves(self, block_hashes: Sequence[BlockHash]) -> None:
        """Remove those of some blocks, in this order, that no stored block follows."""
        for block_hash in block_hashes:
            self.remove_leaf(block_hash)

    def remove_subtree(self, block_hash: BlockHash) -> int:
        """Remove a block and all that follow it; return how many there were. Visits each block once, and no block that
        only a wrong row of the children table leads to.
        """
        order = {block_hash: None}
        pending = [block_hash]
        while pending:
            for child in self.iter_children(pending.pop()):
                if child not in order:
                    order[child] = None
                    pending.append(child)
        return sum(self._remove(each) for each in reversed(order))

    def write_notes(self, noted: NotedRows) -> None:
        """Write what readers have noted."""
        for digest, description in noted.namespaces.items():
            self.register(digest, description)
        for block_hash, (count, at) in noted.touches.items():
            self.touch(block_hash, count=count, at=at)

    def namespace(self, digest: BlockHash) -> NamespaceRow:
        """Return the row of a namespace, to be changed in place; created where it is missing."""
        return self.rows.setdefault(digest, NamespaceRow(created=self.now, last_used=self.now))

    def register(self, digest: BlockHash, description: bytes) -> None:
        """Note that a namespace is in use, and its description."""
        row = self.namespace(digest)
        row.description = description
        row.last_used = self.now
        row.tenant = salt_digest_in(description, digest)
        self.usage.note(digest, row)
        self._registered.add(digest)

    def count(self, entry: ColdEntry, sign: int) -> None:
        """Add a block's entry to its namespace's totals (1), or subtract it (-1)."""
        row = self.namespace(entry.namespace)
        row.add(entry, sign)
        row.last_used = max(row.last_used, self.now)
        self.usage.count(entry.namespace, sign * entry.value_bytes)

    def finish(self) -> None:
        """Write the namespaces' rows that have changed. To be called last."""
        if self._registered:
            self._bound_descriptions()
        for digest, row in self.rows.items():
            if row != self._rows_before.get(digest):
                self.txn.put(NAMESPACE_PREFIX + digest, pack_row(row), db=self.databases.meta)

    def _bound_descriptions(self) -> None:
        """Drop namespaces that have no block, the longest unused first, as far as the limits ask for it. Where that is
        not enough, the oldest others keep their blocks and lose their description, until they are opened again.
        """
        limit = descriptions_limit(self.quota_bytes or 0)
        by_age = sorted(self.rows.keys() - self._registered, key=lambda digest: self.rows[digest].last_used)
        unused = [digest for digest in by_age if not self.rows[digest].blocks]
        size = sum(len(row.description) for row in self.rows.values())
        for number, digest in enumerate(unused):
            if size <= limit and len(unused) - number <= MAX_UNUSED:
                break
            size -= len(self.rows.pop(digest).description)
            self.txn.delete(NAMESPACE_PREFIX + digest, db=self.databases.meta)
        for digest in by_age:
            if size <= limit:
                break
            if digest in self.rows:
                size -= len(self.rows[digest].description) - len(NO_DESCRIPTION)
                self.rows[digest].description = NO_DESCRIPTION

    def _follows(self, child: BlockHash, parent: BlockHash) -> bool:
        """Return whether a listed child follows `parent`: its row in the children table may be wrong.

        True for a stored child whose entry and record are both unreadable.
        """
        entry = self.entry(child)
        if entry is not None:
            return entry.parent == parent
        info = read_block_info(self.txn, self.databases, child)
        if info is not None:
            return info.parent == parent
        return any(self.txn.get(child, db=each) is not None for each in (self.databases.entries, self.databases.blocks))

    def _remove(self, block_hash: BlockHash) -> bool:
        databases = self.databases
        entry = self.entry(block_hash)
        value = self.value(block_hash)
        tokens = None
        if value is not None:
            with contextlib.suppress(StoreError):
                header = read_header(value)
                tokens = header.info.token_bytes
                entry = entry or self.new_entry(parse_record(value))
            if block_hash not in self._new:  # what is new in this transaction is not in the file yet
                self.env.data.repair_value_header(BLOCKS, block_hash, value)
        had_block = self.txn.delete(block_hash, db=databases.blocks)
        had_entry = self.txn.delete(block_hash, db=databases.entries)
        if entry is not None:
            if tokens is None or not self.children.remove_known(entry.parent, tokens, block_hash):
                self.children.remove(entry.parent, block_hash)
            self.count(entry, -1)
            self.removed_bytes += entry.value_bytes
        self.children.remove_all(block_hash)  # only wrong rows are left: its children were removed before it
        if had_block or had_entry:
            self.removed.append(block_hash)
        return had_block or had_entry


def descriptions_limit(quota_bytes: int) -> int:
    """Return how many bytes all descriptions may have together: a share of the quota, 4 MiB at most."""
    return min(4 << 20, max(64 << 10, quota_bytes // 16))


def _padded(record: EncodedRecord) -> Bytes:
    """Return the record's bytes followed by zeros up to its size class, in its own buffer if that is free."""
    size = padded_bytes(record.stored_bytes) - OVERFLOW_HEADER_BYTES
    buffer = record.buffer
    if buffer.size < size or not buffer.flags.writeable:
        buffer = np.empty(size, dtype=np.uint8)
        buffer[: record.stored_bytes] = record.data
    buffer[record.stored_bytes : size] = 0
    return buffer[:size]


def groups_of(records: Sequence[EncodedRecord], max_bytes: int) -> Iterator[list[EncodedRecord]]:
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
