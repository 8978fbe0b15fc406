"""Reading a state file: a cache in one file, which `save_cache_state` writes; blocks are read when they are needed.

Layout: a 4 KiB header, the namespace's description, records (the cold tier's own, see FORMAT.md) each
beginning on a 4 KiB border, then the index: one fixed-size row a block, sorted by hash. Opening reads header,
description and index.

The file may come from anywhere. Opening it takes bounded time and memory, and uses the description only if the
namespace's digest is computed of it. A record is checked as in the cold store, and must be the block of its row.

Records are read with `pread`, not through a map: a file that is cut short then costs a miss, where a
map would end the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.errors import ConfigError, CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import (
    HEADER_BYTES,
    BlockInfo,
    EncodedRecord,
    damage_reason,
    decode_record,
    parse_record,
)
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.storage.state_format import (
    ALIGN_BYTES,
    ROW,
    STATE_VERSION,
    StateEntry,
    StateHeader,
    StateIndex,
    records_offset,
)
from tierkv.storage.state_writer import WRITE_WAIT_S, SavedState, write_state_file
from tierkv.values.block import TOKEN_BYTES, BlockHash, common_run
from tierkv.values.files import check_path, open_regular, translated_errors
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import NamespaceDescription, parse_description

__all__ = ["STATE_VERSION", "WRITE_WAIT_S", "FileIdentity", "SavedState", "StateFile", "write_state_file"]

CHILDREN_LIMIT = 4096
"""How many children of a block are compared with a prompt's tokens: each of them takes a read."""


