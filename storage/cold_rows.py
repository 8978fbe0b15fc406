"""The small values of the cold store, packed and checked: the entry of each block, the row of each namespace, the
version and the quota; and how they are read within a transaction.

All carry a checksum: a flipped bit there is damage, not another version or another size. An entry is 96 bytes: all that
lookups and eviction need. A million of them are read as one numpy array.
"""

from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.codecs import codec_by_id, codec_by_name
from tierkv.storage.lmdb_env import Database, ReadTransaction
from tierkv.storage.record import BlockInfo, EncodedRecord, read_header
from tierkv.values.block import HASH_BYTES, BlockHash

__all__ = [
    "BLOCKS",
    "ENTRY_BYTES",
    "ENTRY_DTYPE",
    "FORMAT_KEY",
    "MAX_VALUE_BYTES",
    "NAMES",
    "NAMESPACE_PREFIX",
    "NO_DESCRIPTION",
    "OVERFLOW_HEADER_BYTES",
    "QUOTA_KEY",
    "STORE_VERSION",
    "ColdEntry",
    "Databases",
    "EntryParent",
    "EntryTable",
    "NamespaceRow",
    "add_checksum",
    "check_format",
    "checked_value",
    "entry_of",
    "get_entry",
    "get_parent",
    "iter_namespaces",
    "load_rows",
    "map_bytes_of",
    "namespace_rows",
    "pack_entry",
    "pack_quota",
    "pack_row",
    "padded_bytes",
    "read_block_info",
    "read_block_tokens",
    "unpack_entry",
    "unpack_quota",
    "unpack_row",
    "with_history",
]

STORE_VERSION = b"3"
BLOCKS = b"blocks"
NAMES = (b"meta", BLOCKS, b"index", b"children")
FORMAT_KEY = b"format"
QUOTA_KEY = b"quota"
NAMESPACE_PREFIX = b"namespace"
NO_DESCRIPTION = b"{}"
OVERFLOW_HEADER_BYTES = 16  # LMDB's, in front of a value that has pages of its own
_PAGE_BYTES = 4096
_MAX_CLASS_BYTES = 256 << 10
_CHECKSUM_BYTES = 8
_SPARE_MAP_BYTES = 64 << 20
_MAX_TOTAL = 1 << 62

EntryTable: TypeAlias = "npt.NDArray[np.void]"
"""Rows of ENTRY_DTYPE, of which eviction scores are computed."""

ENTRY_DTYPE = np.dtype(
    [
        ("parent", "V16"),
        ("namespace", "V16"),
        ("created", "<f8"),
        ("last_access", "<f8"),
        ("cost_s", "<f8"),
        ("raw_bytes", "<u8"),
        ("stored_bytes", "<u4"),
        ("value_bytes", "<u4"),  # with padding
        ("access_count", "<u4"),
        ("num_tokens", "<u4"),
        ("depth", "<u4"),  # blocks before this one in its chain
        ("codec_id", "<u2"),
        ("pinned", "<u2"),
        ("checksum", "<u8"),  # xxh3-64 of the block hash and all the above
    ]
)
ENTRY_BYTES = ENTRY_DTYPE.itemsize
assert ENTRY_BYTES == 96

_CHECKED = struct.Struct("<16s16sdddQIIIIIHH")
assert _CHECKED.size == ENTRY_BYTES - _CHECKSUM_BYTES
_MAX_COUNT = (1 << 32) - 1
MAX_VALUE_BYTES = _MAX_COUNT  # also LMDB's limit
_MAX_RAW_BYTES = 1 << 40  # so the sums of any number of entries stay within 64 bits
_UNKNOWN = "unknown codec "  # and its id: the entry of a block that another version wrote is kept as it is


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdEntry:
    """One stored block, without its payload. Times are seconds of the store's clock."""

    parent: BlockHash
    namespace: BlockHash
    num_tokens: int
    raw_bytes: int
    stored_bytes: int
    value_bytes: int
    codec: str
    created: float
    last_access: float
    access_count: int
    cost_s: float
    depth: int
    pinned: bool


class EntryParent(NamedTuple):
    """What a lookup compares of a stored block's entry."""

    parent: BlockHash
    num_tokens: int


class NamespaceRow(msgspec.Struct, array_like=True):
    """Description, times and totals of a namespace. value_bytes: with padding; the quota bounds their sum.

    tenant: hex digest of the salt; None where an older version wrote the row. It stays when the description is dropped.
    """

    description: bytes = NO_DESCRIPTION
    created: float = 0.0
    last_used: float = 0.0
    blocks: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    value_bytes: int = 0
    tenant: str | None = None

    def add(self, entry: ColdEntry, sign: int) -> None:
        """Add a block's entry to the totals (1), or subtract it (-1)."""
        self.blocks += sign
        self.raw_bytes += sign * entry.raw_bytes
        self.stored_bytes += sign * entry.stored_bytes
        self.value_bytes += sign * entry.value_bytes


