"""The reading half of the cold store: blocks, entries and namespaces, as they are stored now."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError, CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import check_codec
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold_children import ChildrenTable
from tierkv.storage.cold_descriptions import lossy_codec_in, read_lossy_codec, tenant_of_row
from tierkv.storage.cold_pins import iter_pin_ends
from tierkv.storage.cold_rows import (
    BLOCKS,
    NO_DESCRIPTION,
    ColdEntry,
    Databases,
    NamespaceRow,
    get_entry,
    namespace_rows,
    read_block_tokens,
    unpack_entry,
)
from tierkv.storage.cold_tenants import TenantSettings, load_tenants
from tierkv.storage.lmdb_env import LmdbEnv, ReadTransaction
from tierkv.storage.lmdb_file import CutShortError
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import (
    BlockInfo,
    Buffer,
    claimed_info,
    damage_reason,
    decode_record,
    max_record_bytes,
    read_header,
    verify_checksum,
)
from tierkv.storage.record_decoders import RecordDecoders, RecordToDecode
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import parse_description

__all__ = ["ColdReader", "StoredNamespace", "get_value"]

_ENTRIES_PER_SNAPSHOT = 1024
_MAX_NESTING = 100
_LOOK_AGAIN_S = 1.0  # another process may describe a namespace; each look goes through LMDB's map

_logger = logging.getLogger(__name__)


class ColdReader:
    """Reads an open environment of the cold store. Thread-safe; raises StoreError once that is closed or unreadable."""

    is_remote = False

    def __init__(self, env: LmdbEnv) -> None:
        self.path: Path = env.path
        self._env = env
        self._lossy_codecs: dict[BlockHash, str] = {}  # of namespaces whose descriptions have been checked
        self._look_again: dict[BlockHash, float] = {}  # when, at namespaces that have no description yet

    @property
    def _databases(self) -> Databases:
        return Databases(*self._env.handles)

    @property
    def read_only(self) -> bool:
        """Whether nothing may be written through this object."""
        return self._env.read_only

    @property
    def damaged(self) -> Path | None:
        """Where a data file that could not be used was set aside when this store was opened."""
        return self._env.damaged

    def is_shared(self) -> bool:
        """Return whether another process, or another object of this process, has the store open."""
        return self._env.is_shared()

    def unshared(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from opening the store meanwhile. Raises StoreError if one has it open."""
        return self._env.unshared()

    def children(self, parent: BlockHash, *, most: int | None = None) -> list[BlockHash]:
        """Return the hashes of the blocks that follow `parent`; the namespace digest has the first ones."""
        with self._env.read() as txn:
            return list(islice(ChildrenTable(txn, self._databases.children).iter_children(parent), most))

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return (block hash, its token ids, how many of them lead `token_bytes` too) of the child of `parent`
        that shares most leading tokens; None if none shares any. Takes no longer among many children.
        """
        with self._env.read() as txn:
            table = ChildrenTable(txn, self._databases.children)
            return table.find_longest_run(parent, token_bytes, lambda h: read_block_tokens(txn, self._databases, h))

    def read_info(self, block_hash: BlockHash) -> BlockInfo | None:
        """Return a block's identity, as its record claims it; None if it is absent or unreadable.

        By a plain read: what is touched through LMDB's map cannot leave the page cache.
        """
        with self._env.read():
            value = self._env.data.open_value(BLOCKS, block_hash)
            try:
                return None if value is None else claimed_info(value)
            except (CorruptBlockError, FormatVersionError, OSError):
                return None

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a block's token ids as little-endian uint32, or None if it is absent or unreadable."""
        with self._env.read() as txn:
            return read_block_tokens(txn, self._databases, block_hash)

    def decode_blocks(
        self,
        expected: Sequence[BlockInfo],
        outs: Sequence[Buffer],
        *,
        layout: BlockLayout,
        coded: Sequence[CodedBlock | None] | None = None,
        decoders: RecordDecoders | None = None,
    ) -> list[MissReason | None]:
        """Decode blocks of one namespace, each into its own of `outs`. Counts and changes nothing.

        Return for each None, or why it is a miss. Uses the records that plain reads find in one snapshot; one that is
        not right is read once more through LMDB. decoders: decode some of them in place of this thread.
        """
        coded = coded or [None] * len(expected)
        reasons: list[MissReason | None] = []
        again: list[int] = []
        try:
            with self._env.read() as txn:
                lossy_codec = self._lossy_codec_of(txn, expected[0].namespace) if expected else ""
                keys = [info.block_hash for info in expected]
                records = self._env.data.open_values(BLOCKS, keys, max_bytes=max_record_bytes(layout))
                wanted = [
                    RecordToDecode(record, out, info, frames)
                    for record, out, info, frames in zip(records, outs, expected, coded, strict=True)
                ]
                for each, outcome in zip(
                    wanted, _decode_records(wanted, decoders, layout=layout, lossy_codec=lossy_codec), strict=True
                ):
                    if outcome is False:
                        again.append(len(reasons))
                    reasons.append(self._reason_of(outcome, each.expected) if isinstance(outcome, OSError) else None)
        except (StoreError, OSError) as exc:
            reasons += [self._reason_of(exc, info) for info in expected[len(reasons) :]]
        for at in again:
            reasons[at] = self._decode_mapped(expected[at], outs[at], layout=layout, coded=coded[at])
        return reasons

    def _decode_mapped(
        self, expected: BlockInfo, out: Buffer, *, layout: BlockLayout, coded: CodedBlock | None
    ) -> MissReason | None:
        """Decode a block through LMDB's map. Return None, or why it is a miss."""
        try:
            with self._env.read() as txn:
                value = txn.get(expected.block_hash, db=self._databases.blocks)
                if value is None:
                    return MissReason.ABSENT
                lossy_codec = self._lossy_codec_of(txn, expected.namespace)
                return decode_record(value, out, expected=expected, layout=layout, lossy_codec=lossy_codec, coded=coded)
        except (StoreError, OSError) as exc:
            return self._reason_of(exc, expected)

    def _reason_of(self, exc: StoreError | OSError, block: BlockInfo) -> MissReason:
        """Return what kind of miss an error is. Raises it again where the store is closed."""
        if isinstance(exc, CorruptBlockError | FormatVersionError):
            return damage_reason(exc)
        if isinstance(exc, CutShortError):
            return MissReason.TRUNCATED
        if not self._env.is_open:
            raise exc
        _logger.warning("cold store %s: block %s not read: %s", self.path, block.block_hash.hex(), exc)
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

    def pin_ends(self) -> dict[BlockHash, float]:
        """Return when the pins of blocks end, of those that do, in seconds of the store's clock."""
        with self._env.read() as txn:
            return dict(iter_pin_ends(txn, self._databases))

    def tenants(self) -> dict[str, TenantSettings]:
        """Return the settings of each tenant that has any, by the hex sha256 of its salt, "" without one."""
        with self._env.read() as txn:
            return load_tenants(txn, self._databases)

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Ask the system to fetch blocks that will be read soon; returns without them. Raises nothing."""
        with contextlib.suppress(StoreError), self._env.data_file() as data:
            data.fetch_values(BLOCKS, block_hashes)

    def is_in_memory(self, block_hash: BlockHash) -> bool:
        """Return whether reading a block takes no disk; True for a block that cannot be read. Raises nothing."""
        try:
            with self._env.data_file() as data:
                return data.is_in_memory(BLOCKS, block_hash)
        except StoreError:
            return True

    def forget_pages(self, block_hashes: Sequence[BlockHash]) -> None:
        """Ask the system to drop blocks from its page cache, to measure the disk. It writes new ones first."""
        with contextlib.suppress(StoreError), self._env.data_file() as data:
            data.forget_values(BLOCKS, block_hashes)

    def tenant_bytes(self) -> dict[str | None, int]:
        """Return the live bytes of each tenant, by the hex sha256 of its salt; None has those of lost descriptions."""
        with self._env.read() as txn:
            rows = namespace_rows(txn, self._databases)
        found: dict[str | None, int] = {}
        for digest, row in rows.items():
            tenant = tenant_of_row(row, digest)
            found[tenant] = found.get(tenant, 0) + row.value_bytes
        return found

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


def _decode_records(
    wanted: Sequence[RecordToDecode], decoders: RecordDecoders | None, *, layout: BlockLayout, lossy_codec: str
) -> Iterator[bool | OSError]:
    """Decode records of one namespace, in this thread where no other process does it. Yield the outcome of each.

    True, it is the expected block; False, it is not, damaged or missing; OSError, the file was not read.
    """
    outcomes: Sequence[bool | OSError | None] = [None] * len(wanted)
    if decoders is not None:
        outcomes = decoders.decode(wanted, layout=layout, lossy_codec=lossy_codec)
    in_process = contextlib.nullcontext() if decoders is None else decoders.in_process
    for each, outcome in zip(wanted, outcomes, strict=True):
        if outcome is not None:
            yield outcome
            continue
        with in_process:
            found = _decode(each, layout, lossy_codec)
        yield found


def _decode(wanted: RecordToDecode, layout: BlockLayout, lossy_codec: str) -> bool | OSError:
    if wanted.record is None:
        return False
    try:
        reason = decode_record(
            wanted.record,
            wanted.out,
            expected=wanted.expected,
            layout=layout,
            lossy_codec=lossy_codec,
            coded=wanted.coded,
        )
    except (CorruptBlockError, FormatVersionError):
        return False
    except OSError as exc:
        return exc
    return reason is None


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredNamespace:
    """A namespace as the store knows it.

    description: its fields; empty if only its blocks are known, or if it is unreadable, and `problem` says why then.
    raw_description: the bytes that are stored. tenant: hex sha256 of its salt, "" without one; None if that is lost.
    """

    digest: BlockHash
    description: dict[str, Any]
    raw_description: bytes
    problem: str | None
    created: float
    last_used: float
    blocks: int
    raw_bytes: int
    stored_bytes: int
    value_bytes: int
    tenant: str | None

    @classmethod
    def of(cls, digest: BlockHash, row: NamespaceRow) -> StoredNamespace:
        """Return the public form of a row. Raises nothing, whatever the description is."""
        description, problem = _read_description(digest, row.description)
        return cls(
            digest=digest,
            description=description,
            raw_description=row.description,
            problem=problem,
            created=row.created,
            last_used=row.last_used,
            blocks=row.blocks,
            raw_bytes=row.raw_bytes,
            stored_bytes=row.stored_bytes,
            value_bytes=row.value_bytes,
            tenant=tenant_of_row(row, digest),
        )


def _read_description(digest: BlockHash, text: bytes) -> tuple[dict[str, Any], str | None]:
    """Return a description's fields, or its problem. Another version or another program may have written it.

    The values can be shown and written as JSON: characters of a name that cannot be printed are escaped, NaN is a text.
    """
    if text == NO_DESCRIPTION:
        return {}, None
    try:
        with contextlib.suppress(ValueError, RecursionError, AttributeError, TypeError, KeyError):
            fields = json.loads(text)
            name = fields["name"].encode(errors="backslashreplace").decode()
            if name != fields["name"]:
                text = json.dumps({**fields, "name": name}).encode()
        description = parse_description(text)
        if description.digest != digest:
            return {}, "its description is that of another namespace"
        if not _is_flat(description.fields):
            return {}, "its description is unreadable: it is nested too deeply"
        shown: dict[str, Any] = json.loads(text, parse_constant=str)
        shown["name"] = "".join(map(_printable, description.name))
    except ConfigError as exc:
        return {}, f"its description is unreadable: {exc}"
    return shown, None


def _printable(character: str) -> str:
    """Return a character, or its escape in Python: a terminal would obey some control characters."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _is_flat(value: object) -> bool:
    """Return whether JSON values are nested no deeper than every function here can follow."""
    level: list[Any] = [value]
    for _ in range(_MAX_NESTING):
        level = [each for parent in level for each in (parent.values() if isinstance(parent, dict) else parent)]
        level = [each for each in level if isinstance(each, dict | list)]
        if not level:
            return True
    return False
