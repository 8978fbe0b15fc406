"""The record: one block with its identity, sizes and checksum; the same in LMDB and in state files.

FORMAT.md in this folder is the layout; the header is record_header.py's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tierkv.errors import CorruptBlockError, ShapeError
from tierkv.layout import BlockLayout
from tierkv.storage.codec import iter_runs
from tierkv.storage.codecs import RAW, Codec, default_codec
from tierkv.storage.coded import CODED_ID, CodedBlock, CodedLayout, check_frames
from tierkv.storage.outcomes import MissReason
from tierkv.storage.planes import Bytes
from tierkv.storage.record_header import (
    HEADER_BYTES,
    MAGIC,
    RECORD_VERSION,
    BlockInfo,
    Buffer,
    RecordHeader,
    TruncatedBlockError,
    as_bytes,
    mismatch,
    payload_offset_of,
    read_header,
    record_bytes_of,
    verify_checksum,
    write_header,
)

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "RECORD_VERSION",
    "BlockInfo",
    "Buffer",
    "EncodedRecord",
    "RecordHeader",
    "TruncatedBlockError",
    "decode_record",
    "encode_record",
    "mismatch",
    "parse_record",
    "read_header",
    "record_bytes_of",
    "verify_checksum",
]

MIN_SAVING = 0.05  # below this share a codec is not worth its time, and the block is stored raw


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class EncodedRecord:
    """One record, ready to be stored. `buffer` may be longer than the record: the rest is free for padding.

    cost_s: seconds it would take to compute the block again, for eviction; not part of the record.
    """

    info: BlockInfo
    codec: str
    raw_bytes: int
    stored_bytes: int
    buffer: Bytes
    cost_s: float = 0.0

    @property
    def data(self) -> Bytes:
        """The record's bytes, a view."""
        return self.buffer[: self.stored_bytes]


def encode_record(
    info: BlockInfo,
    block: Buffer,
    *,
    layout: BlockLayout,
    codec: Codec | None = None,
    cost_s: float = 0.0,
) -> EncodedRecord:
    """Return the record of a block. Thread-safe; the heavy parts release the GIL.

    block: layout.block_bytes bytes; of each run only the first info.num_tokens tokens are read.
    codec: the dtype's default where None; a block that it shrinks by less than 5 %, or cannot hold, is stored raw.
    Raises ShapeError if the block or the number of tokens does not fit the layout.
    """
    source = as_bytes(block)
    _check_shape(source, info, layout)
    raw_bytes = layout.packed_bytes(info.num_tokens)
    chosen = codec or default_codec(layout.dtype)
    num_frames = max(_num_frames(codec, layout, info.num_tokens) for codec in (chosen, RAW))
    buffer = np.empty(payload_offset_of(info.num_tokens, num_frames) + raw_bytes, dtype=np.uint8)
    frame_sizes = _encode_runs(source, layout, chosen, buffer, info.num_tokens)
    if frame_sizes is None or (chosen is not RAW and sum(frame_sizes) > (1 - MIN_SAVING) * raw_bytes):
        chosen = RAW
        frame_sizes = _encode_runs(source, layout, RAW, buffer, info.num_tokens)
    assert frame_sizes is not None
    stored_bytes = write_header(buffer, info, layout, chosen, frame_sizes)
    return EncodedRecord(
        info=info,
        codec=chosen.name,
        raw_bytes=raw_bytes,
        stored_bytes=stored_bytes,
        buffer=buffer,
        cost_s=cost_s,
    )


def decode_record(
    record: Buffer, out: Buffer, *, expected: BlockInfo, layout: BlockLayout, coded: CodedBlock | None = None
) -> MissReason | None:
    """Write the block into `out` and return None, or return why it is not the block asked for.

    coded: leave a whole block of exponent16 as it is: `out` then begins with the payload, and `coded` says what it is.

    out: writable, layout.block_bytes bytes; of each run only the first num_tokens tokens are written. After
    anything but None its contents are undefined. Thread-safe; the heavy parts release the GIL.
    Raises CorruptBlockError (TruncatedBlockError, FormatVersionError) for a damaged or unknown record.
    """
    target = as_bytes(out)
    _check_shape(target, expected, layout)
    header = read_header(record)
    verify_checksum(record, header)
    reason = mismatch(header.info, expected)
    if reason is not None:
        return reason
    num_tokens = header.info.num_tokens
    if (header.block_size, header.num_runs, len(header.frame_sizes), header.raw_bytes) != (
        layout.block_size,
        len(layout.runs),
        _num_frames(header.codec, layout, num_tokens),
        layout.packed_bytes(num_tokens),
    ):
        raise CorruptBlockError("the record's sizes are not those of the layout")
    payload = as_bytes(record)[header.payload_offset : header.record_bytes]
    if coded is not None and header.codec.codec_id == CODED_ID and num_tokens == layout.block_size:
        check_frames(payload, header.frame_sizes, CodedLayout(layout))
        np.copyto(target[: payload.size], payload)
        coded.frame_sizes = header.frame_sizes
        return None
    header.codec.decode_runs(payload, header.frame_sizes, target, layout.runs, num_tokens)
    return None


def parse_record(record: Buffer, *, cost_s: float = 0.0) -> EncodedRecord:
    """Return a record read from a file as one to be stored; a view of the given bytes.

    Raises CorruptBlockError unless header and checksum are right.
    """
    header = read_header(record)
    verify_checksum(record, header)
    return EncodedRecord(
        info=header.info,
        codec=header.codec.name,
        raw_bytes=header.raw_bytes,
        stored_bytes=header.record_bytes,
        buffer=as_bytes(record)[: header.record_bytes],
        cost_s=cost_s,
    )


def _check_shape(block: Bytes, info: BlockInfo, layout: BlockLayout) -> None:
    if block.size != layout.block_bytes:
        raise ShapeError(f"a block of {layout.block_bytes} bytes is needed, got {block.size}")
    if info.num_tokens > layout.block_size:
        raise ShapeError(f"{info.num_tokens} tokens do not fit a block of {layout.block_size}")


def _num_frames(codec: Codec, layout: BlockLayout, num_tokens: int) -> int:
    return sum(codec.num_frames(run, num_tokens) for run in layout.runs)


def _encode_runs(block: Bytes, layout: BlockLayout, codec: Codec, buffer: Bytes, num_tokens: int) -> list[int] | None:
    """Write the payload where it belongs in `buffer`; return the frame sizes, or None if the codec cannot hold it."""
    end = payload_offset_of(num_tokens, _num_frames(codec, layout, num_tokens))
    frame_sizes: list[int] = []
    for run, values in iter_runs(block, layout.runs, num_tokens):
        sizes = codec.encode_run(values, run, buffer[end : end + values.size])
        if sizes is None:
            return None
        end += sum(sizes)
        frame_sizes += sizes
    return frame_sizes
