"""The reading half of the cold store: what changes nothing, from one snapshot or from one after another."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.codecs import check_codec
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold_batch import Databases, Handles, get_entry, get_value, namespace_rows, read_block_tokens
from tierkv.storage.cold_entry import ColdEntry
from tierkv.storage.cold_links import Links
from tierkv.storage.cold_namespaces import lossy_codec_in, read_lossy_codec
from tierkv.storage.cold_stats import StoredNamespace
from tierkv.storage.lmdb_data import CutShortError
from tierkv.storage.lmdb_env import LmdbEnv, ReadTransaction
from tierkv.storage.outcomes import MissReason
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

__all__ = ["ColdReader"]

_ENTRIES_PER_SNAPSHOT = 1024
_LOOK_AGAIN_S = 1.0  # another process may describe a namespace; each look goes through LMDB's map

_logger = logging.getLogger(__name__)


class ColdReader:
    """Reads an open environment of the cold store. Thread-safe; raises StoreError once that is closed or unreadable."""

    def __init__(self, env: LmdbEnv) -> None:
        self.path = env.path
        self._env = env
        self._handles = Handles(env)
        self._lossy_codecs: dict[BlockHash, str] = {}  # of namespaces whose descriptions have been checked
        self._look_again: dict[BlockHash, float] = {}  # when, at namespaces that nobody has described

    @property
    def _databases(self) -> Databases:
        return self._handles.now

    def children(self, parent: BlockHash) -> list[BlockHash]:
        """Return the hashes of the blocks that follow `parent`; the namespace digest has the first ones."""
        with self._env.read() as txn:
            return list(Links(txn, self._databases.children).iter_children(parent))

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return (block hash, its token ids, how many of them lead `token_bytes` too) of the child of `parent`
        that shares most leading tokens; None if none shares any. Takes no longer among many children.
        """
        with self._env.read() as txn:
            links = Links(txn, self._databases.children)
            return links.find_longest_run(parent, token_bytes, lambda h: read_block_tokens(txn, self._databases, h))

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a block's token ids as little-endian uint32, or None if it is absent or unreadable."""
        with self._env.read() as txn:
            return read_block_tokens(txn, self._databases, block_hash)

    def decode_block(
        self, expected: BlockInfo, out: Buffer, *, layout: BlockLayout, coded: CodedBlock | None = None
    ) -> MissReason | None:
        """Decode a block into `out`; return None, or why it is a miss. Counts and changes nothing.

        Takes what plain reads find if it is right; of anything else, LMDB says what it is.
        """
        decode = partial(decode_record, out=out, expected=expected, layout=layout, coded=coded)
        try:
            with self._env.read() as txn, contextlib.suppress(CorruptBlockError, FormatVersionError):
                record = self._env.open_value(
                    self._databases.blocks_name, expected.block_hash, max_bytes=max_record_bytes(layout)
                )
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
        """Note what a namespace's description says of its codec, if it is the one that the digest was computed of."""
        lossy_codec = lossy_codec_in(description, digest)
        if lossy_codec is not None:
            self._lossy_codecs[digest] = lossy_codec

    def _lossy_codec_of(self, txn: ReadTransaction, digest: BlockHash) -> str:
        """Return the lossy codec that a namespace names. One that is not described counts as exact."""
        known = self._lossy_codecs.get(digest)
        if known is not None:
            return known
        now = time.monotonic()
        if now < self._look_again.get(digest, now):
            return ""
        found = read_lossy_codec(txn, self._databases.meta, digest)
        if found is None:
            self._look_again[digest] = now + _LOOK_AGAIN_S
            return ""
        self._lossy_codecs[digest] = found
        return found

    def _entry_or_none(self, txn: ReadTransaction, block_hash: BlockHash) -> ColdEntry | None:
        try:
            return get_entry(txn, self._databases, block_hash)
        except CorruptBlockError:
            return None

    def _entries_after(self, after: BlockHash) -> tuple[BlockHash | None, list[tuple[BlockHash, ColdEntry]]]:
        """Return the last key looked at (None at the end) and the sound entries that follow `after`."""
        found: list[tuple[BlockHash, ColdEntry]] = []
        last: BlockHash | None = None
        with self._env.read() as txn, txn.cursor(db=self._databases.index) as cursor:
            more = cursor.set_range(after)
            if more and bytes(cursor.key()) == after:
                more = cursor.next()
            for _ in range(_ENTRIES_PER_SNAPSHOT if more else 0):
                last = bytes(cursor.key())
                entry = self._entry_or_none(txn, last)
                if entry is not None:
                    found.append((last, entry))
                if not cursor.next():
                    break
        return last, found
