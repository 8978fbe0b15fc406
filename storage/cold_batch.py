"""Everything one write transaction does to the cold store, so that its databases always agree.

meta      version; description, times and totals of each namespace (cold_namespaces.py)
blocks    block hash -> record, padded to a size class
index     block hash -> ColdEntry
children  which stored blocks follow a block, or begin a namespace's chains (cold_links.py)

The two rules that keep a forged hash harmless: a block is stored only behind the parent that its content digest was
made of,
and never stays when its parent goes. A chain is followed by hash, so whoever could put another block in a parent's
place would change what its children mean. (Who reads a block compares its content digest once more.)
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import lmdb
import numpy as np

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.codecs import fits_namespace
from tierkv.storage.cold_entry import MAX_VALUE_BYTES, ColdEntry, entry_of, pack_entry, unpack_entry
from tierkv.storage.cold_links import Link, Links
from tierkv.storage.cold_namespaces import (
    MAX_UNUSED,
    NAMESPACE_PREFIX,
    NO_DESCRIPTION,
    QUOTA_KEY,
    NamespaceRow,
    descriptions_limit,
    iter_namespaces,
    lossy_codec_in,
    pack_quota,
    pack_row,
    unpack_quota,
)
from tierkv.storage.lmdb_env import Database, DatabaseSpec, LmdbEnv, ReadTransaction, WriteTransaction
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.planes import Bytes
from tierkv.storage.record import BlockInfo, EncodedRecord, mismatch, parse_record, read_header
from tierkv.values.block import BlockHash

__all__ = [
    "OVERFLOW_HEADER_BYTES",
    "SPECS",
    "DamagedPagesError",
    "Databases",
    "Handles",
    "WriteBatch",
    "get_entry",
    "get_value",
    "namespace_rows",
    "padded_bytes",
    "read_block_info",
    "read_block_tokens",
]

SPECS = (
    DatabaseSpec(name=b"meta"),
    DatabaseSpec(name=b"blocks"),
    DatabaseSpec(name=b"index"),
    DatabaseSpec(name=b"children"),
)
_PAGE_BYTES = 4096
_MAX_CLASS_BYTES = 256 << 10
OVERFLOW_HEADER_BYTES = 16


class DamagedPagesError(StoreError):
    """LMDB refused the pages of a block. They have been mended: the same transaction, tried again, will pass."""


@dataclass(frozen=True, slots=True)
class Databases:
    """Handles of the four databases."""

    meta: Database
    blocks: Database
    index: Database
    children: Database

    blocks_name: ClassVar[bytes] = b"blocks"

    @classmethod
    def of(cls, env: LmdbEnv) -> Databases:
        """Return the handles of an environment opened with SPECS."""
        return cls(*(env.database(spec.name) for spec in SPECS))


class Handles:
    """The handles of the databases as they are now: a compaction opens the data file again, and makes new ones."""

    def __init__(self, env: LmdbEnv) -> None:
        self._env = env
        self._known = env.generation, Databases.of(env)

    @property
    def now(self) -> Databases:
        """The handles of the open data file. To be asked within a transaction, which no compaction interrupts."""
        generation, databases = self._known
        if generation != self._env.generation:
            self._known = _, databases = self._env.generation, Databases.of(self._env)
        return databases


def padded_bytes(record_bytes: int) -> int:
    """Return the size class of a record: the bytes its value and LMDB's page header take on the disk.

    Classes are a 24th to a 48th of the size apart, 256 KiB at most: values of one model then have one or two
    sizes, each fits the hole that another left, and LMDB need not search its free list.
    """
    size = record_bytes + OVERFLOW_HEADER_BYTES
    step = 1 << max(size // 24, 1).bit_length() - 1
    step = min(max(step, _PAGE_BYTES), _MAX_CLASS_BYTES)
    return -(-size // step) * step


def get_entry(txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> ColdEntry | None:
    """Return a block's entry, or None if it is not stored. Raises CorruptBlockError if it is damaged."""
    packed = txn.get(block_hash, db=databases.index)
    return None if packed is None else unpack_entry(block_hash, packed)


def get_value(
    env: LmdbEnv, txn: ReadTransaction, databases: Databases, block_hash: BlockHash
) -> Bytes | memoryview | None:
    """Return a block's value, read around the map where its entry tells how long it is. Valid within the transaction.

    A longer value than that is not read so: its length may be a flipped bit's.
    """
    try:
        entry = get_entry(txn, databases, block_hash)
    except CorruptBlockError:
        entry = None
    value = env.read_value(databases.blocks_name, block_hash, max_bytes=entry.value_bytes) if entry else None
    return txn.get(block_hash, db=databases.blocks) if value is None else value


