"""The parts of a state file around its records: the header, and the index, checked when it is read. See FORMAT.md."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import xxhash

from tierkv.errors import CorruptBlockError, FormatVersionError
from tierkv.storage.record import HEADER_BYTES, max_record_bytes
from tierkv.storage.unfinished_file import STATE_MAGIC
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES

__all__ = [
    "ALIGN_BYTES",
    "MAGIC",
    "ROW",
    "ROW_LIMIT",
    "STATE_VERSION",
    "StateEntry",
    "StateHeader",
    "StateIndex",
    "records_offset",
]

STATE_VERSION = 2
ALIGN_BYTES = 4096
ROW = np.dtype(
    [("key", "S16"), ("parent", "S16"), ("offset", "<u8"), ("size", "<u8"), ("tokens", "<u4"), ("pad", "<u4")]
)
"""One block. Keys are compared as two big-endian integers, because numpy's S16 drops trailing NULs."""

ROW_LIMIT = 1 << 22
"""How many blocks a state file may have: opening one takes bounded time and memory, whatever its header says."""

MAGIC = STATE_MAGIC
# magic, version, row bytes | file, description, index offset, rows | namespace, checksum of both, checksum of this
_HEADER = struct.Struct("<8sIIQQQQ16sQQ")


_RECORD_LIMIT_BYTES = (1 << 32) - 1  # as in a cold store

_Integers = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class StateHeader:
    """The header of a state file. checksum: of its description and index."""

    size: ClassVar[int] = _HEADER.size  # not a field: the same for all

    file_bytes: int
    description_bytes: int
    index_offset: int
    rows: int
    namespace: BlockHash
    checksum: int

    def pack(self) -> bytes:
        """Return the header's bytes."""
        sizes = (self.file_bytes, self.description_bytes, self.index_offset, self.rows)
        body = _HEADER.pack(MAGIC, STATE_VERSION, ROW.itemsize, *sizes, self.namespace, self.checksum, 0)[:-8]
        return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))

    @classmethod
    def unpack(cls, packed: bytes, *, actual_bytes: int) -> StateHeader:
        """Return the header of a file of that length. Raises CorruptBlockError, FormatVersionError."""
        if len(packed) < _HEADER.size or packed[:8] != MAGIC:
            raise CorruptBlockError("it is not a tierkv state file")
        _, version, row_bytes, file_bytes, text_bytes, index_offset, rows, namespace, checksum, own = _HEADER.unpack(
            packed
        )
        if version != STATE_VERSION:
            raise FormatVersionError(
                f"it has state format {version}, this tierkv reads {STATE_VERSION}",
                hint="save it again with this version, or update tierkv",
            )
        if xxhash.xxh3_64_intdigest(packed[:-8]) != own or row_bytes != ROW.itemsize:
            raise CorruptBlockError("its header is damaged")
        sizes_agree = (
            actual_bytes == file_bytes == index_offset + rows * row_bytes
            and index_offset % ALIGN_BYTES == 0
            and records_offset(text_bytes) <= index_offset
        )
        if not sizes_agree:
            raise CorruptBlockError(f"it is cut short or damaged: {actual_bytes} of {file_bytes} bytes")
        if text_bytes > DESCRIPTION_LIMIT_BYTES or rows > ROW_LIMIT or rows > index_offset // ALIGN_BYTES:
            raise CorruptBlockError(f"it claims to have {rows} blocks and a description of {text_bytes} bytes")
        return cls(
            file_bytes=file_bytes,
            description_bytes=text_bytes,
            index_offset=index_offset,
            rows=rows,
            namespace=namespace,
            checksum=checksum,
        )


