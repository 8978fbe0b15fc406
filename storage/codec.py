"""The base of all codecs: each turns a run of a block (one layer's K or V) into frames, and back.

A frame is a standard zstd frame with its content size, or the plain bytes where those are shorter. It covers at most
FRAME_BYTES of one run and is independent of all others: threads, or a GPU, decode frames in any order. No reader
allocates in proportion to a size that a frame claims and its reader does not expect.

Floats are split into an exponent plane, which is worth coding, and the rest, which is noise. A 16-bit float v becomes
two bytes: `exponent` = bits 7..14 of v, and `rest` = the sign (bit 15) above the seven low bits. For bf16 the first is
exactly the exponent; for fp16 it is the exponent and three bits of mantissa. The sign, which is noise, is kept out of
the exponent's byte. A 32-bit float is a bf16, coded as above, and 16 further bits of mantissa.

The merge widens `rest` as a *signed* byte, which carries the sign to bit 15 for one `and`: every step is a
contiguous vector loop, 3 to 4 times as fast as rotating the sign and storing bytes with a stride.
numpy releases the GIL in each step. The caller passes scratch arrays, so that nothing is allocated per piece.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from tierkv.errors import CorruptBlockError
from tierkv.values.layout import Run

__all__ = [
    "FRAME_BYTES",
    "KEPT_BYTES",
    "LEVEL_3",
    "LITERALS_ONLY",
    "Bytes",
    "Codec",
    "FrameCoder",
    "Words",
    "iter_runs",
    "merge_planes",
    "put_exponents",
    "shift_exponents",
    "take_exponent",
    "take_rest",
    "widen_exponent",
    "widen_rest",
]

Bytes: TypeAlias = "npt.NDArray[np.uint8]"
Words: TypeAlias = "npt.NDArray[np.uint16]"

_REST_MASK = np.uint16(0x807F)  # the sign where a float keeps it, and the seven low bits
_SIGN = np.uint8(0x80)
_LOW = np.uint8(0x7F)
_SEVEN = np.uint16(7)
_EXPONENT_UNIT = np.uint16(1 << 7)
_EIGHT = np.uint16(8)

FRAME_BYTES = 256 << 10
"""Bytes of a run per coded frame: smaller costs ratio, larger leaves no work for parallel decoders."""

KEPT_BYTES = 24 << 20
"""The longest piece of memory that glibc shall keep when it is freed; it regards none longer than 32 MiB."""

LEVEL_3 = zstandard.ZstdCompressionParameters.from_level(3)
LITERALS_ONLY = zstandard.ZstdCompressionParameters(
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
)
"""A match finder that finds nothing: Huffman coding alone. A larger hash_log, a smaller min_match or a
target_length of 1 lose ratio and speed (the last turns Huffman off)."""


class Codec(Protocol):
    """Turns one run into frames and back. The record names it by id and version. Immutable; many threads may use it.

    run: where the run lies in a block, and its dtype and shape; the lossless codecs need its length alone.
    The number of tokens follows from the number of bytes. is_lossy: decoded values are only near the encoded ones.
    """

    name: str
    codec_id: int
    version: int = 1
    is_lossy: bool = False

    def num_frames(self, run: Run, num_tokens: int) -> int:
        """Return how many frames so many tokens of a run have."""

    def encode_run(self, values: Bytes, run: Run, out: Bytes) -> list[int] | None:
        """Write the frames of `values` one after another into `out`, which is as long; return their sizes.

        None if the codec cannot hold these values: the block is then stored raw. Raises ConfigError for a
        dtype that is not the codec's.
        """

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], run: Run, out: Bytes) -> None:
        """Write the run into `out`. Raises CorruptBlockError; allocates no more than some frames' planes."""

    def decode_runs(
        self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, runs: Sequence[Run], num_tokens: int
    ) -> None:
        """Write so many tokens of all runs where they belong in `block`. Raises as `decode_run` does."""
        first = begin = 0
        for run, values in iter_runs(block, runs, num_tokens):
            last = first + self.num_frames(run, num_tokens)
            sizes = frame_sizes[first:last]
            end = begin + sum(sizes)
            self.decode_run(payload[begin:end], sizes, run, values)
            first, begin = last, end


def iter_runs(block: Bytes, runs: Sequence[Run], num_tokens: int) -> Iterator[tuple[Run, Bytes]]:
    """Yield each run and the bytes of its first tokens."""
    for run in runs:
        yield run, block[run.offset_bytes : run.offset_bytes + run.token_bytes * num_tokens]


