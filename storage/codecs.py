"""Codecs: a run of a block (one layer's K or V) into frames and back, without loss.

`raw` keeps the bytes. `zstd` codes them at level 3. `huffman` codes them without looking for matches, which
is what pays for 8-bit floats. `exponent16` and `exponent32` code only the exponents of floats and keep the
rest raw: sign and mantissa are noise, and so are repetitions, so zstd is told to do literals only.

A coded frame covers at most FRAME_BYTES of the run and is independent: threads, or a GPU, may decode them in
any order. It is a standard zstd frame; one as long as its plane is the plane itself, so that encoding never
makes a run longer.

Codecs are immutable and may be used by many threads; scratch memory is one set per thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import zstandard

from tierkv.errors import ConfigError, CorruptBlockError
from tierkv.storage.planes import Bytes, Words, join_planes, merge_planes, take_exponent, take_rest, widen_rest

__all__ = [
    "CODECS",
    "FRAME_BYTES",
    "RAW",
    "Codec",
    "ExponentCodec",
    "RawCodec",
    "Span",
    "ZstdCodec",
    "codec_by_id",
    "codec_by_name",
    "default_codec",
]

FRAME_BYTES = 256 << 10
"""Bytes of a run per coded frame: smaller costs ratio, larger leaves no work for parallel decoders."""

_MERGE_COUNT = (1 << 20) // 2  # values per merge: 1 MiB of a 16-bit run

_LITERALS_ONLY = zstandard.ZstdCompressionParameters(
    window_log=17,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
)
"""A match finder that never finds: Huffman coding alone. A larger hash_log, a smaller min_match or a
target_length of 1 lose ratio and speed (the last turns Huffman off)."""


Span: TypeAlias = tuple[int, int]
"""Offset and length of a run in a block."""


class Codec(Protocol):
    """Turns one run into frames and back. The record names it by id and version."""

    @property
    def name(self) -> str: ...

    @property
    def codec_id(self) -> int: ...

    @property
    def version(self) -> int: ...

    def num_frames(self, run_bytes: int) -> int:
        """Return how many frames a run of this size has."""

    def encode_run(self, run: Bytes, out: Bytes) -> list[int]:
        """Write the frames of `run` one after another into `out`, as large as the run; return their sizes."""

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], out: Bytes) -> None:
        """Write the run into `out`. Raises CorruptBlockError; allocates no more than a frame's plane."""

    def decode_runs(self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, spans: Sequence[Span]) -> None:
        """Write all runs of a block where they belong. Raises as `decode_run` does."""


class RawCodec:
    """The bytes as they are, in one frame."""

    name = "raw"
    codec_id = 0
    version = 1

    def num_frames(self, run_bytes: int) -> int:
        return 1

    def encode_run(self, run: Bytes, out: Bytes) -> list[int]:
        np.copyto(out, run)
        return [run.size]

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], out: Bytes) -> None:
        if frames.size != out.size:
            raise CorruptBlockError(f"a raw run of {frames.size} bytes where {out.size} belong")
        np.copyto(out, frames)

    def decode_runs(self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, spans: Sequence[Span]) -> None:
        _decode_one_by_one(self, payload, frame_sizes, block, spans)


class ZstdCodec:
    """Whole bytes in zstd frames."""

    version = 1

    def __init__(self, *, name: str, codec_id: int, parameters: zstandard.ZstdCompressionParameters) -> None:
        self.name = name
        self.codec_id = codec_id
        self._frames = _FrameCoder(parameters)

    def num_frames(self, run_bytes: int) -> int:
        return -(-run_bytes // FRAME_BYTES)

    def encode_run(self, run: Bytes, out: Bytes) -> list[int]:
        sizes: list[int] = []
        end = 0
        for start in range(0, run.size, FRAME_BYTES):
            size = self._frames.encode(run[start : start + FRAME_BYTES], out[end:])
            sizes.append(size)
            end += size
        return sizes

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], out: Bytes) -> None:
        begin = 0
        for start, size in zip(range(0, out.size, FRAME_BYTES), frame_sizes, strict=True):
            piece = out[start : start + FRAME_BYTES]
            np.copyto(piece, self._frames.decode(frames[begin : begin + size], piece.size))
            begin += size

    def decode_runs(self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, spans: Sequence[Span]) -> None:
        _decode_one_by_one(self, payload, frame_sizes, block, spans)