class FileIdentity(NamedTuple):
    """Two open state files with equal identities are the same file, unchanged, whatever their paths are."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    checksum: int


class StateFile:
    """An open state file: a read-only source of blocks below the warm tier. Context manager. Thread-safe.

    Raises StoreError unless there is a regular file, CorruptBlockError where it is not a whole state file,
    FormatVersionError where another version wrote it, ConfigError if `path` is no path.
    """

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path: Path = check_path(path)
        with translated_errors(f"cannot read the state file {self.path}"):
            self.path = self.path.absolute()
            self._file = _OpenFile(open_regular(self.path))
            try:
                with self._file.reading() as fd:
                    assert fd is not None, "it has just been opened"
                    self._read_index(fd)
            except BaseException:
                self.close()
                raise
        self._damaged: set[BlockHash] = set()
        self._memory = ThreadMemory()

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._index)

    def close(self) -> None:
        """Close the file; later reads miss, reads in flight finish. May be called twice."""
        self._file.close()

    def lookup(self, block_hash: BlockHash) -> StateEntry | None:
        """Return a block's small record, or None."""
        if block_hash in self._damaged:
            return None
        row = self._index.find(block_hash)
        return None if row is None else self._index.entry(row)

    def children(self, parent: BlockHash) -> list[BlockHash]:
        """Return the hashes of the stored blocks that continue a block, or begin a chain."""
        return list(self._iter_children(parent))

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a block's token ids as little-endian uint32, or None if they cannot be read. Reads no payload."""
        entry = self.lookup(block_hash)
        with self._file.reading() as fd:
            if entry is None or fd is None:
                return None
            try:
                tokens = os.pread(fd, entry.num_tokens * TOKEN_BYTES, entry.offset + HEADER_BYTES)
            except (OSError, MemoryError):
                return None
            return tokens if len(tokens) == entry.num_tokens * TOKEN_BYTES else None

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return (block hash, its token ids, how many of them lead `token_bytes` too) of the child of `parent`
        that shares most leading tokens; None if none shares any. Looks at CHILDREN_LIMIT children at most.
        """
        best: tuple[BlockHash, bytes, int] | None = None
        for child in islice(self._iter_children(parent), CHILDREN_LIMIT):
            tokens = self.read_tokens(child) or b""
            run = common_run(tokens, token_bytes)
            if run > (best[2] if best else 0):
                best = child, tokens, run
        return best

    def read_record(self, block_hash: BlockHash) -> bytes | None:
        """Return a whole record as it was stored, or None where it is absent, damaged or of another format."""
        entry = self.lookup(block_hash)
        return None if entry is None else self._read_sound(block_hash, entry)

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Ask the system to fetch blocks that will be read soon; returns without them. Raises nothing."""
        for block_hash in block_hashes:
            entry = self.lookup(block_hash)
            with self._file.reading() as fd, contextlib.suppress(OSError):
                if entry is not None and fd is not None:
                    self._open_record(fd, entry).fetch_ahead()

    def is_in_memory(self, block_hash: BlockHash) -> bool:
        """Return whether reading a block takes no disk; True for a block that cannot be read."""
        entry = self.lookup(block_hash)
        with self._file.reading() as fd:
            return entry is None or fd is None or self._open_record(fd, entry).is_in_memory()

    def read_into(
        self,
        expected: BlockInfo,
        out: npt.NDArray[np.uint8],
        *,
        layout: BlockLayout,
        coded: CodedBlock | None = None,
    ) -> MissReason | None:
        """Decode a block into `out`, one block of `layout`. Return None, or why it is a miss. coded: as ColdStore's.

        A record whose codec does not fit the namespace, or that belongs to another namespace than the file, is damage.
        """
        entry = self.lookup(expected.block_hash)
        with self._file.reading() as fd:
            if entry is None or fd is None:
                return MissReason.ABSENT
            try:
                reason = decode_record(
                    self._open_record(fd, entry),
                    out,
                    expected=expected,
                    layout=layout,
                    lossy_codec=self.description.lossy_codec,
                    coded=coded,
                )
            except (CorruptBlockError, FormatVersionError) as exc:
                return damage_reason(exc)
            except (OSError, MemoryError):
                return MissReason.IO_ERROR
        if reason is MissReason.NAMESPACE and expected.namespace == self.namespace:
            return MissReason.CORRUPT
        return reason

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Leave out a damaged block from now on; the file itself is never changed."""
        self._damaged.add(block_hash)

    def iter_records(self, seen: set[BlockHash] | None = None) -> Iterator[bytes]:
        """Yield every sound record once, parents before children.

        seen: hashes of blocks to leave out; the hashes of the yielded blocks are added.
        Raises MemoryError for a record that does not fit into memory.
        """
        seen = set() if seen is None else seen
        for row in self._index.walk(self.namespace):
            block_hash = self._index.key(row)
            if block_hash in seen or block_hash in self._damaged:
                continue
            record = self._read_sound(block_hash, self._index.entry(row))
            if record is not None:
                seen.add(block_hash)
                yield record

    def _iter_children(self, parent: BlockHash) -> Iterator[BlockHash]:
        for row in self._index.children(parent):
            block_hash = self._index.key(row)
            if block_hash not in self._damaged:
                yield block_hash

    def _read_sound(self, block_hash: BlockHash, entry: StateEntry) -> bytes | None:
        """Return the record of a row, or None where it is missing, damaged or of another format."""
        with self._file.reading() as fd:
            try:
                data = b"" if fd is None else os.pread(fd, entry.size, entry.offset)
            except OSError:
                return None
        try:
            record = parse_record(data, lossy_codec=self.description.lossy_codec)
        except StoreError:
            return None
        return data[: record.stored_bytes] if self._is_of_row(record, block_hash, entry) else None

    def _is_of_row(self, record: EncodedRecord, block_hash: BlockHash, entry: StateEntry) -> bool:
        info = record.info
        of_row = (block_hash, entry.parent, self.namespace, entry.num_tokens)
        return (info.block_hash, info.parent, info.namespace, info.num_tokens) == of_row

    def _open_record(self, fd: int, entry: StateEntry) -> FileRecord:
        return FileRecord(fd, offset=entry.offset, size=entry.size, memory=self._memory)

    def _read_index(self, fd: int) -> None:
        status = os.fstat(fd)
        try:
            header = StateHeader.unpack(os.pread(fd, StateHeader.size, 0), actual_bytes=status.st_size)
            description = os.pread(fd, header.description_bytes, ALIGN_BYTES)
            index = os.pread(fd, header.rows * ROW.itemsize, header.index_offset)
            checksum = xxhash.xxh3_64(description)
            checksum.update(index)
            if checksum.intdigest() != header.checksum:
                raise CorruptBlockError("its index is damaged")
            self.description: NamespaceDescription = _parse(description, header.namespace)
            begin = records_offset(header.description_bytes)
            self._index = StateIndex(index, begin=begin, end=header.index_offset, layout=self.description.layout)
        except StoreError as exc:
            raise type(exc)(f"the state file {self.path} cannot be used: {exc}") from exc
        self.namespace: BlockHash = header.namespace
        self.raw_description = description
        self.identity: FileIdentity = FileIdentity(
            status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, header.checksum
        )


class _OpenFile:
    """A descriptor that is closed after `close` and the end of the last read.

    Closed earlier, its number could be another file's when a read begins.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._readers = 0
        self._is_closed = False
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def reading(self) -> Iterator[int | None]:
        """Yield the descriptor for as long as a read lasts; None once the file has been closed."""
        with self._lock:
            fd = None if self._is_closed else self._fd
            self._readers += 1
        try:
            yield fd
        finally:
            with self._lock:
                self._readers -= 1
                self._close_if_unused()

    def close(self) -> None:
        """Let no more reads begin. Waits for none."""
        with self._lock:
            self._is_closed = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._is_closed and not self._readers and self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def _parse(description: bytes, namespace: BlockHash) -> NamespaceDescription:
    """Return the description of a namespace. Raises CorruptBlockError unless the digest is computed of it."""
    try:
        parsed = parse_description(description)
    except ConfigError as exc:
        raise CorruptBlockError(str(exc)) from exc
    if parsed.digest != namespace:
        raise CorruptBlockError("its description is that of another namespace")
    return parsed