class Databases(NamedTuple):
    """Handles of the four databases, in the order of NAMES. Valid within the transaction that they were taken in.

    meta: version, quota, and a row of each namespace. blocks: block hash -> record, padded to a size class.
    entries (`index` on the disk): block hash -> ColdEntry. children: the children table (cold_children.py).
    """

    meta: Database
    blocks: Database
    entries: Database
    children: Database


def padded_bytes(record_bytes: int) -> int:
    """Return the size class of a record: the bytes its value and LMDB's page header take on the disk.

    Classes are a 24th to a 48th of the size apart, 256 KiB at most: values of one model then have one or two
    sizes, each fits the hole that another left, and LMDB need not search its free list.
    """
    size = record_bytes + OVERFLOW_HEADER_BYTES
    step = 1 << max(size // 24, 1).bit_length() - 1
    step = min(max(step, _PAGE_BYTES), _MAX_CLASS_BYTES)
    return -(-size // step) * step


def map_bytes_of(quota_bytes: int) -> int:
    """Return the address space of a map. With less than a quarter over the quota LMDB fragments until puts fail."""
    size = quota_bytes + quota_bytes // 4 + _SPARE_MAP_BYTES
    return -(-size // (1 << 20)) * (1 << 20)


def entry_of(record: EncodedRecord, *, depth: int, now: float) -> ColdEntry:
    """Return the entry of a record that is stored now for the first time."""
    return ColdEntry(
        parent=record.info.parent,
        namespace=record.info.namespace,
        num_tokens=record.info.num_tokens,
        raw_bytes=record.raw_bytes,
        stored_bytes=record.stored_bytes,
        value_bytes=padded_bytes(record.stored_bytes),
        codec=record.codec,
        created=now,
        last_access=now,
        access_count=0,
        cost_s=record.cost_s if math.isfinite(record.cost_s) else 0.0,
        depth=depth,
        pinned=False,
    )


def with_history(entry: ColdEntry, old: ColdEntry) -> ColdEntry:
    """Return the entry of a block that is stored again, with the times, counts and pin that it had."""
    return replace(
        entry,
        created=old.created,
        last_access=old.last_access,
        access_count=old.access_count,
        cost_s=old.cost_s,
        pinned=old.pinned,
    )


def pack_entry(block_hash: BlockHash, entry: ColdEntry) -> bytes:
    """Return the entry's 96 bytes."""
    is_unknown = entry.codec.startswith(_UNKNOWN)
    checked = _CHECKED.pack(
        entry.parent,
        entry.namespace,
        entry.created,
        entry.last_access,
        entry.cost_s,
        entry.raw_bytes,
        entry.stored_bytes,
        entry.value_bytes,
        min(entry.access_count, _MAX_COUNT),
        entry.num_tokens,
        entry.depth,
        int(entry.codec.removeprefix(_UNKNOWN)) if is_unknown else codec_by_name(entry.codec).codec_id,
        entry.pinned,
    )
    return checked + _entry_checksum(block_hash, checked)


def unpack_entry(block_hash: BlockHash, packed: bytes | memoryview) -> ColdEntry:
    """Return the entry. Raises CorruptBlockError if its bytes have changed."""
    fields = _checked_fields(block_hash, packed)
    parent, namespace, created, last_access, cost_s, raw_bytes = fields[:6]
    stored_bytes, value_bytes, access_count, num_tokens, depth, codec_id, pinned = fields[6:]
    codec = codec_by_id(codec_id)
    return ColdEntry(
        parent=parent,
        namespace=namespace,
        num_tokens=num_tokens,
        raw_bytes=raw_bytes,
        stored_bytes=stored_bytes,
        value_bytes=value_bytes,
        codec=codec.name if codec else f"{_UNKNOWN}{codec_id}",
        created=created,
        last_access=last_access,
        access_count=access_count,
        cost_s=cost_s,
        depth=depth,
        pinned=bool(pinned),
    )


def _checked_fields(block_hash: BlockHash, packed: bytes | memoryview) -> tuple[Any, ...]:
    """Return an entry's fields in the order of the disk. Raises CorruptBlockError if its bytes have changed."""
    packed = bytes(packed)
    checked = packed[: _CHECKED.size]
    if len(packed) != ENTRY_BYTES or packed[_CHECKED.size :] != _entry_checksum(block_hash, checked):
        raise CorruptBlockError(f"the index entry of block {block_hash.hex()} is damaged")
    fields = _CHECKED.unpack(checked)
    _, _, created, last_access, cost_s, raw_bytes, stored_bytes, value_bytes, _, num_tokens, _, _, pinned = fields
    is_sane = (
        math.isfinite(created + last_access + cost_s)
        and num_tokens > 0
        and 0 < stored_bytes <= value_bytes
        and raw_bytes <= _MAX_RAW_BYTES
        and pinned in (0, 1)
    )
    if not is_sane:
        raise CorruptBlockError(f"the index entry of block {block_hash.hex()} has impossible numbers")
    return fields


def pack_row(row: NamespaceRow) -> bytes:
    """Return a namespace's row as it is stored."""
    row.raw_bytes = min(max(row.raw_bytes, 0), _MAX_TOTAL)  # of damaged entries; the other totals are smaller
    return add_checksum(msgspec.msgpack.encode(row))


def unpack_row(packed: bytes | memoryview) -> NamespaceRow:
    """Return a namespace's row. Raises CorruptBlockError."""
    try:
        row = msgspec.msgpack.decode(checked_value(packed), type=NamespaceRow)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise CorruptBlockError(f"the row of a namespace is damaged: {exc}") from exc
    totals = (row.blocks, row.raw_bytes, row.stored_bytes, row.value_bytes)
    if not math.isfinite(row.created + row.last_used) or min(totals) < 0 or max(totals) > _MAX_TOTAL:
        raise CorruptBlockError("the row of a namespace has impossible numbers")
    return row


def pack_quota(quota_bytes: int) -> bytes:
    """Return a store's quota as it is stored."""
    return add_checksum(quota_bytes.to_bytes(8, "little"))


def unpack_quota(packed: bytes | memoryview | None) -> int | None:
    """Return a stored quota; None where none is stored, or a damaged one."""
    try:
        quota_bytes = 0 if packed is None else int.from_bytes(checked_value(packed), "little")
    except CorruptBlockError:
        return None
    return quota_bytes if 0 < quota_bytes <= _MAX_TOTAL else None


def check_format(packed: bytes) -> None:
    """Accept the version of this code's stores. Raises FormatVersionError, CorruptBlockError."""
    has_checksum = not packed.isdigit() or len(packed) >= _CHECKSUM_BYTES  # version 1 had none
    version = checked_value(packed) if has_checksum else packed
    if version != STORE_VERSION:
        raise FormatVersionError(
            f"the cold store has format {version.decode(errors='replace')}, this tierkv reads {STORE_VERSION.decode()}",
            hint="use the version of tierkv that wrote it, or another cold_path",
        )


def add_checksum(value: bytes) -> bytes:
    """Return a value followed by its checksum."""
    return value + xxhash.xxh3_64_digest(value)


def checked_value(packed: bytes | memoryview) -> bytes:
    """Return a value without its checksum. Raises CorruptBlockError if that is another one's."""
    packed = bytes(packed)
    value, checksum = packed[:-_CHECKSUM_BYTES], packed[-_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(value) != checksum:
        raise CorruptBlockError("a row of the store's description is damaged")
    return value


def _entry_checksum(block_hash: BlockHash, checked: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(block_hash + checked).to_bytes(_CHECKSUM_BYTES, "little")


def get_entry(txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> ColdEntry | None:
    """Return a block's entry, or None if it is not stored. Raises CorruptBlockError if it is damaged."""
    packed = txn.get(block_hash, db=databases.entries)
    return None if packed is None else unpack_entry(block_hash, packed)


def get_parent(txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> EntryParent | None:
    """Do as `get_entry`, every check included, but return two fields: it takes half the time."""
    packed = txn.get(block_hash, db=databases.entries)
    if packed is None:
        return None
    fields = _checked_fields(block_hash, packed)
    return EntryParent(fields[0], fields[9])


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


def iter_namespaces(txn: ReadTransaction, databases: Databases) -> Iterator[tuple[BlockHash, NamespaceRow | None]]:
    """Yield every namespace that was ever opened here, with None for a row that is damaged."""
    with txn.cursor(db=databases.meta) as cursor:
        found = cursor.set_range(NAMESPACE_PREFIX)
        while found and (key := bytes(cursor.key())).startswith(NAMESPACE_PREFIX):
            if len(key) == len(NAMESPACE_PREFIX) + HASH_BYTES:
                row = None
                with contextlib.suppress(CorruptBlockError):
                    row = unpack_row(cursor.value())
                yield key[len(NAMESPACE_PREFIX) :], row
            found = cursor.next()


def namespace_rows(txn: ReadTransaction, databases: Databases) -> dict[BlockHash, NamespaceRow]:
    """Return the rows of all namespaces. A damaged row gets its totals from the entries; its description is lost."""
    rows, damaged = load_rows(txn, databases)
    return rows | damaged


def load_rows(
    txn: ReadTransaction, databases: Databases
) -> tuple[dict[BlockHash, NamespaceRow], dict[BlockHash, NamespaceRow]]:
    """Return the sound rows, and new rows with the right totals for the damaged ones."""
    rows: dict[BlockHash, NamespaceRow] = {}
    damaged: dict[BlockHash, NamespaceRow] = {}
    for digest, row in iter_namespaces(txn, databases):
        if row is None:
            damaged[digest] = NamespaceRow()
        else:
            rows[digest] = row
    if damaged:
        with txn.cursor(db=databases.entries) as cursor:
            for key, packed in cursor:
                with contextlib.suppress(CorruptBlockError):
                    entry = unpack_entry(bytes(key), packed)
                    if entry.namespace in damaged:
                        damaged[entry.namespace].add(entry, 1)
    return rows, damaged