class ExponentCodec:
    """The exponent plane of floats in zstd frames, the rest raw.

    One frame for each FRAME_BYTES of the run, then one for everything else: the plane of signs and low (of
    32-bit floats: high) mantissa bits and, for 32-bit floats, the plane of their low 16 bits.
    Planes are merged over several frames at a time: fewer, longer steps let two threads run side by side.
    """

    version = 1

    def __init__(self, *, name: str, codec_id: int, item_bytes: int) -> None:
        assert item_bytes in (2, 4)
        self.name = name
        self.codec_id = codec_id
        self._item_bytes = item_bytes
        self._frame_count = FRAME_BYTES // item_bytes
        self._frames = _FrameCoder(_LITERALS_ONLY)
        self._scratch = _Scratch()

    def num_frames(self, run_bytes: int) -> int:
        return -(-run_bytes // FRAME_BYTES) + 1

    def encode_run(self, run: Bytes, out: Bytes) -> list[int]:
        scratch = self._scratch
        sizes: list[int] = []
        end = 0
        for values, _ in self._iter_values(run):
            exponent = scratch.exponent[: values.size]
            take_exponent(values, exponent, scratch.words[: values.size])
            for start in range(0, values.size, self._frame_count):
                size = self._frames.encode(exponent[start : start + self._frame_count], out[end:])
                sizes.append(size)
                end += size
        count = run.size // self._item_bytes
        rest = out[end : end + run.size - count]
        for values, start in self._iter_values(run):
            take_rest(values, rest[start : start + values.size], scratch.words[: values.size])
        if self._item_bytes == 4:
            np.copyto(rest[count:].view(np.uint16), run.view(np.uint16)[0::2])
        return [*sizes, rest.size]

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], out: Bytes) -> None:
        count = out.size // self._item_bytes
        if frame_sizes[-1] != out.size - count:
            raise CorruptBlockError(f"a rest of {frame_sizes[-1]} bytes for {count} values")
        rest = frames[frames.size - frame_sizes[-1] :]
        words = out.view(np.uint16)
        sizes = iter(frame_sizes)
        begin = 0
        for start in range(0, count, _MERGE_COUNT):
            exponent = self._scratch.exponent[: min(_MERGE_COUNT, count - start)]
            for first in range(0, exponent.size, self._frame_count):
                size = next(sizes)
                plane = exponent[first : first + self._frame_count]
                np.copyto(plane, self._frames.decode(frames[begin : begin + size], plane.size))
                begin += size
            self._merge(exponent, rest[start : start + exponent.size], words, start)
        if self._item_bytes == 4:
            np.copyto(words[0::2], rest[count:].view(np.uint16))

    def decode_runs(self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, spans: Sequence[Span]) -> None:
        """All frames in one call, then several runs in one step: each time that a thread takes the GIL back from
        another costs as much as decoding 100 KiB, and two threads would spend their time on that.
        """
        if self._item_bytes == 4 or max(length for _, length in spans) // 2 > _MERGE_COUNT:
            _decode_one_by_one(self, payload, frame_sizes, block, spans)
            return
        frames, plane_bytes, rests = self._take_apart(payload, frame_sizes, spans)
        planes = iter(self._frames.decode_many(frames, plane_bytes))
        for group in _adjacent(spans, 2 * _MERGE_COUNT):
            start, end = spans[group.start][0], sum(spans[group.stop - 1])
            words = block[start:end].view(np.uint16)
            exponents = self._scratch.words[: words.size]
            done = 0
            for rest in rests[group.start : group.stop]:
                widen_rest(rest, words[done : done + rest.size])
                begin = done
                done += rest.size
                while begin < done:
                    plane = next(planes)
                    np.copyto(exponents[begin : begin + plane.size], plane)
                    begin += plane.size
            join_planes(exponents, words)

    def _take_apart(
        self, payload: Bytes, frame_sizes: Sequence[int], spans: Sequence[Span]
    ) -> tuple[list[Bytes], list[int], list[Bytes]]:
        """Return the coded frames of all runs, the lengths of their planes, and the raw rest of each run."""
        frames: list[Bytes] = []
        plane_bytes: list[int] = []
        rests: list[Bytes] = []
        sizes = iter(frame_sizes)
        begin = 0
        for _, length in spans:
            count = length // self._item_bytes
            for first in range(0, count, self._frame_count):
                size = next(sizes)
                frames.append(payload[begin : begin + size])
                plane_bytes.append(min(self._frame_count, count - first))
                begin += size
            size = next(sizes)
            if size != length - count:
                raise CorruptBlockError(f"a rest of {size} bytes for {count} values")
            rests.append(payload[begin : begin + size])
            begin += size
        return frames, plane_bytes, rests

    def _iter_values(self, run: Bytes) -> Iterator[tuple[Words, int]]:
        """Yield (16-bit values, index of the first), in pieces that stay in cache."""
        words = run.view(np.uint16)
        if self._item_bytes == 4:
            words = words[1::2]
        for start in range(0, words.size, _MERGE_COUNT):
            values = words[start : start + _MERGE_COUNT]
            if self._item_bytes == 4:
                high = self._scratch.high[: values.size]
                np.copyto(high, values)
                values = high
            yield values, start

    def _merge(self, exponent: Bytes, rest: Bytes, words: Words, start: int) -> None:
        count = exponent.size
        scratch = self._scratch.words[:count]
        if self._item_bytes == 2:
            merge_planes(exponent, rest, words[start : start + count], scratch)
            return
        high = self._scratch.high[:count]
        merge_planes(exponent, rest, high, scratch)
        np.copyto(words[1::2][start : start + count], high)


