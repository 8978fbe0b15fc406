"""The record: one block with its identity, sizes and checksum; the same in LMDB and in state files.

FORMAT.md has the layout; record_header.py reads and writes the header.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from tierkv.errors import CorruptBlockError, FormatVersionError, ShapeError
from tierkv.storage.codec import Bytes, iter_runs
from tierkv.storage.codecs import RAW, Codec, check_codec, default_codec
from tierkv.storage.coded import CODED_ID, CodedBlock, check_frames, coded_layout
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record_header import (
    HEADER_BYTES,
    MAGIC,
    RECORD_VERSION,
    BlockInfo,
    Buffer,
    RecordHeader,
    TruncatedBlockError,
    as_bytes,
    begin_checksum,
    checksum_in,
    differs_in_checksum_alone,
    mismatch,
    pack_head,
    payload_offset_in,
    payload_offset_of,
    read_header,
    record_bytes_of,
    verify_checksum,
    write_header,
)
from tierkv.storage.record_source import FileRecord, RecordBytes, RecordSource
from tierkv.values.layout import BlockLayout, Run

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "RECORD_VERSION",
    "BlockInfo",
    "Buffer",
    "EncodedRecord",
    "RecordHeader",
    "TruncatedBlockError",
    "claimed_info",
    "damage_reason",
    "decode_record",
    "encode_record",
    "max_record_bytes",
    "mismatch",
    "parse_record",
    "read_header",
    "record_bytes_of",
    "record_room",
    "verify_checksum",
]

PIECE_BYTES = 2 << 20  # stored bytes that are read, checked and decoded together: they stay in the cache
_MOST_PADDING_BYTES = 4096  # of a small record; a large one has less than a codec must save
_HEAD_BYTES = 4096  # read before anything else: of most records all that precedes the payload
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
    memory: Bytes | None = None,
) -> EncodedRecord:
    """Return the record of a block. Thread-safe; the heavy parts release the GIL.

    block: layout.block_bytes bytes; of each run only the first info.num_tokens tokens are read.
    codec: the dtype's default where None; a block that it shrinks by less than 5 %, or cannot hold, is stored raw.
    memory: where to write the record, `record_room` bytes or more; None for new memory.
    Raises ShapeError if the block or the number of tokens does not fit the layout.
    """
    source = as_bytes(block)
    _check_shape(source, info, layout)
    raw_bytes = layout.token_bytes * info.num_tokens
    chosen = codec or default_codec(layout.dtype)
    num_bytes = record_room(layout, chosen, info.num_tokens)
    buffer = np.empty(num_bytes, dtype=np.uint8) if memory is None else memory[:num_bytes]
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


def record_room(layout: BlockLayout, codec: Codec, num_tokens: int) -> int:
    """Return how many bytes of memory `encode_record` needs for a record of so many tokens, stored raw or not."""
    num_frames = max(_num_frames(each, layout, num_tokens) for each in (codec, RAW))
    return payload_offset_of(num_tokens, num_frames) + layout.token_bytes * num_tokens


def decode_record(
    record: Buffer | FileRecord,
    out: Buffer,
    *,
    expected: BlockInfo,
    layout: BlockLayout,
    lossy_codec: str = "",
    coded: CodedBlock | None = None,
) -> MissReason | None:
    """Write the block into `out` and return None, or return why it is not the expected block.

    Goes through the record once, in pieces that are checked and decoded while they are in the cache; what needs no
    decoding is copied in one step. So codecs see bytes that may be damaged, and no thread may read `out` before this
    has returned None: the checksum of all pieces has then matched.

    lossy_codec: of the namespace of `expected`, "" if that is exact: a record whose codec does not fit is damage.

    coded: leave a whole block of exponent16 coded: `out` then begins with the payload, and `coded` has its frame sizes.

    out: writable, layout.block_bytes bytes; of each run only the first num_tokens tokens are written. After
    anything but None its contents are undefined. Thread-safe; the heavy parts release the GIL.
    Raises CorruptBlockError (TruncatedBlockError, FormatVersionError) for a damaged or unknown record.
    """
    target = as_bytes(out)
    _check_shape(target, expected, layout)
    if isinstance(record, FileRecord) and _read_raw_block(record, target, expected, layout, lossy_codec):
        return None
    source = record if isinstance(record, FileRecord) else RecordBytes(as_bytes(record))
    header, checksum = _read_head(source)
    reason = mismatch(header.info, expected)
    if reason is not None:
        for start, end in _iter_steps(header):
            checksum.update(source.view(start, end).data)
        _require_checksum(checksum, header)
        return reason
    check_codec(header.codec.name, lossy_codec)
    pieces = _pieces_of(header, layout)
    if coded is not None and header.codec.codec_id == CODED_ID and header.info.num_tokens == layout.block_size:
        payload = _copy_payload(source, header, checksum, target)
        check_frames(payload, header.frame_sizes, coded_layout(layout))
        coded.frame_sizes = header.frame_sizes
        return None
    if header.codec is RAW and header.info.num_tokens == layout.block_size:  # the payload is the block
        _copy_payload(source, header, checksum, target)
        return None
    with np.errstate(all="ignore"):  # damaged numbers may overflow before the checksum is compared
        for piece in pieces:
            payload = source.view(piece.start, piece.end)
            checksum.update(payload.data)
            try:
                header.codec.decode_runs(payload, piece.frame_sizes, target, piece.runs, header.info.num_tokens)
            except ValueError as exc:  # ConfigError among them: the codec is one that the layout's dtype cannot have
                raise CorruptBlockError(f"a record of {header.codec.name} that does not decode: {exc}") from exc
    _require_checksum(checksum, header)
    return None


def claimed_info(record: Buffer | FileRecord) -> BlockInfo:
    """Return the block that a record claims to be; only its head is read, and no checksum compared.

    Raises CorruptBlockError (TruncatedBlockError, FormatVersionError) for no head of a record.
    """
    source = record if isinstance(record, FileRecord) else RecordBytes(as_bytes(record))
    return _read_head(source)[0].info


def parse_record(record: Buffer, *, lossy_codec: str | None = None, cost_s: float = 0.0) -> EncodedRecord:
    """Return the bytes of a record as an EncodedRecord, a view of them.

    lossy_codec: of its namespace, "" for an exact one; None where that is not known.
    Raises CorruptBlockError unless header and checksum are right, and the codec fits the namespace.
    """
    header = read_header(record)
    verify_checksum(record, header)
    if lossy_codec is not None:
        check_codec(header.codec.name, lossy_codec)
    return EncodedRecord(
        info=header.info,
        codec=header.codec.name,
        raw_bytes=header.raw_bytes,
        stored_bytes=header.record_bytes,
        buffer=as_bytes(record)[: header.record_bytes],
        cost_s=cost_s,
    )


def damage_reason(error: CorruptBlockError | FormatVersionError) -> MissReason:
    """Return what kind of miss a record is for which `decode_record` raised that."""
    if isinstance(error, TruncatedBlockError):
        return MissReason.TRUNCATED
    return MissReason.FORMAT if isinstance(error, FormatVersionError) else MissReason.CORRUPT


def max_record_bytes(layout: BlockLayout) -> int:
    """Return a size that no record of this layout exceeds: raw, padded, with token ids and frame sizes."""
    return 2 * layout.block_bytes + (1 << 20)


def _check_shape(block: Bytes, info: BlockInfo, layout: BlockLayout) -> None:
    if block.size != layout.block_bytes:
        raise ShapeError(f"a block of {layout.block_bytes} bytes is needed, got {block.size}")
    if info.num_tokens > layout.block_size:
        raise ShapeError(f"{info.num_tokens} tokens do not fit a block of {layout.block_size}")


@dataclass(frozen=True, slots=True)
class _Piece:
    """Runs whose frames are read together, `start` to `end` in the record."""

    runs: Sequence[Run]
    frame_sizes: Sequence[int]
    start: int
    end: int


def _read_head(source: RecordSource) -> tuple[RecordHeader, xxhash.xxh3_64]:
    """Return a record's header, and its checksum computed up to the payload."""
    head = source.view(0, min(source.size, _HEAD_BYTES))
    if head.size >= HEADER_BYTES and head.size < payload_offset_in(head) <= source.size:
        head = source.view(0, payload_offset_in(head))
    try:
        header = read_header(head, size=source.size)
    except FormatVersionError:
        read_header(source.view(0, source.size))  # it is damage, unless the whole record has a matching checksum
        raise
    return header, begin_checksum(head[: header.payload_offset])


