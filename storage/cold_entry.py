"""The small record that the cold store keeps beside each block: all that lookups and eviction need.

It is 96 bytes, has its own checksum, and a million of them are read as one numpy array.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.errors import CorruptBlockError
from tierkv.storage.codecs import codec_by_id, codec_by_name
from tierkv.storage.record import EncodedRecord
from tierkv.values.block import BlockHash

__all__ = [
    "ENTRY_BYTES",
    "ENTRY_DTYPE",
    "MAX_VALUE_BYTES",
    "ColdEntry",
    "EntryTable",
    "entry_of",
    "pack_entry",
    "unpack_entry",
]

EntryTable: TypeAlias = "npt.NDArray[np.void]"
"""Rows of ENTRY_DTYPE: what a victim order looks at."""

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
assert _CHECKED.size == ENTRY_BYTES - 8
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


def entry_of(record: EncodedRecord, *, value_bytes: int, depth: int, now: float) -> ColdEntry:
    """Return the entry of a record that is stored now for the first time."""
    return ColdEntry(
        parent=record.info.parent,
        namespace=record.info.namespace,
        num_tokens=record.info.num_tokens,
        raw_bytes=record.raw_bytes,
        stored_bytes=record.stored_bytes,
        value_bytes=value_bytes,
        codec=record.codec,
        created=now,
        last_access=now,
        access_count=0,
        cost_s=record.cost_s if math.isfinite(record.cost_s) else 0.0,
        depth=depth,
        pinned=False,
    )


def pack_entry(block_hash: BlockHash, entry: ColdEntry) -> bytes:
    """Return the entry's 96 bytes."""
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
        _codec_id(entry.codec),
        entry.pinned,
    )
    return checked + _checksum(block_hash, checked)


def unpack_entry(block_hash: BlockHash, packed: bytes | memoryview) -> ColdEntry:
    """Return the entry. Raises CorruptBlockError if its bytes are not what was packed."""
    packed = bytes(packed)
    checked = packed[: _CHECKED.size]
    if len(packed) != ENTRY_BYTES or packed[_CHECKED.size :] != _checksum(block_hash, checked):
        raise CorruptBlockError(f"the index entry of block {block_hash.hex()} is damaged")
    fields = _CHECKED.unpack(checked)
    parent, namespace, created, last_access, cost_s, raw_bytes = fields[:6]
    stored_bytes, value_bytes, access_count, num_tokens, depth, codec_id, pinned = fields[6:]
    is_sane = (
        math.isfinite(created + last_access + cost_s)
        and num_tokens > 0
        and 0 < stored_bytes <= value_bytes
        and raw_bytes <= _MAX_RAW_BYTES
        and pinned in (0, 1)
    )
    if not is_sane:
        raise CorruptBlockError(f"the index entry of block {block_hash.hex()} has impossible numbers")
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


def _codec_id(name: str) -> int:
    return int(name.removeprefix(_UNKNOWN)) if name.startswith(_UNKNOWN) else codec_by_name(name).codec_id


def _checksum(block_hash: BlockHash, checked: bytes) -> bytes:
    return xxhash.xxh3_64_intdigest(block_hash + checked).to_bytes(8, "little")