def records_offset(description_bytes: int) -> int:
    """Return where the first record may begin: after header and description, on the next border."""
    return -(-(ALIGN_BYTES + description_bytes) // ALIGN_BYTES) * ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class StateEntry:
    """A stored block's small record."""

    parent: BlockHash
    num_tokens: int
    offset: int
    size: int


class StateIndex:
    """The rows of one state file, checked. Rows have numbers, in the order of their blocks' hashes.

    packed: the rows as they are in the file. begin, end: where its records lie. layout: of its blocks.
    Raises CorruptBlockError unless the blocks are in order, each once, and the records lie apart from each other and
    have sizes that the layout allows. Parents may be missing, and chains may be rings.
    """

    def __init__(self, packed: bytes, *, begin: int, end: int, layout: BlockLayout) -> None:
        self._packed = packed
        self._rows = np.frombuffer(packed, dtype=ROW)
        raw = np.frombuffer(packed, dtype=np.uint8).reshape(len(self._rows), ROW.itemsize)
        self._keys = _Hashes.of(raw[:, :HASH_BYTES])
        if not self._keys.are_ascending():
            raise CorruptBlockError("its blocks are not in order, or a block is there twice")
        self._check_records(begin, end, layout)
        parents = _Hashes.of(raw[:, HASH_BYTES : 2 * HASH_BYTES])
        self._by_parent = parents.order()
        self._parents = parents.taken(self._by_parent)

    def __len__(self) -> int:
        return len(self._rows)

    def find(self, block_hash: BlockHash) -> int | None:
        """Return the row of a block, or None."""
        rows = self._keys.span_of(block_hash)
        return rows.start if rows else None

    def entry(self, row: int) -> StateEntry:
        """Return a row's small record."""
        fields = self._rows[row]
        return StateEntry(self.parent(row), int(fields["tokens"]), int(fields["offset"]), int(fields["size"]))

    def key(self, row: int) -> BlockHash:
        """Return the hash of a row's block."""
        return self._hash_at(row * ROW.itemsize)

    def parent(self, row: int) -> BlockHash:
        """Return the hash of the block before it, or the namespace digest."""
        return self._hash_at(row * ROW.itemsize + HASH_BYTES)

    def children(self, parent: BlockHash) -> Iterator[int]:
        """Yield the rows of the blocks that follow a block, or begin a namespace's chains."""
        for at in self._parents.span_of(parent):
            yield int(self._by_parent[at])

    def walk(self, namespace: BlockHash) -> Iterator[int]:
        """Yield every row once: chains from their beginnings, then rows without a chain. Parents before children."""
        was_yielded = np.zeros(len(self), dtype=bool)
        stack = list(self.children(namespace))
        for left in range(-1, len(self)):
            if left >= 0 and not was_yielded[left]:
                stack.append(self._top_of(left, was_yielded))
            while stack:
                row = stack.pop()
                if not was_yielded[row]:
                    was_yielded[row] = True
                    yield row
                    stack += self.children(self.key(row))

    def _top_of(self, row: int, was_yielded: npt.NDArray[np.bool_]) -> int:
        """Return the first row of the chain to a row, among those not yielded; of a ring, any of its rows."""
        passed = set()
        while row not in passed:
            passed.add(row)
            above = self.find(self.parent(row))
            if above is None or was_yielded[above]:
                break
            row = above
        return row

    def _check_records(self, begin: int, end: int, layout: BlockLayout) -> None:
        offsets, sizes, tokens = self._rows["offset"], self._rows["size"], self._rows["tokens"]
        if np.any((sizes > end) | (offsets < begin) | (offsets > end - np.minimum(sizes, end))):
            raise CorruptBlockError("its index points past its records")
        limit = min(max_record_bytes(layout), _RECORD_LIMIT_BYTES)
        if np.any((tokens < 1) | (tokens > layout.block_size) | (sizes < HEADER_BYTES) | (sizes > limit)):
            raise CorruptBlockError("its index has blocks of a size that their layout does not allow")
        if np.any(offsets % ALIGN_BYTES != 0):
            raise CorruptBlockError("its records do not begin on borders")
        order = np.argsort(offsets, kind="stable")
        if np.any(offsets[order][1:] < (offsets + sizes)[order][:-1]):
            raise CorruptBlockError("its records overlap")

    def _hash_at(self, start: int) -> BlockHash:
        return self._packed[start : start + HASH_BYTES]


class _Hashes:
    """Hashes as two integers each, so that all their bytes are compared."""

    def __init__(self, high: _Integers, low: _Integers) -> None:
        self._high = high
        self._low = low

    @classmethod
    def of(cls, raw: npt.NDArray[np.uint8]) -> _Hashes:
        """Return the hashes of an array of bytes [hashes, HASH_BYTES]."""
        halves = np.ascontiguousarray(raw).view(">u8").astype(np.uint64)
        return cls(np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1]))

    def are_ascending(self) -> bool:
        """Return whether each is greater than its predecessor."""
        high, low = self._high, self._low
        return bool(np.all((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] < low[1:]))))

    def order(self) -> npt.NDArray[np.intp]:
        """Return the numbers of the hashes, the smallest first."""
        order: npt.NDArray[np.intp] = np.lexsort((self._low, self._high))
        return order

    def taken(self, order: npt.NDArray[np.intp]) -> _Hashes:
        """Return the hashes in another order."""
        return _Hashes(self._high[order], self._low[order])

    def span_of(self, wanted: BlockHash) -> range:
        """Return where a hash lies; they must be in order."""
        high = np.uint64(int.from_bytes(wanted[:8], "big"))
        low = np.uint64(int.from_bytes(wanted[8:], "big"))
        first, last = (
            int(at) for at in (np.searchsorted(self._high, high), np.searchsorted(self._high, high, "right"))
        )
        if first == last:
            return range(0)
        lows = self._low[first:last]
        return range(first + int(np.searchsorted(lows, low)), first + int(np.searchsorted(lows, low, "right")))