def namespace_rows(txn: ReadTransaction, databases: Databases) -> dict[BlockHash, NamespaceRow]:
    """Return the rows of all namespaces. Of a damaged one the totals are summed up anew, the description is lost."""
    rows, damaged = _load_rows(txn, databases)
    return rows | damaged


def _load_rows(
    txn: ReadTransaction, databases: Databases
) -> tuple[dict[BlockHash, NamespaceRow], dict[BlockHash, NamespaceRow]]:
    """Return the rows that are sound, and what the others must be."""
    rows: dict[BlockHash, NamespaceRow] = {}
    damaged: dict[BlockHash, NamespaceRow] = {}
    for digest, row in iter_namespaces(txn, databases.meta):
        if row is None:
            damaged[digest] = NamespaceRow()
        else:
            rows[digest] = row
    if damaged:
        with txn.cursor(db=databases.index) as cursor:
            for key, packed in cursor:
                with contextlib.suppress(CorruptBlockError):
                    entry = unpack_entry(bytes(key), packed)
                    if entry.namespace in damaged:
                        damaged[entry.namespace].add(entry, 1)
    return rows, damaged


def read_block_info(txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> BlockInfo | None:
    """Return a stored block's identity, or None if it is absent or its header unreadable. Compares no checksum."""
    value = txn.get(block_hash, db=databases.blocks)
    try:
        return None if value is None else read_header(value).info
    except StoreError:
        return None


def read_block_tokens(txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> bytes | None:
    """Return a stored block's token ids, or None if it is absent or its header unreadable."""
    info = read_block_info(txn, databases, block_hash)
    return info.token_bytes if info else None


@dataclass(slots=True)
class WriteBatch:
    """Changes within one write transaction. Counters are to be believed only once it has committed."""

    env: LmdbEnv
    txn: WriteTransaction
    databases: Databases
    now: float
    removed: list[BlockHash] = field(default_factory=list)
    removed_bytes: int = 0
    _new: set[BlockHash] = field(default_factory=set)
    _rows: dict[BlockHash, NamespaceRow] = field(init=False)
    _rows_before: dict[BlockHash, NamespaceRow] = field(init=False)
    _links: Links = field(init=False)
    _registered: set[BlockHash] = field(default_factory=set)

    def __post_init__(self) -> None:
        sound, damaged = _load_rows(self.txn, self.databases)
        self._rows = sound | damaged
        self._rows_before = {digest: copy.copy(row) for digest, row in sound.items()}
        self._links = Links(self.txn, self.databases.children)

    @property
    def quota_bytes(self) -> int | None:
        """The store's quota; None where none is stored, or a damaged one."""
        return unpack_quota(self.txn.get(QUOTA_KEY, db=self.databases.meta))

    def set_quota(self, quota_bytes: int) -> None:
        """Store a quota, for whoever has the store open and for all later ones."""
        self.txn.put(QUOTA_KEY, pack_quota(quota_bytes), db=self.databases.meta)

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
        return any(self._follows(child, block_hash) for child in self._links.iter_children(block_hash))

    def children(self, block_hash: BlockHash) -> Iterator[BlockHash]:
        """Yield the stored blocks that follow this one."""
        return (child for child in self._links.iter_children(block_hash) if self._follows(child, block_hash))

    def insert(self, record: EncodedRecord) -> PutOutcome:
        """Store a block, its entry and its place in the tree. Replace a damaged one; one of another format stays."""
        info = record.info
        present = self._value(info.block_hash)
        if present is not None:
            try:
                header = read_header(present)
                same = mismatch(header.info, info) is None
                if not same:
                    return PutOutcome.COLLISION
                if self.entry(info.block_hash) is not None and self._may_have(info.namespace, header.codec.name):
                    return PutOutcome.EXISTS
            except FormatVersionError:
                return PutOutcome.FORMAT
            except StoreError:
                pass
            self.remove_subtree(info.block_hash)
        entry = self._entry_of(record)
        if entry is None or not self._is_behind_its_parent(info):
            return PutOutcome.NO_PARENT
        if entry.value_bytes > MAX_VALUE_BYTES:
            return PutOutcome.FULL
        self.txn.put(info.block_hash, _padded(record).data, db=self.databases.blocks)
        self._new.add(info.block_hash)
        self.write_entry(info.block_hash, entry)
        self._links.insert(info.parent, info.token_bytes, info.block_hash, self._read_tokens)
        self._count(entry, 1)
        return PutOutcome.STORED

    def mend_entry(self, block_hash: BlockHash) -> ColdEntry | None:
        """Make the damaged entry of a sound block anew; return it, or None if the block is no better.

        Times, counts and a pin are lost.
        """
        value = self._value(block_hash)
        if value is None or self.entry(block_hash) is not None:
            return self.entry(block_hash)
        try:
            record = parse_record(value)
        except StoreError:
            return None
        if record.info.block_hash != block_hash or not self._is_behind_its_parent(record.info):
            return None
        entry = self._entry_of(record)
        if entry is not None:
            self.write_entry(block_hash, entry)
        return entry

    def settle(self, block_hash: BlockHash) -> int:
        """Do what a block needs that a reader found damaged: nothing if it is sound, or of a format that this code does
        not know; a new entry if that was the damage; else it goes with all that follow it. Return how many went.
        """
        value = self._value(block_hash)
        try:
            record = None if value is None else parse_record(value)
        except FormatVersionError:
            return 0
        except StoreError:
            record = None
        info = record.info if record and self._may_have(record.info.namespace, record.codec) else None
        if info is not None and info.block_hash == block_hash and self.mend_entry(block_hash) is not None:
            return 0
        return self.remove_subtree(block_hash)

    def rebuild_tree(self) -> None:
        """Make the children's links and the namespaces' totals anew from entries and blocks.

        Links to blocks of another format are kept: nobody here can read their tokens.
        """
        with self.txn.cursor(db=self.databases.children) as cursor:
            links = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
        links = [link for link in links if self._is_link_to_another_format(link)]
        self.txn.drop(self.databases.children, delete=False)
        for link in links:
            self.txn.put(link, b"", db=self.databases.children)
        for row in self._rows.values():
            row.blocks = row.raw_bytes = row.stored_bytes = row.value_bytes = 0
        with self.txn.cursor(db=self.databases.index) as cursor:
            hashes = [bytes(key) for key in cursor.iternext(keys=True, values=False)]
        for block_hash in hashes:
            entry, tokens = self.entry(block_hash), self._read_tokens(block_hash)
            if entry is not None and tokens is not None:
                self._links.insert(entry.parent, tokens, block_hash, self._read_tokens)
            if entry is not None and (tokens is not None or self._is_of_another_format(block_hash)):
                self._count(entry, 1)
        self._correct_depths(hashes)

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
        """Remove a block and all that follow it; return how many there were. Visits each block once, and none that
        only a wrong link leads to.
        """
        order = {block_hash: None}
        pending = [block_hash]
        while pending:
            parent = pending.pop()
            for child in self._links.iter_children(parent):
                if child not in order and self._follows(child, parent):
                    order[child] = None
                    pending.append(child)
        return sum(self._remove(each) for each in reversed(order))

    def namespace(self, digest: BlockHash) -> NamespaceRow:
        """Return the row of a namespace, to be changed in place; created where it is missing."""
        return self._rows.setdefault(digest, NamespaceRow(created=self.now, last_used=self.now))

    def register(self, digest: BlockHash, description: bytes) -> None:
        """Note that a namespace is in use, and what it is."""
        row = self.namespace(digest)
        row.description = description
        row.last_used = self.now
        self._registered.add(digest)

    def finish(self) -> None:
        """Write the namespaces' rows that have changed. To be called last."""
        if self._registered:
            self._bound_descriptions()
        for digest, row in self._rows.items():
            if row != self._rows_before.get(digest):
                self.txn.put(NAMESPACE_PREFIX + digest, pack_row(row), db=self.databases.meta)

    def _bound_descriptions(self) -> None:
        """Drop namespaces that have no block, the longest unused first, as far as the limits ask for it. Where that is
        not enough, the oldest others keep their blocks and lose their description, until they are opened again.
        """
        limit = descriptions_limit(self.quota_bytes or 0)
        by_age = sorted(self._rows.keys() - self._registered, key=lambda digest: self._rows[digest].last_used)
        unused = [digest for digest in by_age if not self._rows[digest].blocks]
        size = sum(len(row.description) for row in self._rows.values())
        for number, digest in enumerate(unused):
            if size <= limit and len(unused) - number <= MAX_UNUSED:
                break
            size -= len(self._rows.pop(digest).description)
            self.txn.delete(NAMESPACE_PREFIX + digest, db=self.databases.meta)
        for digest in by_age:
            if size <= limit:
                break
            if digest in self._rows:
                size -= len(self._rows[digest].description) - len(NO_DESCRIPTION)
                self._rows[digest].description = NO_DESCRIPTION

    def _follows(self, child: BlockHash, parent: BlockHash) -> bool:
        """Tell whether a listed child is stored behind `parent`: its link may be wrong. True if nothing else tells."""
        entry = self.entry(child)
        if entry is not None:
            return entry.parent == parent
        info = read_block_info(self.txn, self.databases, child)
        if info is not None:
            return info.parent == parent
        return any(self.txn.get(child, db=each) is not None for each in (self.databases.index, self.databases.blocks))

    def _remove(self, block_hash: BlockHash) -> bool:
        databases = self.databases
        entry = self.entry(block_hash)
        value = self._value(block_hash)
        tokens = None
        if value is not None:
            with contextlib.suppress(StoreError):
                header = read_header(value)
                tokens = header.info.token_bytes
                entry = entry or self._entry_of(parse_record(value))
            if block_hash not in self._new:  # what is new in this transaction is not in the file yet
                self.env.mend_value(databases.blocks_name, block_hash, value)
        had_block = self.txn.delete(block_hash, db=databases.blocks)
        had_entry = self.txn.delete(block_hash, db=databases.index)
        if entry is not None:
            if tokens is None or not self._links.remove_known(entry.parent, tokens, block_hash):
                self._links.remove(entry.parent, block_hash)
            self._count(entry, -1)
            self.removed_bytes += entry.value_bytes
        self._links.remove_all(block_hash)  # those that are left are wrong: its children went before it
        if had_block or had_entry:
            self.removed.append(block_hash)
        return had_block or had_entry

    def _may_have(self, namespace: BlockHash, codec: str) -> bool:
        """Tell whether records of a codec fit a namespace; True where the namespace is not described."""
        row = self._rows.get(namespace)
        lossy_codec = lossy_codec_in(row.description, namespace) if row else None
        return lossy_codec is None or fits_namespace(codec, lossy_codec)

    def _value(self, block_hash: BlockHash) -> memoryview | None:
        """Return a block's value. Where LMDB finds a wrong page in its place, mend that and raise DamagedPagesError."""
        try:
            return self.txn.get(block_hash, db=self.databases.blocks)
        except lmdb.CorruptedError as exc:
            self.env.mend_value(self.databases.blocks_name, block_hash, None)
            raise DamagedPagesError(f"the pages of block {block_hash.hex()} were damaged", hint="try again") from exc

    def _correct_depths(self, hashes: list[BlockHash]) -> None:
        """Let the entries of these blocks say how many blocks are before each; the chains may be cycles."""
        depths: dict[BlockHash, int] = {}
        for block_hash in hashes:
            chain: dict[BlockHash, ColdEntry] = {}
            at = block_hash
            while at not in depths and at not in chain and (entry := self.entry(at)) is not None:
                chain[at] = entry
                at = entry.parent
            depth = depths.get(at, -1)
            for each, entry in reversed(chain.items()):
                depth += 1
                depths[each] = depth
                if entry.depth != depth:
                    self.write_entry(each, replace(entry, depth=depth))

    def _is_link_to_another_format(self, key: bytes) -> bool:
        """Tell whether a key is a link to a block of another format, at its parent as far as that can be told."""
        try:
            link = Link.unpack(key)
        except CorruptBlockError:
            return False
        entry = self.entry(link.child) if self._is_of_another_format(link.child) else None
        return entry is not None and (link.level > 0 or link.node == entry.parent)

    def _is_of_another_format(self, block_hash: BlockHash) -> bool:
        value = self.txn.get(block_hash, db=self.databases.blocks)
        try:
            return value is not None and read_header(value) is None
        except FormatVersionError:
            return True
        except StoreError:
            return False

    def _read_tokens(self, block_hash: BlockHash) -> bytes | None:
        return read_block_tokens(self.txn, self.databases, block_hash)

    def _entry_of(self, record: EncodedRecord) -> ColdEntry | None:
        """Return the entry of a record as a new one, or None if its parent is not stored."""
        info = record.info
        depth = 0
        if info.parent != info.namespace:
            parent = self.entry(info.parent)
            if parent is None or parent.namespace != info.namespace:
                return None
            depth = parent.depth + 1
        return entry_of(record, value_bytes=padded_bytes(record.stored_bytes), depth=depth, now=self.now)

    def _is_behind_its_parent(self, info: BlockInfo) -> bool:
        """Tell whether the stored parent is the one that the block's content digest was made of."""
        if info.parent == info.namespace:
            return info.follows(None)
        value = self._value(info.parent)
        try:
            return value is not None and info.follows(read_header(value).info)
        except StoreError:
            return False

    def _count(self, entry: ColdEntry, sign: int) -> None:
        row = self.namespace(entry.namespace)
        row.add(entry, sign)
        row.last_used = max(row.last_used, self.now)


def _padded(record: EncodedRecord) -> Bytes:
    """Return the record's bytes followed by zeros up to its size class, in its own buffer if that is free."""
    size = padded_bytes(record.stored_bytes) - OVERFLOW_HEADER_BYTES
    buffer = record.buffer
    if buffer.size < size or not buffer.flags.writeable:
        buffer = np.empty(size, dtype=np.uint8)
        buffer[: record.stored_bytes] = record.data
    buffer[record.stored_bytes : size] = 0
    return buffer[:size]
