"""The bytes of a state file around its records: a header, and rows of an index. FORMAT.md is the layout."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import xxhash

from tierkv.errors import CorruptBlockError, FormatVersionError
from tierkv.values.block import BlockHash
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES

__all__ = ["ALIGN_BYTES", "MAGIC", "ROW", "ROW_LIMIT", "STATE_VERSION", "StateHeader", "records_offset"]

STATE_VERSION = 2
ALIGN_BYTES = 4096
ROW = np.dtype(
    [("key", "S16"), ("parent", "S16"), ("offset", "<u8"), ("size", "<u8"), ("tokens", "<u4"), ("pad", "<u4")]
)
"""One block. Keys are compared as two big-endian integers, because numpy's S16 drops trailing NULs."""

ROW_LIMIT = 1 << 22
"""How many blocks a state file may have: opening one takes bounded time and memory, whatever its header claims."""

MAGIC = b"TKVSTATE"
# magic, version, row bytes | file, description, index offset, rows | namespace, checksum of both, checksum of this
_HEADER = struct.Struct("<8sIIQQQQ16sQQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class StateHeader:
    """What a state file says of itself. checksum: of its description and index."""

    size = _HEADER.size  # not a field: the same for all

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
    """Return where the first record may begin: behind header and description, on the next border."""
    return -(-(ALIGN_BYTES + description_bytes) // ALIGN_BYTES) * ALIGN_BYTES