class FrameCoder(threading.local):
    """One zstd compressor and decompressor per thread: threads must not share them."""

    def __init__(self, parameters: zstandard.ZstdCompressionParameters) -> None:
        _keep_freed_memory()
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, plane: Bytes, out: Bytes) -> int:
        """Write the frame of `plane` at the start of `out`, or the plane where that is shorter; return the size."""
        frame = np.frombuffer(self._compressor.compress(plane.data), dtype=np.uint8)
        if frame.size >= plane.size:
            frame = plane
        out[: frame.size] = frame
        return frame.size

    def decode(self, frame: Bytes, plane_bytes: int) -> Bytes:
        """Return the plane of a frame; it is valid until the next call."""
        if frame.size == plane_bytes:
            return frame
        try:
            _check_size(frame, plane_bytes)
            plane = np.frombuffer(self._decompressor.decompress(frame.data), dtype=np.uint8)
        except zstandard.ZstdError as exc:
            raise CorruptBlockError(f"a frame that does not decode: {exc}") from exc
        if plane.size != plane_bytes:
            raise CorruptBlockError(f"a frame of {plane.size} bytes, expected {plane_bytes}")
        return plane

    def decode_many(self, frames: Sequence[memoryview], plane_bytes: Sequence[int]) -> list[Bytes]:
        """Return the planes of many frames; all coded ones are decoded in one call, without the GIL."""
        coded: list[bytes | bytearray | memoryview] = [
            frame for frame, size in zip(frames, plane_bytes, strict=True) if len(frame) != size
        ]
        sizes = [size for frame, size in zip(frames, plane_bytes, strict=True) if len(frame) != size]
        decoded: Any = ()
        try:
            claimed = list(map(zstandard.frame_content_size, coded))
            if claimed != sizes:  # that claim bounds what zstd allocates
                raise CorruptBlockError("a frame that is not of the size of its plane")
            if coded:
                packed = np.array(sizes, dtype=np.uint64).tobytes()
                decoded = self._decompressor.multi_decompress_to_buffer(coded, decompressed_sizes=packed)
        except (zstandard.ZstdError, ValueError) as exc:
            raise CorruptBlockError(f"a frame that does not decode: {exc}") from exc
        planes = iter(decoded)
        found = [
            np.frombuffer(frame if len(frame) == size else next(planes), dtype=np.uint8)
            for frame, size in zip(frames, plane_bytes, strict=True)
        ]
        if [plane.size for plane in found] != list(plane_bytes):
            raise CorruptBlockError("a frame that does not decode to the size of its plane")
        return found


def _keep_freed_memory() -> None:
    """Have the C library keep memory that is freed, for the next allocation.

    zstd's planes are allocated anew for each piece. glibc returned them to the system each time, and the page faults
    of the next ones took a third of the time of decoding. Once a block of some MiB has been freed, glibc keeps what is
    freed at the end of its memory, up to twice as many bytes (mallopt(3), M_MMAP_THRESHOLD).
    """
    np.empty(KEPT_BYTES, dtype=np.uint8)


def _check_size(frame: Bytes, plane_bytes: int) -> None:
    """Raise CorruptBlockError unless a frame claims the expected size: that claim bounds what zstd allocates."""
    if zstandard.frame_content_size(frame.data) != plane_bytes:
        raise CorruptBlockError(f"a frame that is not of {plane_bytes} bytes")


def take_exponent(values: Words, exponent: Bytes, scratch: Words) -> None:
    """Write the exponent plane of `values`: [n]. `scratch` is [n] and is overwritten."""
    np.right_shift(values, _SEVEN, out=scratch)
    np.copyto(exponent, scratch, casting="unsafe")


def take_rest(values: Words, rest: Bytes, scratch: Words) -> None:
    """Write the plane of signs and low bits of `values`: [n]. `scratch` is [n] and is overwritten."""
    np.right_shift(values, _EIGHT, out=scratch)
    np.copyto(rest, scratch, casting="unsafe")
    np.bitwise_and(rest, _SIGN, out=rest)
    low = scratch.view(np.uint8)[: values.size]
    np.copyto(low, values, casting="unsafe")
    np.bitwise_and(low, _LOW, out=low)
    np.bitwise_or(rest, low, out=rest)


def merge_planes(exponent: Bytes, rest: Bytes, values: Words, scratch: Words) -> None:
    """Write `values` [n] from both planes. `scratch` is [n] and is overwritten."""
    widen_rest(rest, values)
    widen_exponent(exponent, scratch)
    put_exponents(scratch, values)


def widen_rest(rest: Bytes, values: Words) -> None:
    """Write each byte of `rest` [n] where `put_exponents` wants it in `values` [n]."""
    np.copyto(values.view(np.int16), rest.view(np.int8))


def widen_exponent(exponent: Bytes, words: Words) -> None:
    """Write each byte of `exponent` [n] where it belongs in a value: bits 7..14 of `words` [n]."""
    np.multiply(exponent, _EXPONENT_UNIT, out=words, dtype=np.uint16)  # faster than to widen, then to shift


def shift_exponents(words: Words) -> None:
    """Move exponents that were copied to `words` [n] as they are to where `widen_exponent` writes them."""
    np.left_shift(words, _SEVEN, out=words)


def put_exponents(exponent: Words, values: Words) -> None:
    """Finish `values` [n], widened rests, with their widened exponents."""
    np.bitwise_and(values, _REST_MASK, out=values)
    np.bitwise_or(values, exponent, out=values)
