"""Reading the cold store: its databases within one transaction, and `ColdReader` over an open environment."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.codecs import check_codec
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold_children import ChildrenTable
from tierkv.storage.cold_rows import (
    NAMESPACE_PREFIX,
    ColdEntry,
    NamespaceRow,
    lossy_codec_in,
    unpack_entry,
    unpack_row,
)
from tierkv.storage.cold_stats import StoredNamespace
from tierkv.storage.lmdb_env import Database, LmdbEnv, ReadTransaction
from tierkv.storage.lmdb_file import CutShortError
from tierkv.storage.outcomes import MissReason
from tierkv.storage.planes import Bytes
from tierkv.storage.record import (
    BlockInfo,
    Buffer,
    TruncatedBlockError,
    decode_record,
    max_record_bytes,
    read_header,
    verify_checksum,
)
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.layout import BlockLayout

__all__ = [
    "BLOCKS",
    "NAMES",
    "ColdReader",
    "Databases",
    "get_entry",
    "get_value",
    "iter_namespaces",
    "load_rows",
    "namespace_rows",
    "read_block_info",
    "read_block_tokens",
    "read_lossy_codec",
]

BLOCKS = b"blocks"
NAMES = (b"meta", BLOCKS, b"index", b"children")

_ENTRIES_PER_SNAPSHOT = 1024
_LOOK_AGAIN_S = 1.0  # another process may describe a namespace; each look goes through LMDB's map

_logger = logging.getLogger(__name__)


class Databases(NamedTuple):
    """Handles of the four databases, in the order of NAMES. Valid within the transaction that they were taken in.

    meta: version, quota, and a row of each namespace. blocks: block hash -> record, padded to a size class.
    entries (`index` on the disk): block hash -> ColdEntry. children: the children table (cold_children.py).
    """

    meta: Database
    blocks: Database
    entries: Database
    children: Database


class ColdReader:
    """Reads an open environment of the cold store. Thread-safe; raises StoreError once that is closed or unreadable."""

    def __init__(self, env: LmdbEnv) -> None:
        self.path: Path = env.path
        self._env = env
        self._lossy_codecs: dict[BlockHash, str] = {}  # of namespaces whose descriptions have been checked
        self._look_again: dict[BlockHash, float] = {}  # when, at namespaces that have no description yet

    @property
    def _databases(self) -> Databases:
        return Databases(*self._env.handles)

    def children(self, parent: BlockHash) -> list[BlockHash]:
        """Return the hashes of the blocks that follow `parent`; the namespace digest has the first ones."""
        with self._env.read() as txn:
            return list(ChildrenTable(txn, self._databases.children).iter_children(parent))

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return (block hash, its token ids, how many of them lead `token_bytes` too) of the child of `parent`
        that shares most leading tokens; None if none shares any. Takes no longer among many children.
        """
        with self._env.read() as txn:
            table = ChildrenTable(txn, self._databases.children)
            return table.find_longest_run(parent, token_bytes, lambda h: read_block_tokens(txn, self._databases, h))

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a block's token ids as little-endian uint32, or None if it is absent or unreadable."""
        with self._env.read() as txn:
            return read_block_tokens(txn, self._databases, block_hash)

    def decode_block(
        self, expected: BlockInfo, out: Buffer, *, layout: BlockLayout, coded: CodedBlock | None = None
    ) -> MissReason | None:
        """Decode a block into `out`; return None, or why it is a miss. Counts and changes nothing.

        Uses the record that plain reads find if it is right; else reads it once more through LMDB.
        """
        decode = partial(decode_record, out=out, expected=expected, layout=layout, coded=coded)
        try:
            with self._env.read() as txn, contextlib.suppress(CorruptBlockError, FormatVersionError):
                record = self._env.data.open_value(BLOCKS, expected.block_hash, max_bytes=max_record_bytes(layout))
                if record is not None:
                    reason = decode(record, lossy_codec=self._lossy_codec_of(txn, expected.namespace))
                    if reason is None:
                        return None
            with self._env.read() as txn:
                value = txn.get(expected.block_hash, db=self._databases.blocks)
                if value is None:
                    return MissReason.ABSENT
                return decode(value, lossy_codec=self._lossy_codec_of(txn, expected.namespace))
        except (TruncatedBlockError, CutShortError):
            return MissReason.TRUNCATED
        except FormatVersionError:
            return MissReason.FORMAT
        except CorruptBlockError:
            return MissReason.CORRUPT
        except (StoreError, OSError) as exc:
            if not self._env.is_open:
                raise
            _logger.warning("cold store %s: block %s not read: %s", self.path, expected.block_hash.hex(), exc)
            return MissReason.IO_ERROR

    def read_record(self, block_hash: BlockHash) -> bytes | None:
        """Return a copy of a block's record, or None if it is absent, damaged or of another format.

        A record whose codec does not fit its namespace is damaged.
        """
        try:
            with self._env.read() as txn:
                value = get_value(self._env, txn, self._databases, block_hash)
                if value is None:
                    return None
                header = read_header(value)
                verify_checksum(value, header)
                check_codec(header.codec.name, self._lossy_codec_of(txn, header.info.namespace))
                return bytes(value[: header.record_bytes])
        except (CorruptBlockError, FormatVersionError):
            return None

    def iter_entries(self, namespace: BlockHash | None = None) -> Iterator[tuple[BlockHash, ColdEntry]]:
        """Yield (block hash, entry) of all blocks, or of one namespace's. Each batch is one snapshot."""
        after: BlockHash | None = bytes(HASH_BYTES)
        while after is not None:
            after, batch = self._entries_after(after)
            for block_hash, entry in batch:
                if namespace is None or entry.namespace == namespace:
                    yield block_hash, entry

    def namespaces(self) -> list[StoredNamespace]:
        """Return every namespace that has been opened here, with its totals."""
        with self._env.read() as txn:
            rows = namespace_rows(txn, self._databases)
        return [StoredNamespace.of(digest, row) for digest, row in rows.items()]

    def _note_namespace(self, digest: BlockHash, description: bytes) -> None:
        """Remember the codec that a namespace's description names, if the digest was computed of that description."""
        lossy_codec = lossy_codec_in(description, digest)
        if lossy_codec is not None:
            self._lossy_codecs[digest] = lossy_codec

    def _lossy_codec_of(self, txn: ReadTransaction, digest: BlockHash) -> str:
        """Return the lossy codec that a namespace names. A namespace without a description counts as exact."""
        known = self._lossy_codecs.get(digest)
        if known is not None:
            return known
        now = time.monotonic()
        if now < self._look_again.get(digest, now):
            return ""
        found = read_lossy_codec(txn, self._databases, digest)
        if found is None:
            self._look_again[digest] = now + _LOOK_AGAIN_S
            return ""
        self._lossy_codecs[digest] = found
        return found

    def _entries_after(self, after: BlockHash) -> tuple[BlockHash | None, list[tuple[BlockHash, ColdEntry]]]:
        """Return the last key looked at (None at the end) and the sound entries that follow `after`."""
        found: list[tuple[BlockHash, ColdEntry]] = []
        last: BlockHash | None = None
        with self._env.read() as txn, txn.cursor(db=self._databases.entries) as cursor:
            more = cursor.set_range(after)
            if more and bytes(cursor.key()) == after:
                more = cursor.next()
            for _ in range(_ENTRIES_PER_SNAPSHOT if more else 0):
                last = bytes(cursor.key())
                with contextlib.suppress(CorruptBlockError):
                    found.append((last, unpack_entry(last, cursor.value())))
                if not cursor.next():
                    break
        return last, found


