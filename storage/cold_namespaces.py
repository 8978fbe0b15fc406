"""What the cold store's meta database holds: its version, its quota, and a row of totals for each namespace.

All carry a checksum: a flipped bit there is damage, not another version or another size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import lru_cache

import msgspec
import xxhash

from tierkv.errors import ConfigError, CorruptBlockError, FormatVersionError
from tierkv.storage.cold_entry import ColdEntry
from tierkv.storage.lmdb_env import Database, ReadTransaction
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.namespace import parse_description

__all__ = [
    "FORMAT_KEY",
    "MAX_UNUSED",
    "NAMESPACE_PREFIX",
    "NO_DESCRIPTION",
    "QUOTA_KEY",
    "STORE_VERSION",
    "NamespaceRow",
    "add_checksum",
    "check_format",
    "descriptions_limit",
    "iter_namespaces",
    "lossy_codec_in",
    "pack_quota",
    "pack_row",
    "read_lossy_codec",
    "unpack_quota",
    "unpack_row",
]

STORE_VERSION = b"3"
FORMAT_KEY = b"format"
QUOTA_KEY = b"quota"
NAMESPACE_PREFIX = b"namespace"
NO_DESCRIPTION = b"{}"
MAX_UNUSED = 1024  # namespaces without a block that are remembered
_CHECKSUM_BYTES = 8
_MAX_TOTAL = 1 << 62


def descriptions_limit(quota_bytes: int) -> int:
    """Return how many bytes all descriptions may have together: a share of the quota, 4 MiB at most."""
    return min(4 << 20, max(64 << 10, quota_bytes // 16))


class NamespaceRow(msgspec.Struct, array_like=True):
    """What meta keeps of a namespace. `value_bytes` counts padding, and is what the quota bounds."""

    description: bytes = NO_DESCRIPTION
    created: float = 0.0
    last_used: float = 0.0
    blocks: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    value_bytes: int = 0

    def add(self, entry: ColdEntry, sign: int) -> None:
        """Count a block's entry in (1) or out (-1)."""
        self.blocks += sign
        self.raw_bytes += sign * entry.raw_bytes
        self.stored_bytes += sign * entry.stored_bytes
        self.value_bytes += sign * entry.value_bytes


def add_checksum(value: bytes) -> bytes:
    """Return a value followed by its checksum."""
    return value + xxhash.xxh3_64_digest(value)


def check_format(packed: bytes) -> None:
    """Accept the version of this code's stores. Raises FormatVersionError, CorruptBlockError."""
    version = (
        packed if packed.isdigit() and len(packed) < _CHECKSUM_BYTES else _without_checksum(packed)
    )  # 1 had no checksum
    if version != STORE_VERSION:
        raise FormatVersionError(
            f"the cold store has format {version.decode(errors='replace')}, this tierkv reads {STORE_VERSION.decode()}",
            hint="use the version of tierkv that wrote it, or another cold_path",
        )


def pack_quota(quota_bytes: int) -> bytes:
    """Return a store's quota as it is stored."""
    return add_checksum(quota_bytes.to_bytes(8, "little"))


def unpack_quota(packed: bytes | memoryview | None) -> int | None:
    """Return a stored quota; None where there is none, or a damaged one."""
    try:
        quota_bytes = 0 if packed is None else int.from_bytes(_without_checksum(bytes(packed)), "little")
    except CorruptBlockError:
        return None
    return quota_bytes if 0 < quota_bytes <= _MAX_TOTAL else None


def pack_row(row: NamespaceRow) -> bytes:
    """Return a namespace's row as it is stored."""
    row.raw_bytes = min(max(row.raw_bytes, 0), _MAX_TOTAL)  # of damaged entries; the other totals are smaller
    return add_checksum(msgspec.msgpack.encode(row))


def unpack_row(packed: bytes | memoryview) -> NamespaceRow:
    """Return a namespace's row. Raises CorruptBlockError."""
    try:
        row = msgspec.msgpack.decode(_without_checksum(bytes(packed)), type=NamespaceRow)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise CorruptBlockError(f"the row of a namespace is damaged: {exc}") from exc
    totals = (row.blocks, row.raw_bytes, row.stored_bytes, row.value_bytes)
    if not math.isfinite(row.created + row.last_used) or min(totals) < 0 or max(totals) > _MAX_TOTAL:
        raise CorruptBlockError("the row of a namespace has impossible numbers")
    return row


def iter_namespaces(txn: ReadTransaction, meta: Database) -> Iterator[tuple[BlockHash, NamespaceRow | None]]:
    """Yield every namespace that was ever opened here, with None for a row that is damaged."""
    with txn.cursor(db=meta) as cursor:
        found = cursor.set_range(NAMESPACE_PREFIX)
        while found and (key := bytes(cursor.key())).startswith(NAMESPACE_PREFIX):
            if len(key) == len(NAMESPACE_PREFIX) + HASH_BYTES:
                row = None
                with contextlib.suppress(CorruptBlockError):
                    row = unpack_row(cursor.value())
                yield key[len(NAMESPACE_PREFIX) :], row
            found = cursor.next()


@lru_cache(maxsize=64)
def lossy_codec_in(description: bytes, digest: BlockHash) -> str | None:
    """Return the lossy codec that a namespace's description names, "" for an exact one.

    None where it is unknown: the description is lost, or it is not the one that the digest was computed of.
    """
    try:
        parsed = parse_description(description)
    except ConfigError:
        return None
    return parsed.lossy_codec if parsed.digest == digest else None


def read_lossy_codec(txn: ReadTransaction, meta: Database, digest: BlockHash) -> str | None:
    """Return what `lossy_codec_in` says of a stored namespace; None also where it is not stored."""
    packed = txn.get(NAMESPACE_PREFIX + digest, db=meta)
    try:
        return None if packed is None else lossy_codec_in(unpack_row(packed).description, digest)
    except CorruptBlockError:
        return None


def _without_checksum(packed: bytes) -> bytes:
    value, checksum = packed[:-_CHECKSUM_BYTES], packed[-_CHECKSUM_BYTES:]
    if xxhash.xxh3_64_digest(value) != checksum:
        raise CorruptBlockError("a row of the store's description is damaged")
    return value
