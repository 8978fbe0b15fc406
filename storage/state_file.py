"""A cache in one file: what `save_cache_state` writes and `load_cache_state` reads on demand.

Layout: a 4 KiB header, the namespace's description, records (the cold tier's own, see FORMAT.md) each
beginning on a 4 KiB border, then the index: one fixed-size row a block, sorted by hash. Opening reads header,
description and index; records are read when a block is asked for.

Records are read with `pread`, not through a map: a file that somebody cuts short then costs a miss, where a
map would end the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.block import HASH_BYTES, TOKEN_BYTES, BlockHash, common_run
from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.layout import BlockLayout
from tierkv.storage.coded import CodedBlock
from tierkv.storage.lmdb_file import fetch_ahead
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import HEADER_BYTES, BlockInfo, TruncatedBlockError, decode_record, read_header

__all__ = ["STATE_VERSION", "SavedState", "StateFile", "write_state_file"]

STATE_VERSION = 1
_MAGIC = b"TKVSTATE"
_ALIGN = 4096
_HEADER = struct.Struct(
    "<8sIIQQQQ16sQQ"
)  # magic, version, row bytes, file, description, index, rows, namespace, checksums
_ROW = np.dtype(
    [("key", "S16"), ("parent", "S16"), ("offset", "<u8"), ("size", "<u8"), ("tokens", "<u4"), ("pad", "<u4")]
)
"""One block. Keys are compared as two big-endian integers, because numpy's S16 drops trailing NULs."""


@dataclass(frozen=True, slots=True)
class SavedState:
    """What a save wrote."""

    blocks: int
    file_bytes: int


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A stored block's small record."""

    parent: BlockHash
    num_tokens: int
    offset: int
    size: int


def write_state_file(path: Path, *, namespace: BlockHash, description: bytes, records: Iterable[bytes]) -> SavedState:
    """Write records into one file, atomically: beside the target, synced, then renamed over it.

    Raises StoreError if the file cannot be written; the target is then what it was.
    What a save that was killed has left beside the target goes with the next one.
    """
    path = path.absolute()
    try:
        _remove_remains(path)
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=_temporary_prefix(path))
    except OSError as exc:
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc
    try:
        with os.fdopen(fd, "wb") as file:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as long as this process lives, it is no remains
            state = _write(file, namespace, description, records)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        _sync_directory(path.parent)
        return state
    except OSError as exc:
        raise StoreError(f"cannot write {path}: {exc.strerror}") from exc
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def _temporary_prefix(path: Path) -> str:
    return f".{path.name}."


