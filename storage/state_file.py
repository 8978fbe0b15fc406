"""A cache in one file, as `save_cache_state` writes and `load_cache_state` reads it on demand; here the reading.

Layout: a 4 KiB header, the namespace's description, records (the cold tier's own, see FORMAT.md) each
beginning on a 4 KiB border, then the index: one fixed-size row a block, sorted by hash. Opening reads header,
description and index; records are read when a block is asked for.

Records are read with `pread`, not through a map: a file that somebody cuts short then costs a miss, where a
map would end the process with SIGBUS.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.block import HASH_BYTES, TOKEN_BYTES, BlockHash, common_run
from tierkv.errors import ConfigError, CorruptBlockError, FormatVersionError, StoreError
from tierkv.layout import BlockLayout
from tierkv.namespace import parse_description
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import HEADER_BYTES, BlockInfo, TruncatedBlockError, decode_record
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.storage.state_format import ALIGN_BYTES, ROW, STATE_VERSION, StateHeader
from tierkv.storage.state_writer import SavedState, write_state_file

__all__ = ["STATE_VERSION", "SavedState", "StateFile", "write_state_file"]


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A stored block's small record."""

    parent: BlockHash
    num_tokens: int
    offset: int
    size: int


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
        self._memory = ThreadMemory()

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
                    self._open_record(self._fd, entry).fetch_ahead()

    def is_in_memory(self, block_hash: BlockHash) -> bool:
        """Tell whether reading a block takes no disk; True of one that cannot be read."""
        entry, fd = self.lookup(block_hash), self._fd
        return entry is None or fd is None or self._open_record(fd, entry).is_in_memory()

    def read_into(
        self,
        expected: BlockInfo,
        out: npt.NDArray[np.uint8],
        *,
        layout: BlockLayout,
        coded: CodedBlock | None = None,
    ) -> MissReason | None:
        """Decode a block into `out`, one block of `layout`. Return None, or why it is a miss. coded: as ColdStore's."""
        entry = self.lookup(expected.block_hash)
        if entry is None or self._fd is None:
            return MissReason.ABSENT
        record = self._open_record(self._fd, entry)
        try:
            return decode_record(
                record,
                out,
                expected=expected,
                layout=layout,
                lossy_codec=self.description.lossy_codec,
                coded=coded,
            )
        except (TruncatedBlockError, OSError):
            return MissReason.TRUNCATED
        except FormatVersionError:
            return MissReason.FORMAT
        except StoreError:
            return MissReason.CORRUPT

    def note_damaged(self, block_hash: BlockHash) -> None:
        """Leave out a damaged block from now on; the file itself is never changed."""
        self._damaged.add(block_hash)

    def iter_records(self, seen: set[BlockHash] | None = None) -> Iterator[bytes]:
        """Yield every readable record once, parents before children.

        seen: hashes of blocks that are left out; it gets those of the others.
        """
        seen = set() if seen is None else seen
        visited: set[BlockHash] = set()  # a file may have a block twice
        stack = self.children(self.namespace)
        while stack:
            block_hash = stack.pop()
            if block_hash in visited:
                continue
            visited.add(block_hash)
            if block_hash not in seen:
                record = self.read_record(block_hash)
                if record is None:
                    continue
                seen.add(block_hash)
                yield record
            stack += self.children(block_hash)

    def _open_record(self, fd: int, entry: StateEntry) -> FileRecord:
        return FileRecord(fd, offset=entry.offset, size=entry.size, memory=self._memory)

    def _read_index(self) -> None:
        assert self._fd is not None
        actual_bytes = os.fstat(self._fd).st_size
        try:
            header = StateHeader.unpack(os.pread(self._fd, StateHeader.size, 0), actual_bytes=actual_bytes)
        except StoreError as exc:
            raise type(exc)(f"the state file {self.path} cannot be used: {exc}") from exc
        self.namespace: BlockHash = header.namespace
        description = os.pread(self._fd, header.description_bytes, ALIGN_BYTES)
        index = os.pread(self._fd, header.rows * ROW.itemsize, header.index_offset)
        if xxhash.xxh3_64_intdigest(description + index) != header.checksum:
            raise CorruptBlockError(f"the index of {self.path} is damaged")
        try:
            parsed = parse_description(description)
        except ConfigError as exc:
            raise CorruptBlockError(f"the description in {self.path} cannot be used: {exc}") from exc
        if parsed.digest != header.namespace:
            raise CorruptBlockError(f"the description in {self.path} is that of another namespace")
        self.description = parsed
        self.raw_description = description
        self._rows = np.frombuffer(index, dtype=ROW)
        begins, sizes = self._rows["offset"], self._rows["size"]
        if np.any(sizes > header.index_offset) or np.any(begins > header.index_offset - sizes):
            raise CorruptBlockError(f"the index of {self.path} points past its records")
        raw = np.frombuffer(index, dtype=np.uint8).reshape(header.rows, ROW.itemsize)
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
        start = row * ROW.itemsize
        return self._index_bytes[start : start + HASH_BYTES]

    def _parent_bytes(self, row: int) -> BlockHash:
        start = row * ROW.itemsize + HASH_BYTES
        return self._index_bytes[start : start + HASH_BYTES]


def _as_integer(block_hash: BlockHash) -> np.uint64:
    value: np.uint64 = np.uint64(int.from_bytes(block_hash[:8], "big"))
    return value


def _leading_integers(hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    leading: npt.NDArray[np.uint64] = np.ascontiguousarray(hashes[:, :8]).view(">u8").ravel().astype(np.uint64)
    return leading