def _require_checksum(checksum: xxhash.xxh3_64, header: RecordHeader) -> None:
    if checksum.intdigest() != header.checksum:
        raise CorruptBlockError("the record's bytes do not match its checksum")


def _read_raw_block(record: FileRecord, out: Bytes, expected: BlockInfo, layout: BlockLayout, lossy_codec: str) -> bool:
    """Read the record of a whole block that is stored raw, in one step. Return False, unless it is that: all but the
    payload is known beforehand then, and is compared as it is. Raises CorruptBlockError.
    """
    if expected.num_tokens != layout.block_size or record.size < layout.block_bytes + HEADER_BYTES:
        return False
    wanted = pack_head(expected, layout, RAW, [run.token_bytes * layout.block_size for run in layout.runs])
    spare_bytes = record.size - len(wanted) - out.size
    if not 0 <= spare_bytes <= MIN_SAVING * out.size + _MOST_PADDING_BYTES:
        return False
    head = record.read_split(len(wanted), out)
    if head is None or not differs_in_checksum_alone(head, wanted):
        return False
    check_codec(RAW.name, lossy_codec)
    checksum = begin_checksum(head)
    checksum.update(out.data)
    if checksum.intdigest() != checksum_in(head):
        raise CorruptBlockError("the record's bytes do not match its checksum")
    return True


