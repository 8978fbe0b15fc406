"""The header of a record: the identity of one block, sizes and checksum. FORMAT.md has the layout.

A reader uses no field before the checksum has matched, save for sizes that agree with the record's length.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import xxhash

from tierkv.errors import ConfigError, CorruptBlockError, FormatVersionError, ShapeError, StoreError
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import Codec, codec_by_id
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import (
    CONTENT_DIGEST_BYTES,
    HASH_BYTES,
    TOKEN_BYTES,
    BlockHash,
    ContentDigest,
    HashFunction,
    chain_content_digest,
    hash_block,
)
from tierkv.values.events import NamedBlock
from tierkv.values.layout import BlockLayout

__all__ = [
    "HEADER_BYTES",
    "MAGIC",
    "RECORD_VERSION",
    "BlockInfo",
    "Buffer",
    "RecordHeader",
    "TruncatedBlockError",
    "as_bytes",
    "begin_checksum",
    "checksum_in",
    "differs_in_checksum_alone",
    "mismatch",
    "pack_head",
    "payload_offset_in",
    "payload_offset_of",
    "read_header",
    "record_bytes_of",
    "verify_checksum",
    "write_header",
]

MAGIC = b"TKVB"
RECORD_VERSION = 2
HEADER_BYTES = 128
ALIGNMENT_BYTES = 64

Buffer: TypeAlias = "memoryview | bytes | bytearray | Bytes"

# magic, version, flags, checksum | hash, parent, namespace | tokens, block size, codec, codec version,
# frames | raw, payload and record bytes | payload offset, runs | content digest
_HEADER = struct.Struct("<4sHHQ16s16s16sIIHHIQQQII16s")
_CHECKSUM_AT = 8
_PROLOGUE_BYTES = 16  # magic to checksum; the checksum covers the rest and is seeded with the first 8
assert _HEADER.size == HEADER_BYTES


class TruncatedBlockError(CorruptBlockError):
    """A record that ends before its header says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """Identity of one block: two blocks are the same only if all five are equal.

    parent: the parent's block hash, or the namespace digest for a first block.
    content_digest: of the block and all before it. A reader computes it from its own tokens, a writer from the tokens
        that K and V were computed of: the hashes alone may be forged.
    token_bytes: token ids as little-endian uint32; fewer than the layout's block size in a partial block.
    """

    block_hash: BlockHash
    parent: BlockHash
    namespace: BlockHash
    content_digest: ContentDigest
    token_bytes: bytes

    def __post_init__(self) -> None:
        if not len(self.block_hash) == len(self.parent) == len(self.namespace) == HASH_BYTES:
            raise ConfigError(f"block hash, parent and namespace are {HASH_BYTES} bytes each")
        if len(self.content_digest) != CONTENT_DIGEST_BYTES:
            raise ConfigError(f"a content digest is {CONTENT_DIGEST_BYTES} bytes")
        if not self.token_bytes or len(self.token_bytes) % TOKEN_BYTES:
            raise ConfigError(f"a block has at least one token of {TOKEN_BYTES} bytes")

    @property
    def num_tokens(self) -> int:
        """How many tokens the block holds."""
        return len(self.token_bytes) // TOKEN_BYTES

    @classmethod
    def of(cls, block: NamedBlock, *, namespace: BlockHash, content_digest: ContentDigest) -> BlockInfo:
        """Return the identity of a block that a cache knows."""
        return cls(
            block_hash=block.block_hash,
            parent=block.parent_hash,
            namespace=namespace,
            content_digest=content_digest,
            token_bytes=block.token_bytes,
        )

    @classmethod
    def first(cls, token_bytes: bytes, *, namespace: BlockHash, hash_function: HashFunction = hash_block) -> BlockInfo:
        """Return the identity of a block that begins a chain."""
        return cls(
            block_hash=hash_function(namespace, token_bytes),
            parent=namespace,
            namespace=namespace,
            content_digest=chain_content_digest(namespace, token_bytes),
            token_bytes=token_bytes,
        )

    def next(self, token_bytes: bytes, *, hash_function: HashFunction = hash_block) -> BlockInfo:
        """Return the identity of a block that follows this one."""
        return BlockInfo(
            block_hash=hash_function(self.block_hash, token_bytes),
            parent=self.block_hash,
            namespace=self.namespace,
            content_digest=chain_content_digest(self.content_digest, token_bytes),
            token_bytes=token_bytes,
        )

    def follows(self, parent: BlockInfo | None) -> bool:
        """Return whether the content digest is that of a child of `parent`, or, for None, of a first block."""
        before = self.namespace if parent is None else parent.content_digest
        return self.content_digest == chain_content_digest(before, self.token_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """The header's fields. Sizes are consistent with each other and with the record's length."""

    info: BlockInfo
    checksum: int
    block_size: int
    codec: Codec
    num_runs: int
    frame_sizes: tuple[int, ...]
    raw_bytes: int
    payload_offset: int
    record_bytes: int


def read_header(record: Buffer, *, size: int | None = None) -> RecordHeader:
    """Return the header of a record, which may be followed by padding. Does not look at the payload.

    size: bytes of record and padding, where `record` is only their beginning, up to the payload at least.
    Raises TruncatedBlockError or CorruptBlockError; FormatVersionError for a record that is whole, checksum and all,
    and of a version or codec that this code does not know; with `size` its checksum has not been compared yet.
    Allocates at most in proportion to the record's length.
    """
    view = as_bytes(record).data
    if len(view) < HEADER_BYTES:
        raise TruncatedBlockError(f"a record of {len(view)} bytes has no room for its header")
    fields = _HEADER.unpack_from(view)
    magic, version, flags, checksum, block_hash, parent, namespace = fields[:7]
    num_tokens, block_size, codec_id, codec_version, num_frames = fields[7:12]
    raw_bytes, payload_bytes, record_bytes, payload_offset, num_runs, content_digest = fields[12:]
    if magic != MAGIC:
        raise CorruptBlockError("not a block record: the magic does not match")
    if version != RECORD_VERSION or flags:
        raise _unknown_version(view, f"record version {version}, flags {flags}", size)
    codec = codec_by_id(codec_id)
    if codec is None or codec.version != codec_version:
        raise _unknown_version(view, f"codec {codec_id} version {codec_version}", size)
    sizes_agree = (
        0 < num_tokens <= block_size
        and payload_offset == payload_offset_of(num_tokens, num_frames)
        and record_bytes == payload_offset + payload_bytes
    )
    if not sizes_agree:
        raise CorruptBlockError("the sizes in the record's header contradict each other")
    available = len(view) if size is None else size
    if record_bytes > available:
        raise TruncatedBlockError(f"a record of {record_bytes} bytes ends after {available}")
    assert payload_offset <= len(view), "the beginning of a record is its header at least"
    frames_at = HEADER_BYTES + num_tokens * TOKEN_BYTES
    frame_sizes = struct.unpack_from(f"<{num_frames}I", view, frames_at)
    if sum(frame_sizes) != payload_bytes:
        raise CorruptBlockError("the frames do not add up to the payload")
    info = BlockInfo(
        block_hash=block_hash,
        parent=parent,
        namespace=namespace,
        content_digest=content_digest,
        token_bytes=bytes(view[HEADER_BYTES:frames_at]),
    )
    return RecordHeader(
        info=info,
        checksum=checksum,
        block_size=block_size,
        codec=codec,
        num_runs=num_runs,
        frame_sizes=frame_sizes,
        raw_bytes=raw_bytes,
        payload_offset=payload_offset,
        record_bytes=record_bytes,
    )


def record_bytes_of(header: bytes) -> int:
    """Return how long a record claims to be, from its first HEADER_BYTES; nothing else is checked.

    Raises CorruptBlockError if it is none.
    """
    if len(header) < HEADER_BYTES or header[:4] != MAGIC:
        raise CorruptBlockError("not a block record")
    return int.from_bytes(header[96:104], "little")


def verify_checksum(record: Buffer, header: RecordHeader) -> None:
    """Raise CorruptBlockError unless the record's bytes match its checksum."""
    view = as_bytes(record).data
    if _checksum(view, header.record_bytes) != header.checksum:
        raise CorruptBlockError("the record's bytes do not match its checksum")


def begin_checksum(header: Bytes) -> xxhash.xxh3_64:
    """Return the checksum of a record that is read in pieces, with all before the payload, which is `header`, in it."""
    checksum = xxhash.xxh3_64(seed=int.from_bytes(header[:8].tobytes(), "little"))
    checksum.update(header[_PROLOGUE_BYTES:].data)
    return checksum


def mismatch(info: BlockInfo, expected: BlockInfo) -> MissReason | None:
    """Return how a stored block differs from the expected one, or None if they are the same block."""
    if info.namespace != expected.namespace:
        return MissReason.NAMESPACE
    return None if info == expected else MissReason.COLLISION


def write_header(buffer: Bytes, info: BlockInfo, layout: BlockLayout, codec: Codec, frame_sizes: list[int]) -> int:
    """Write everything before the payload; return the record's length."""
    head = pack_head(info, layout, codec, frame_sizes)
    view = buffer.data
    view[: len(head)] = head
    record_bytes = len(head) + sum(frame_sizes)
    struct.pack_into("<Q", view, _CHECKSUM_AT, _checksum(view, record_bytes))
    return record_bytes


def pack_head(info: BlockInfo, layout: BlockLayout, codec: Codec, frame_sizes: Sequence[int]) -> bytes:
    """Return everything before the payload of a block's record, with a checksum of 0."""
    payload_offset = payload_offset_of(info.num_tokens, len(frame_sizes))
    payload_bytes = sum(frame_sizes)
    header = _HEADER.pack(
        MAGIC,
        RECORD_VERSION,
        0,
        0,
        info.block_hash,
        info.parent,
        info.namespace,
        info.num_tokens,
        layout.block_size,
        codec.codec_id,
        codec.version,
        len(frame_sizes),
        layout.token_bytes * info.num_tokens,
        payload_bytes,
        payload_offset + payload_bytes,
        payload_offset,
        len(layout.runs),
        info.content_digest,
    )
    frames = struct.pack(f"<{len(frame_sizes)}I", *frame_sizes)
    return b"".join((header, info.token_bytes, frames)).ljust(payload_offset, b"\0")


def differs_in_checksum_alone(head: Bytes, expected: bytes) -> bool:
    """Return whether what precedes a payload is `expected`, which `pack_head` has made, but for the checksum."""
    found = head.tobytes()
    return found[:_CHECKSUM_AT] == expected[:_CHECKSUM_AT] and found[_PROLOGUE_BYTES:] == expected[_PROLOGUE_BYTES:]


def checksum_in(head: Bytes) -> int:
    """Return the checksum that a header holds."""
    return int.from_bytes(head[_CHECKSUM_AT:_PROLOGUE_BYTES].tobytes(), "little")


def payload_offset_of(num_tokens: int, num_frames: int) -> int:
    """Bytes of header, token ids and frame sizes, rounded up."""
    end = HEADER_BYTES + TOKEN_BYTES * num_tokens + 4 * num_frames
    return -(-end // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def payload_offset_in(header: Bytes) -> int:
    """Return where the payload begins according to a header that has not been checked yet."""
    return int.from_bytes(header[104:108].tobytes(), "little")


def as_bytes(buffer: Buffer) -> Bytes:
    """Return a buffer as an array, without a copy. Raises ShapeError unless it is contiguous bytes."""
    if isinstance(buffer, np.ndarray):
        if buffer.dtype != np.uint8 or not buffer.flags.c_contiguous:
            raise ShapeError(f"expected contiguous bytes, got {buffer.dtype} with strides {buffer.strides}")
        return buffer.reshape(-1)
    return np.frombuffer(buffer, dtype=np.uint8)


def _checksum(view: memoryview, record_bytes: int) -> int:
    """xxh3-64 of all that follows the checksum, seeded with all that precedes it."""
    seed = int.from_bytes(view[:8], "little")
    return xxhash.xxh3_64_intdigest(view[_PROLOGUE_BYTES:record_bytes], seed=seed)


def _unknown_version(view: memoryview, what: str, size: int | None) -> StoreError:
    """Return the error for a record of another version: damage, unless its checksum matches.

    Every version has the first 16 bytes, and the record's length, in the same place.
    """
    record_bytes = record_bytes_of(bytes(view[:HEADER_BYTES]))
    available = len(view) if size is None else size
    if not HEADER_BYTES <= record_bytes <= available:
        return TruncatedBlockError(f"{what}, and {record_bytes} bytes of {available}")
    if size is None and _checksum(view, record_bytes) != int.from_bytes(view[8:16], "little"):
        return CorruptBlockError(f"{what}, and its bytes do not match its checksum")
    return FormatVersionError(
        f"this version of tierkv does not read {what}",
        hint="use the version that wrote it, or delete the store and let it fill again",
    )
