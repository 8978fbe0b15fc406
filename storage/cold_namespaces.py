"""What the cold store's meta database holds: its version, and a row of totals for each namespace.

Both carry a checksum: a flipped bit there is damage, not another version or another size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache

import msgspec
import xxhash

from tierkv.block import BlockHash
from tierkv.errors import ConfigError, CorruptBlockError, FormatVersionError
from tierkv.namespace import parse_description
from tierkv.storage.cold_entry import ColdEntry
from tierkv.storage.lmdb_env import Database, ReadTransaction

__all__ = [
    "FORMAT_KEY",
    "NAMESPACE_PREFIX",
    "STORE_VERSION",
    "NamespaceRow",
    "add_checksum",
    "check_format",
    "iter_namespaces",
    "lossy_codec_in",
    "pack_row",
    "read_lossy_codec",
    "unpack_row",
]

STORE_VERSION = b"3"
FORMAT_KEY = b"format"
NAMESPACE_PREFIX = b"namespace"
_CHECKSUM_BYTES = 8


class NamespaceRow(msgspec.Struct, array_like=True):
    """What meta keeps of a namespace. `value_bytes` counts padding, and is what the quota bounds."""

    description: bytes = b"{}"
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


def pack_row(row: NamespaceRow) -> bytes:
    """Return a namespace's row as it is stored."""
    return add_checksum(msgspec.msgpack.encode(row))


def unpack_row(packed: bytes | memoryview) -> NamespaceRow:
    """Return a namespace's row. Raises CorruptBlockError."""
    try:
        return msgspec.msgpack.decode(_without_checksum(bytes(packed)), type=NamespaceRow)
    except msgspec.MsgspecError as exc:
        raise CorruptBlockError(f"the row of a namespace is damaged: {exc}") from exc


def iter_namespaces(txn: ReadTransaction, meta: Database) -> Iterator[tuple[BlockHash, NamespaceRow | None]]:
    """Yield every namespace that was ever opened here, with None for a row that is damaged."""
    with txn.cursor(db=meta) as cursor:
        found = cursor.set_range(NAMESPACE_PREFIX)
        while found and bytes(cursor.key()).startswith(NAMESPACE_PREFIX):
            row = None
            with contextlib.suppress(CorruptBlockError):
                row = unpack_row(cursor.value())
            yield bytes(cursor.key())[len(NAMESPACE_PREFIX) :], row
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