def _copy_payload(source: RecordSource, header: RecordHeader, checksum: xxhash.xxh3_64, out: Bytes) -> Bytes:
    """Write the payload as it is to the start of `out`, and return it there. Raises CorruptBlockError.

    In one step: threads that take turns at the interpreter's lock for every piece take a third longer together.
    """
    payload = out[: header.record_bytes - header.payload_offset]
    source.copy(header.payload_offset, payload)
    checksum.update(payload.data)
    _require_checksum(checksum, header)
    return payload


def _iter_steps(header: RecordHeader) -> Iterator[tuple[int, int]]:
    """Yield where parts of the payload begin and end in the record, frames or not."""
    for start in range(header.payload_offset, header.record_bytes, PIECE_BYTES):
        yield start, min(start + PIECE_BYTES, header.record_bytes)


def _pieces_of(header: RecordHeader, layout: BlockLayout) -> list[_Piece]:
    """Return the payload in pieces of whole runs, as many as fit PIECE_BYTES, at least one.

    Raises CorruptBlockError unless all sizes are possible in the layout: a run's frames are never longer than the run.
    """
    num_tokens = header.info.num_tokens
    if (header.block_size, header.num_runs, len(header.frame_sizes), header.raw_bytes) != (
        layout.block_size,
        len(layout.runs),
        _num_frames(header.codec, layout, num_tokens),
        layout.token_bytes * num_tokens,
    ):
        raise CorruptBlockError("the record's sizes are not those of the layout")
    pieces: list[_Piece] = []
    first_run = first_frame = frame = 0
    start = end = header.payload_offset
    for number, run in enumerate(layout.runs):
        next_frame = frame + header.codec.num_frames(run, num_tokens)
        run_bytes = sum(header.frame_sizes[frame:next_frame])
        if run_bytes > run.token_bytes * num_tokens:
            raise CorruptBlockError("a run's frames are longer than the run")
        if end + run_bytes - start > PIECE_BYTES and number > first_run:
            pieces.append(_Piece(layout.runs[first_run:number], header.frame_sizes[first_frame:frame], start, end))
            first_run, first_frame, start = number, frame, end
        frame = next_frame
        end += run_bytes
    pieces.append(_Piece(layout.runs[first_run:], header.frame_sizes[first_frame:], start, end))
    return pieces


def _num_frames(codec: Codec, layout: BlockLayout, num_tokens: int) -> int:
    return sum(codec.num_frames(run, num_tokens) for run in layout.runs)


def _encode_runs(block: Bytes, layout: BlockLayout, codec: Codec, buffer: Bytes, num_tokens: int) -> list[int] | None:
    """Write the payload where it belongs in `buffer`; return the frame sizes, or None if the codec cannot hold it."""
    end = payload_offset_of(num_tokens, _num_frames(codec, layout, num_tokens))
    if codec is RAW and num_tokens == layout.block_size:  # the payload is the block: one copy, not one for each run
        np.copyto(buffer[end : end + block.size], block)
        return [run.token_bytes * num_tokens for run in layout.runs]
    frame_sizes: list[int] = []
    for run, values in iter_runs(block, layout.runs, num_tokens):
        sizes = codec.encode_run(values, run, buffer[end : end + values.size])
        if sizes is None:
            return None
        end += sum(sizes)
        frame_sizes += sizes
    return frame_sizes
