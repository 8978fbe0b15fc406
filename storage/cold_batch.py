"""Everything one write transaction does to the cold store, so that its databases always agree.

meta      `format` -> version; `namespace` + digest -> description, times and totals
blocks    block hash -> record, padded to a size class
index     block hash -> ColdEntry
children  parent (block hash or namespace digest) -> hashes of the stored blocks that follow it

The rule that keeps a forged hash harmless: an entry never stays when its parent goes. A chain is followed by
hash, so whoever could put another block in a parent's place would change what its children mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from tierkv.block import BlockHash
from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.cold_entry import ColdEntry, entry_of, pack_entry, unpack_entry
from tierkv.storage.lmdb_env import Database, DatabaseSpec, LmdbEnv, ReadTransaction, WriteTransaction
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.planes import Bytes
from tierkv.storage.record import EncodedRecord, mismatch, read_header

__all__ = [
    "SPECS",
    "Databases",
    "NamespaceRow",
    "WriteBatch",
    "get_entry",
    "iter_children",
    "iter_namespaces",
    "padded_bytes",
]

SPECS = (
    DatabaseSpec(name=b"meta"),
    DatabaseSpec(name=b"blocks"),
    DatabaseSpec(name=b"index"),
    DatabaseSpec(name=b"children", sorted_duplicates=True),
)
FORMAT_KEY = b"format"
NAMESPACE_PREFIX = b"namespace"
_PAGE_BYTES = 4096
_MAX_CLASS_BYTES = 256 << 10
_OVERFLOW_HEADER_BYTES = 16


@dataclass(frozen=True, slots=True)
class Databases:
    """Handles of the four databases."""

    meta: Database
    blocks: Database
    index: Database
    children: Database

    @classmethod
    def of(cls, env: LmdbEnv) -> Databases:
        """Return the handles of an environment opened with SPECS."""
        return cls(*(env.database(spec.name) for spec in SPECS))


class NamespaceRow(msgspec.Struct, array_like=True):
    """What meta keeps of a namespace. `value_bytes` counts padding, and is what the quota bounds."""

    description: bytes = b"{}"
    created: float = 0.0
    last_used: float = 0.0
    blocks: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    value_bytes: int = 0


def padded_bytes(record_bytes: int) -> int:
    """Return the size class of a record: the bytes its value and LMDB's page header take on the disk.

    Classes are a 24th to a 48th of the size apart, 256 KiB at most: values of one model then have one or two
    sizes, each fits the hole that another left, and LMDB need not search its free list.
    """
    size = record_bytes + _OVERFLOW_HEADER_BYTES
    step = 1 << max(size // 24, 1).bit_length() - 1
    step = min(max(step, _PAGE_BYTES), _MAX_CLASS_BYTES)
    return -(-size // step) * step


def get_entry(txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> ColdEntry | None:
    """Return a block's entry, or None if it is not stored. Raises CorruptBlockError if it is damaged."""
    packed = txn.get(block_hash, db=databases.index)
    return None if packed is None else unpack_entry(block_hash, packed)


def iter_children(txn: ReadTransaction, databases: Databases, parent: BlockHash) -> Iterator[BlockHash]:
    """Yield the hashes of the stored blocks that follow `parent`."""
    with txn.cursor(db=databases.children) as cursor:
        if cursor.set_key(parent):
            for child in cursor.iternext_dup():
                yield bytes(child)


def iter_namespaces(txn: ReadTransaction, databases: Databases) -> Iterator[tuple[BlockHash, NamespaceRow]]:
    """Yield every namespace that was ever opened here."""
    with txn.cursor(db=databases.meta) as cursor:
        found = cursor.set_range(NAMESPACE_PREFIX)
        while found and bytes(cursor.key()).startswith(NAMESPACE_PREFIX):
            digest = bytes(cursor.key())[len(NAMESPACE_PREFIX) :]
            try:
                yield digest, msgspec.msgpack.decode(cursor.value(), type=NamespaceRow)
            except msgspec.MsgspecError as exc:
                raise StoreError(f"the row of namespace {digest.hex()} is damaged: {exc}") from exc
            found = cursor.next()


