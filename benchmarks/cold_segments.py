"""What the cold store is measured against: append-only segment files with LMDB as their index, and plain zstd.

Enough of a store to compare each: neither has eviction, recovery or checks.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

import lmdb
import numpy as np
import zstandard

from benchmarks.cold_workloads import Bytes
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, EncodedRecord, decode_record
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.values.block import BlockHash
from tierkv.values.layout import BlockLayout

__all__ = ["PlainZstdStore", "SegmentStore"]

_PLACE = struct.Struct("<IQI")  # segment, offset, record bytes
_SEGMENT_BYTES = 64 << 20
_PAGE_BYTES = 4096
_KEEP_SIZE_AND_PUNCH = 3
_libc = ctypes.CDLL(None, use_errno=True)


class PlainZstdStore:
    """The simplest store: a block is one zstd frame of level 3 in LMDB. Context manager."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._env = lmdb.open(str(path), map_size=1 << 33, sync=False, metasync=False, lib_version=0)
        self._local = threading.local()

    def __enter__(self) -> PlainZstdStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()

    def put(self, block_hash: BlockHash, block: Bytes) -> None:
        """Store a block."""
        with self._env.begin(write=True) as txn:
            txn.put(block_hash, zstandard.ZstdCompressor(level=3).compress(block.data))

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Do nothing: it is plain."""

    def read_into(self, expected: BlockInfo, out: Bytes, *, layout: BlockLayout) -> MissReason | None:
        """Decompress, then copy."""
        if not hasattr(self._local, "decompressor"):
            self._local.decompressor = zstandard.ZstdDecompressor()
        with self._env.begin(buffers=True) as txn:
            block = self._local.decompressor.decompress(txn.get(expected.block_hash))
        np.copyto(out, np.frombuffer(block, dtype=np.uint8))
        return None


class SegmentStore:
    """Records in `path/segment-N`. Context manager."""

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._env = lmdb.open(str(path / "index"), map_size=1 << 28, sync=False, metasync=False, lib_version=0)
        count = len(list(path.glob("segment-*")))
        self._fds = [os.open(path / f"segment-{number}", os.O_RDWR) for number in range(count)]
        self._end = _SEGMENT_BYTES
        self._memory = ThreadMemory()
        self.live_bytes = 0

    def __enter__(self) -> SegmentStore:
        return self

    def __exit__(self, *_: object) -> None:
        self._env.close()
        for fd in self._fds:
            os.close(fd)

    @property
    def file_bytes(self) -> int:
        """Bytes that the segments take on the disk, holes left out."""
        return sum(os.fstat(fd).st_blocks * 512 for fd in self._fds)

    @property
    def fds(self) -> list[int]:
        """Descriptors of the segments."""
        return self._fds

    def put(self, records: Sequence[EncodedRecord], remove: Sequence[BlockHash] = ()) -> None:
        """Append records, then commit their places; give the room of others back."""
        with self._env.begin(write=True) as txn:
            for block_hash in remove:
                packed = txn.pop(block_hash)
                if packed is not None:
                    self._punch(*_PLACE.unpack(packed))
            for record in records:
                if self._end + record.stored_bytes > _SEGMENT_BYTES:
                    name = self._path / f"segment-{len(self._fds)}"
                    self._fds.append(os.open(name, os.O_RDWR | os.O_CREAT, 0o600))
                    self._end = 0
                os.pwrite(self._fds[-1], record.data.data, self._end)
                txn.put(record.info.block_hash, _PLACE.pack(len(self._fds) - 1, self._end, record.stored_bytes))
                self._end += _rounded(record.stored_bytes)
                self.live_bytes += _rounded(record.stored_bytes)

    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None:
        """Ask the system to fetch blocks."""
        for block_hash in block_hashes:
            segment, offset, size = self._place(block_hash)
            FileRecord(self._fds[segment], offset=offset, size=size, memory=self._memory).fetch_ahead()

    def read_into(self, expected: BlockInfo, out: Bytes, *, layout: BlockLayout) -> MissReason | None:
        """Read a record, then decode it."""
        segment, offset, size = self._place(expected.block_hash)
        record = FileRecord(self._fds[segment], offset=offset, size=size, memory=self._memory)
        return decode_record(record, out, expected=expected, layout=layout)

    def _place(self, block_hash: BlockHash) -> tuple[int, int, int]:
        with self._env.begin() as txn:
            packed = txn.get(block_hash)
        assert packed is not None
        segment, offset, size = _PLACE.unpack(packed)
        return segment, offset, size

    def _punch(self, segment: int, offset: int, size: int) -> None:
        whole = _rounded(size)
        fd = self._fds[segment]
        if _libc.fallocate(fd, _KEEP_SIZE_AND_PUNCH, ctypes.c_long(offset), ctypes.c_long(whole)) != 0:
            raise OSError(ctypes.get_errno(), "this file system punches no holes")
        self.live_bytes -= whole


def _rounded(size: int) -> int:
    return -(-size // _PAGE_BYTES) * _PAGE_BYTES