def _remove_remains(path: Path) -> None:
    """Remove what saves to `path` left behind that were killed; raises OSError."""
    for remains in path.parent.glob(f"{glob.escape(_temporary_prefix(path))}*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), open(remains, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remains.unlink()


def _write(file: BinaryIO, namespace: BlockHash, description: bytes, records: Iterable[bytes]) -> SavedState:
    file.write(b"\0" * _ALIGN)
    file.write(description)
    rows: list[tuple[bytes, bytes, int, int, int, int]] = []
    for record in records:
        info = read_header(record).info
        file.write(b"\0" * (-file.tell() % _ALIGN))
        rows.append((info.block_hash, info.parent, file.tell(), len(record), info.num_tokens, 0))
        file.write(record)
    file.write(b"\0" * (-file.tell() % _ALIGN))
    index_offset = file.tell()
    rows.sort()
    index = np.array(rows, dtype=_ROW).tobytes()
    file.write(index)
    file_bytes = file.tell()
    file.seek(0)
    file.write(
        _pack_header(
            file_bytes,
            len(description),
            index_offset,
            len(rows),
            namespace,
            xxhash.xxh3_64_intdigest(description + index),
        )
    )
    return SavedState(len(rows), file_bytes)


def _pack_header(
    file_bytes: int, description_bytes: int, index_offset: int, rows: int, namespace: BlockHash, checksum: int
) -> bytes:
    values = (
        _MAGIC,
        STATE_VERSION,
        _ROW.itemsize,
        file_bytes,
        description_bytes,
        index_offset,
        rows,
        namespace,
        checksum,
    )
    body = _HEADER.pack(*values, 0)[:-8]
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class StateFile:
    """An open state file: a read-only source of blocks below the warm tier. Context manager.

    Raises StoreError where there is no such file, CorruptBlockError where it is not a whole state file,
    FormatVersionError where another version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd: int | None = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as exc:
            raise StoreError(f"cannot read the state file {path}: {exc.strerror}") from exc
        try:
            self._read_index()
        except OSError as exc:
            self.close()
            raise StoreError(f"cannot read the state file {path}: {exc.strerror}") from exc
        except BaseException:
            self.close()
            raise
        self._damaged: set[BlockHash] = set()

    def __enter__(self) -> StateFile:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._rows)

    def close(self) -> None:
        """Close the file; later reads miss. May be called twice."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def lookup(self, block_hash: BlockHash) -> StateEntry | None:
        """Return a block's small record, or None."""
        if block_hash in self._damaged:
            return None
        at = self._find(block_hash)
        if at is None:
            return None
        row = self._rows[at]
        return StateEntry(self._parent_bytes(at), int(row["tokens"]), int(row["offset"]), int(row["size"]))

    def children(self, parent: BlockHash) -> list[BlockHash]:
        """Return the hashes of the stored blocks that continue a block, or begin a chain."""
        wanted = _as_integer(parent)
        at = int(np.searchsorted(self._parents, wanted))
        found: list[BlockHash] = []
        while at < len(self._by_parent) and self._parents[at] == wanted:
            row = int(self._by_parent[at])
            if self._parent_bytes(row) == parent and self._key_bytes(row) not in self._damaged:
                found.append(self._key_bytes(row))
            at += 1
        return found

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a block's token ids as little-endian uint32, or None if they cannot be read. Reads no payload."""
        entry = self.lookup(block_hash)
        if entry is None or self._fd is None:
            return None
        tokens_at = entry.offset + HEADER_BYTES
        try:
            tokens = os.pread(self._fd, min(entry.num_tokens * TOKEN_BYTES, entry.size), tokens_at)
        except OSError:
            return None
        return tokens if len(tokens) == entry.num_tokens * TOKEN_BYTES else None

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return (block hash, its token ids, how many of them lead `token_bytes` too) of the child of `parent`
        that shares most leading tokens; None if none shares any. Looks at every child.
        """
        best: tuple[BlockHash, bytes, int] | None = None
        for child in self.children(parent):
            tokens = self.read_tokens(child) or b""
            run = common_run(tokens, token_bytes)
            if run > (best[2] if best else 0):
                best = child, tokens, run
        return best

    def read_record(self, block_hash: BlockHash) -> bytes | None:
        """Return a whole record as it was stored, or None where it is absent or cut short."""
        entry = self.lookup(block_hash)
        if entry is None or self._fd is None:
            return None
        try:
            record = os.pread(self._fd, entry.size, entry.offset)
        except OSError:
            return None
        return record if len(record) == entry.size else None

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Ask the system to fetch blocks that will be read soon; returns without them. Raises nothing."""
        for block_hash in block_hashes:
            entry = self.lookup(block_hash)
            if entry is not None and self._fd is not None:
                with contextlib.suppress(OSError):
                    fetch_ahead(self._fd, entry.offset, entry.size)

    def read_into(
        self,
        expected: BlockInfo,
        out: npt.NDArray[np.uint8],
        *,
        layout: BlockLayout,
        coded: CodedBlock | None = None,
    ) -> MissReason | None:
        """Decode a block into `out`, one block of `layout`. Return None, or why it is a miss. coded: as ColdStore's."""
        if self.lookup(expected.block_hash) is None:
            return MissReason.ABSENT
        record = self.read_record(expected.block_hash)
        if record is None:
            return MissReason.TRUNCATED
        try:
            return decode_record(record, out, expected=expected, layout=layout, coded=coded)
        except TruncatedBlockError:
            return MissReason.TRUNCATED
        except StoreError:
            return MissReason.CORRUPT

    def delete(self, block_hash: BlockHash) -> int:
        """Leave out a damaged block from now on; the file itself is never changed."""
        self._damaged.add(block_hash)
        return 1

    def iter_records(self) -> Iterator[bytes]:
        """Yield every readable record, parents before children."""
        stack = self.children(self.namespace)
        while stack:
            block_hash = stack.pop()
            record = self.read_record(block_hash)
            if record is not None:
                yield record
                stack += self.children(block_hash)

    def _read_index(self) -> None:
        assert self._fd is not None
        header = os.pread(self._fd, _HEADER.size, 0)
        if len(header) < _HEADER.size or header[:8] != _MAGIC:
            raise CorruptBlockError(f"{self.path} is not a tierkv state file")
        _, version, row_bytes, file_bytes, text_bytes, index_offset, count, namespace, checksum, own = _HEADER.unpack(
            header
        )
        if version != STATE_VERSION:
            raise FormatVersionError(
                f"{self.path} has state format {version}, this tierkv reads {STATE_VERSION}",
                hint="save it again with this version, or update tierkv",
            )
        actual_bytes = os.fstat(self._fd).st_size
        if xxhash.xxh3_64_intdigest(header[:-8]) != own or row_bytes != _ROW.itemsize:
            raise CorruptBlockError(f"the header of {self.path} is damaged")
        if actual_bytes != file_bytes or index_offset + count * row_bytes != file_bytes or text_bytes > index_offset:
            raise CorruptBlockError(
                f"the state file {self.path} is cut short or damaged: {actual_bytes} of {file_bytes} bytes"
            )
        self.namespace: BlockHash = namespace
        description = os.pread(self._fd, text_bytes, _ALIGN)
        index = os.pread(self._fd, count * row_bytes, index_offset)
        if xxhash.xxh3_64_intdigest(description + index) != checksum:
            raise CorruptBlockError(f"the index of {self.path} is damaged")
        self.description: dict[str, object] = msgspec.json.decode(description)
        self.raw_description = description
        self._rows = np.frombuffer(index, dtype=_ROW)
        raw = np.frombuffer(index, dtype=np.uint8).reshape(count, row_bytes)
        self._keys = _leading_integers(raw[:, :HASH_BYTES])
        parents = _leading_integers(raw[:, HASH_BYTES : 2 * HASH_BYTES])
        self._by_parent = np.argsort(parents, kind="stable")
        self._parents = parents[self._by_parent]
        self._index_bytes = index

    def _find(self, block_hash: BlockHash) -> int | None:
        wanted = _as_integer(block_hash)
        at = int(np.searchsorted(self._keys, wanted))
        while at < len(self._keys) and self._keys[at] == wanted:
            if self._key_bytes(at) == block_hash:
                return at
            at += 1
        return None

    def _key_bytes(self, row: int) -> BlockHash:
        start = row * _ROW.itemsize
        return self._index_bytes[start : start + HASH_BYTES]

    def _parent_bytes(self, row: int) -> BlockHash:
        start = row * _ROW.itemsize + HASH_BYTES
        return self._index_bytes[start : start + HASH_BYTES]


def _as_integer(block_hash: BlockHash) -> np.uint64:
    value: np.uint64 = np.uint64(int.from_bytes(block_hash[:8], "big"))
    return value


def _leading_integers(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    leading: npt.NDArray[np.uint64] = np.ascontiguousarray(hashes[:, :8]).view(">u8").ravel().astype(np.uint64)
    return leading