@dataclass(slots=True)
class WriteBatch:
    """Changes within one write transaction. Counters are to be believed only once it has committed."""

    txn: WriteTransaction
    databases: Databases
    now: float
    removed: list[BlockHash] = field(default_factory=list)
    removed_bytes: int = 0
    _rows: dict[BlockHash, NamespaceRow] = field(init=False)

    def __post_init__(self) -> None:
        self._rows = dict(iter_namespaces(self.txn, self.databases))

    @property
    def live_bytes(self) -> int:
        """Bytes of all values with their padding."""
        return sum(row.value_bytes for row in self._rows.values())

    def entry(self, block_hash: BlockHash) -> ColdEntry | None:
        """Return a block's entry, or None if it is not stored or its entry is damaged."""
        try:
            return get_entry(self.txn, self.databases, block_hash)
        except CorruptBlockError:
            return None

    def has_children(self, block_hash: BlockHash) -> bool:
        """Tell whether a stored block follows this one."""
        return self.txn.get(block_hash, db=self.databases.children) is not None

    def insert(self, record: EncodedRecord) -> PutOutcome:
        """Store a block, its entry and its place in the tree. An unreadable one is replaced."""
        info = record.info
        present = self.txn.get(info.block_hash, db=self.databases.blocks)
        if present is not None:
            try:
                same = mismatch(read_header(present).info, info) is None
                return PutOutcome.EXISTS if same else PutOutcome.COLLISION
            except StoreError:
                self.remove_subtree(info.block_hash)
        depth = 0
        if info.parent != info.namespace:
            parent = self.entry(info.parent)
            if parent is None or parent.namespace != info.namespace:
                return PutOutcome.NO_PARENT
            depth = parent.depth + 1
        value = _padded(record)
        entry = entry_of(record, value_bytes=padded_bytes(record.stored_bytes), depth=depth, now=self.now)
        self.txn.put(info.block_hash, value.data, db=self.databases.blocks)
        self.write_entry(info.block_hash, entry)
        self.txn.put(info.parent, info.block_hash, db=self.databases.children)
        self._count(entry, 1)
        return PutOutcome.STORED

    def write_entry(self, block_hash: BlockHash, entry: ColdEntry) -> None:
        """Replace an entry; sizes, parent and namespace must be what they were."""
        self.txn.put(block_hash, pack_entry(block_hash, entry), db=self.databases.index)

    def touch(self, block_hash: BlockHash, *, count: int, at: float) -> None:
        """Record accesses of a block, if it is still stored."""
        entry = self.entry(block_hash)
        if entry is not None:
            at = max(at, entry.last_access)
            self.write_entry(block_hash, replace(entry, access_count=entry.access_count + count, last_access=at))

    def set_pinned(self, block_hash: BlockHash, pinned: bool) -> None:
        """Mark a block as never to be evicted, or no longer so."""
        entry = self.entry(block_hash)
        if entry is not None and entry.pinned != pinned:
            self.write_entry(block_hash, replace(entry, pinned=pinned))

    def remove_leaf(self, block_hash: BlockHash) -> bool:
        """Remove a block that no stored block follows. Returns False, and does nothing, for any other."""
        if self.has_children(block_hash):
            return False
        return self._remove(block_hash)

    def remove_subtree(self, block_hash: BlockHash) -> int:
        """Remove a block and all that follow it; return how many there were."""
        order = [block_hash]
        for parent in order:  # grows while it is walked
            order += iter_children(self.txn, self.databases, parent)
        return sum(self._remove(each) for each in reversed(order))

    def namespace(self, digest: BlockHash) -> NamespaceRow:
        """Return the row of a namespace, to be changed in place; created where it is missing."""
        return self._rows.setdefault(digest, NamespaceRow(created=self.now, last_used=self.now))

    def finish(self) -> None:
        """Write the namespaces' rows. To be called last."""
        for digest, row in self._rows.items():
            self.txn.put(NAMESPACE_PREFIX + digest, msgspec.msgpack.encode(row), db=self.databases.meta)

    def _remove(self, block_hash: BlockHash) -> bool:
        databases = self.databases
        entry = self.entry(block_hash)
        had_block = self.txn.delete(block_hash, db=databases.blocks)
        had_entry = self.txn.delete(block_hash, db=databases.index)
        if entry is not None:
            self.txn.delete(entry.parent, block_hash, db=databases.children)
            self._count(entry, -1)
            self.removed_bytes += entry.value_bytes
        if had_block or had_entry:
            self.removed.append(block_hash)
        return had_block or had_entry

    def _count(self, entry: ColdEntry, sign: int) -> None:
        row = self.namespace(entry.namespace)
        row.blocks += sign
        row.raw_bytes += sign * entry.raw_bytes
        row.stored_bytes += sign * entry.stored_bytes
        row.value_bytes += sign * entry.value_bytes
        row.last_used = max(row.last_used, self.now)


def _padded(record: EncodedRecord) -> Bytes:
    """Return the record's bytes followed by zeros up to its size class, in its own buffer if that is free."""
    size = padded_bytes(record.stored_bytes) - _OVERFLOW_HEADER_BYTES
    buffer = record.buffer
    if buffer.size < size or not buffer.flags.writeable:
        buffer = np.empty(size, dtype=np.uint8)
        buffer[: record.stored_bytes] = record.data
    buffer[record.stored_bytes : size] = 0
    return buffer[:size]