class _FrameCoder(threading.local):
    """One zstd compressor and decompressor per thread: neither may be shared."""

    def __init__(self, parameters: zstandard.ZstdCompressionParameters) -> None:
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._decompressor = zstandard.ZstdDecompressor()

    def encode(self, plane: Bytes, out: Bytes) -> int:
        """Write the frame of `plane` at the start of `out`, or the plane where that is shorter."""
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
            # The frame's own word on its size bounds what zstd allocates: read it first.
            if zstandard.frame_content_size(frame.data) != plane_bytes:
                raise CorruptBlockError(f"a frame that is not of {plane_bytes} bytes")
            plane = np.frombuffer(self._decompressor.decompress(frame.data), dtype=np.uint8)
        except zstandard.ZstdError as exc:
            raise CorruptBlockError(f"a frame that does not decode: {exc}") from exc
        if plane.size != plane_bytes:
            raise CorruptBlockError(f"a frame of {plane.size} bytes where {plane_bytes} belong")
        return plane

    def decode_many(self, frames: Sequence[Bytes], plane_bytes: Sequence[int]) -> list[Bytes]:
        """Return the planes of many frames; all that are coded are decoded at once, without the GIL."""
        planes = list(frames)
        coded = [i for i, frame in enumerate(frames) if frame.size != plane_bytes[i]]
        if not coded:
            return planes
        try:
            for i in coded:  # a frame's own word on its size bounds what zstd writes
                if zstandard.frame_content_size(frames[i].data) != plane_bytes[i]:
                    raise CorruptBlockError(f"a frame that is not of {plane_bytes[i]} bytes")
            sizes = np.array([plane_bytes[i] for i in coded], dtype=np.uint64).tobytes()
            decoded = self._decompressor.multi_decompress_to_buffer(
                [frames[i].data for i in coded], decompressed_sizes=sizes
            )
        except (zstandard.ZstdError, ValueError) as exc:
            raise CorruptBlockError(f"a frame that does not decode: {exc}") from exc
        for at, i in enumerate(coded):
            planes[i] = np.frombuffer(decoded[at], dtype=np.uint8)  # type: ignore[call-overload]  # it has the buffer protocol
            if planes[i].size != plane_bytes[i]:
                raise CorruptBlockError(f"a frame of {planes[i].size} bytes where {plane_bytes[i]} belong")
        return planes


class _Scratch(threading.local):
    """Arrays for one merge; one set per thread."""

    def __init__(self) -> None:
        self.exponent: Bytes = np.empty(_MERGE_COUNT, dtype=np.uint8)
        self.words: Words = np.empty(_MERGE_COUNT, dtype=np.uint16)
        self.high: Words = np.empty(_MERGE_COUNT, dtype=np.uint16)


def _decode_one_by_one(
    codec: Codec, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, spans: Sequence[Span]
) -> None:
    first = begin = 0
    for offset, length in spans:
        last = first + codec.num_frames(length)
        sizes = frame_sizes[first:last]
        end = begin + sum(sizes)
        codec.decode_run(payload[begin:end], sizes, block[offset : offset + length])
        first, begin = last, end


def _adjacent(spans: Sequence[Span], max_bytes: int) -> Iterator[slice]:
    """Yield groups of spans that lie one behind the other and are no longer than `max_bytes` together."""
    first = 0
    for i in range(1, len(spans) + 1):
        if i < len(spans):
            offset, length = spans[i]
            if offset == sum(spans[i - 1]) and offset + length - spans[first][0] <= max_bytes:
                continue
        yield slice(first, i)
        first = i


RAW = RawCodec()
_LEVEL_3 = zstandard.ZstdCompressionParameters.from_level(3)
CODECS: tuple[Codec, ...] = (
    RAW,
    ZstdCodec(name="zstd", codec_id=1, parameters=_LEVEL_3),
    ExponentCodec(name="exponent16", codec_id=2, item_bytes=2),
    ExponentCodec(name="exponent32", codec_id=3, item_bytes=4),
    ZstdCodec(name="huffman", codec_id=4, parameters=_LITERALS_ONLY),
)
"""Every codec this version reads. An id is never given away again."""

_DEFAULTS = {
    "bfloat16": "exponent16",
    "float16": "exponent16",
    "float32": "exponent32",
    "float64": "zstd",
    "float8_e4m3fn": "huffman",
    "float8_e5m2": "huffman",
}


def default_codec(dtype: str) -> Codec:
    """Return the codec that suits a layout's dtype best."""
    return codec_by_name(_DEFAULTS[dtype])


def codec_by_name(name: str) -> Codec:
    """Return the codec of this name. Raises ConfigError."""
    for codec in CODECS:
        if codec.name == name:
            return codec
    raise ConfigError(f"no codec named {name!r}", hint=f"one of {', '.join(c.name for c in CODECS)}")


def codec_by_id(codec_id: int) -> Codec | None:
    """Return the codec that a record names, or None if this version has none of that id."""
    return next((codec for codec in CODECS if codec.codec_id == codec_id), None)