def get_entry(txn: ReadTransaction, databases: Databases, block_hash: BlockHash) -> ColdEntry | None:
    """Return a block's entry, or None if it is not stored. Raises CorruptBlockError if it is damaged."""
    packed = txn.get(block_hash, db=databases.entries)
    return None if packed is None else unpack_entry(block_hash, packed)


def get_value(
    env: LmdbEnv, txn: ReadTransaction, databases: Databases, block_hash: BlockHash
) -> Bytes | memoryview | None:
    """Return a block's value, by plain reads where its entry gives the value's length. Valid within the transaction.

    A value that is longer than its entry says is not read so: a flipped bit may have changed its length.
    """
    try:
        entry = get_entry(txn, databases, block_hash)
    except CorruptBlockError:
        entry = None
    value = env.data.read_value(BLOCKS, block_hash, max_bytes=entry.value_bytes) if entry else None
    return txn.get(block_hash, db=databases.blocks) if value is None else value


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


def read_lossy_codec(txn: ReadTransaction, databases: Databases, digest: BlockHash) -> str | None:
    """Return the lossy codec of a stored namespace as `lossy_codec_in` does; None also where it is not stored."""
    packed = txn.get(NAMESPACE_PREFIX + digest, db=databases.meta)
    try:
        return None if packed is None else lossy_codec_in(unpack_row(packed).description, digest)
    except CorruptBlockError:
        return None
