"""The codecs there are, by name and by the id that a record holds, and the exact ones themselves.

`raw` keeps the bytes. `zstd` codes them at level 3. `huffman` codes them without looking for matches, which
suits 8-bit floats. `exponent16` and `exponent32` code only the exponents of floats and keep the
rest raw: sign and mantissa are noise, repetitions are rare, so zstd codes literals alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
import zstandard

from tierkv.errors import ConfigError, CorruptBlockError
from tierkv.storage.codec import (
    FRAME_BYTES,
    LEVEL_3,
    LITERALS_ONLY,
    Bytes,
    Codec,
    FrameCoder,
    Words,
    merge_planes,
    put_exponents,
    shift_exponents,
    take_exponent,
    take_rest,
)
from tierkv.storage.codecs_lossy import Int8Codec
from tierkv.values.layout import Run

__all__ = [
    "CODECS",
    "EXPONENT16",
    "RAW",
    "Codec",
    "check_codec",
    "codec_by_id",
    "codec_by_name",
    "default_codec",
    "fits_namespace",
]

_Span: TypeAlias = tuple[int, int]  # offset and length of a run in a block

_MERGE_COUNT = (1 << 20) // 2  # values per merge: 1 MiB of a 16-bit run


class RawCodec(Codec):
    """The bytes as they are, in one frame."""

    name = "raw"
    codec_id = 0

    def num_frames(self, run: Run, num_tokens: int) -> int:
        return 1

    def encode_run(self, values: Bytes, run: Run, out: Bytes) -> list[int]:
        np.copyto(out, values)
        return [values.size]

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], run: Run, out: Bytes) -> None:
        if frames.size != out.size:
            raise CorruptBlockError(f"a raw run of {frames.size} bytes, expected {out.size}")
        np.copyto(out, frames)


class ZstdCodec(Codec):
    """Whole bytes in zstd frames."""

    def __init__(self, *, name: str, codec_id: int, parameters: zstandard.ZstdCompressionParameters) -> None:
        self.name = name
        self.codec_id = codec_id
        self._frames = FrameCoder(parameters)

    def num_frames(self, run: Run, num_tokens: int) -> int:
        return -(-run.token_bytes * num_tokens // FRAME_BYTES)

    def encode_run(self, values: Bytes, run: Run, out: Bytes) -> list[int]:
        sizes: list[int] = []
        end = 0
        for start in range(0, values.size, FRAME_BYTES):
            size = self._frames.encode(values[start : start + FRAME_BYTES], out[end:])
            sizes.append(size)
            end += size
        return sizes

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], run: Run, out: Bytes) -> None:
        begin = 0
        for start, size in zip(range(0, out.size, FRAME_BYTES), frame_sizes, strict=True):
            piece = out[start : start + FRAME_BYTES]
            np.copyto(piece, self._frames.decode(frames[begin : begin + size], piece.size))
            begin += size


class ExponentCodec(Codec):
    """The exponent plane of floats in zstd frames, the rest raw.

    One frame for each FRAME_BYTES of the run, then one for everything else: the plane of signs and low (of
    32-bit floats: high) mantissa bits and, for 32-bit floats, the plane of their low 16 bits.
    Planes are merged over several frames at a time: fewer, longer steps let two threads run side by side.
    """

    def __init__(self, *, name: str, codec_id: int, item_bytes: int) -> None:
        assert item_bytes in (2, 4)
        self.name = name
        self.codec_id = codec_id
        self._item_bytes = item_bytes
        self._frame_count = FRAME_BYTES // item_bytes
        self._frames = FrameCoder(LITERALS_ONLY)
        self._scratch = _Scratch()

    def num_frames(self, run: Run, num_tokens: int) -> int:
        return -(-run.token_bytes * num_tokens // FRAME_BYTES) + 1

    def encode_run(self, values: Bytes, run: Run, out: Bytes) -> list[int]:
        scratch = self._scratch
        sizes: list[int] = []
        end = 0
        for words, _ in self._iter_words(values):
            exponent = scratch.exponent[: words.size]
            take_exponent(words, exponent, scratch.words[: words.size])
            for start in range(0, words.size, self._frame_count):
                size = self._frames.encode(exponent[start : start + self._frame_count], out[end:])
                sizes.append(size)
                end += size
        count = values.size // self._item_bytes
        rest = out[end : end + values.size - count]
        for words, start in self._iter_words(values):
            take_rest(words, rest[start : start + words.size], scratch.words[: words.size])
        if self._item_bytes == 4:
            np.copyto(rest[count:].view(np.uint16), values.view(np.uint16)[0::2])
        return [*sizes, rest.size]

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], run: Run, out: Bytes) -> None:
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

    def decode_runs(
        self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, runs: Sequence[Run], num_tokens: int
    ) -> None:
        """All frames in one call, then several runs in one step: each time that a thread takes the GIL again from
        another costs as much as decoding 100 KiB, and two threads would spend their time on that.
        """
        if self._item_bytes == 4 or max(run.token_bytes for run in runs) * num_tokens // 2 > _MERGE_COUNT:
            super().decode_runs(payload, frame_sizes, block, runs, num_tokens)
            return
        spans = [(run.offset_bytes, run.token_bytes * num_tokens) for run in runs]
        frames, plane_bytes, rests = self._take_apart(payload.data, frame_sizes, spans)
        planes = iter(self._frames.decode_many(frames, plane_bytes))
        signed = payload.view(np.int8)
        for group in _adjacent(spans, 2 * _MERGE_COUNT):
            start, end = spans[group.start][0], sum(spans[group.stop - 1])
            words = block[start:end].view(np.uint16)
            target, exponents = words.view(np.int16), self._scratch.words[: words.size]
            done = 0
            for begin, (_, length) in zip(rests[group], spans[group], strict=True):
                count = length // 2
                np.copyto(target[done : done + count], signed[begin : begin + count])  # as `widen_rest`
                run_end = done + count
                while done < run_end:
                    plane = next(planes)
                    np.copyto(exponents[done : done + plane.size], plane)
                    done += plane.size
            shift_exponents(exponents)  # once for all: a call for each plane costs more than the bytes do
            put_exponents(exponents, words)

    def _take_apart(
        self, payload: memoryview, frame_sizes: Sequence[int], spans: Sequence[_Span]
    ) -> tuple[list[memoryview], list[int], list[int]]:
        """Return the coded frames of all runs, the lengths of their planes, and where each run's raw rest begins."""
        frames: list[memoryview] = []
        plane_bytes: list[int] = []
        rests: list[int] = []
        most = self._frame_count
        begin = number = 0
        for _, length in spans:
            left = length // self._item_bytes
            rest_bytes = length - left
            while left > 0:
                end = begin + frame_sizes[number]
                frames.append(payload[begin:end])
                plane_bytes.append(min(most, left))
                begin = end
                left -= most
                number += 1
            if frame_sizes[number] != rest_bytes or length % self._item_bytes:  # else a last byte would have no value
                raise CorruptBlockError(f"a rest of {frame_sizes[number]} bytes in a run of {length}")
            rests.append(begin)
            begin += rest_bytes
            number += 1
        return frames, plane_bytes, rests

    def _iter_words(self, values: Bytes) -> Iterator[tuple[Words, int]]:
        """Yield (the 16 bits of each value with its exponent, index of the first), in pieces that stay in cache."""
        words = values.view(np.uint16)
        if self._item_bytes == 4:
            words = words[1::2]
        for start in range(0, words.size, _MERGE_COUNT):
            piece = words[start : start + _MERGE_COUNT]
            if self._item_bytes == 4:
                high = self._scratch.high[: piece.size]
                np.copyto(high, piece)
                piece = high
            yield piece, start

    def _merge(self, exponent: Bytes, rest: Bytes, words: Words, start: int) -> None:
        count = exponent.size
        scratch = self._scratch.words[:count]
        if self._item_bytes == 2:
            merge_planes(exponent, rest, words[start : start + count], scratch)
            return
        high = self._scratch.high[:count]
        merge_planes(exponent, rest, high, scratch)
        np.copyto(words[1::2][start : start + count], high)


class _Scratch(threading.local):
    """Arrays for one merge; one set per thread."""

    def __init__(self) -> None:
        self.exponent: Bytes = np.empty(_MERGE_COUNT, dtype=np.uint8)
        self.words: Words = np.empty(_MERGE_COUNT, dtype=np.uint16)
        self.high: Words = np.empty(_MERGE_COUNT, dtype=np.uint16)


def _adjacent(spans: Sequence[_Span], max_bytes: int) -> Iterator[slice]:
    """Yield groups of adjacent spans that are no longer than `max_bytes` together."""
    first = 0
    for i in range(1, len(spans) + 1):
        if i < len(spans):
            offset, length = spans[i]
            if offset == sum(spans[i - 1]) and offset + length - spans[first][0] <= max_bytes:
                continue
        yield slice(first, i)
        first = i


RAW = RawCodec()
EXPONENT16 = ExponentCodec(name="exponent16", codec_id=2, item_bytes=2)
CODECS: tuple[Codec, ...] = (
    RAW,
    ZstdCodec(name="zstd", codec_id=1, parameters=LEVEL_3),
    EXPONENT16,
    ExponentCodec(name="exponent32", codec_id=3, item_bytes=4),
    ZstdCodec(name="huffman", codec_id=4, parameters=LITERALS_ONLY),
    Int8Codec(),
)
"""Every codec that this version reads. No id is used twice: 5 was lossy-fp8-e4m3, whose records are a miss now."""

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


def fits_namespace(codec: str, lossy_codec: str) -> bool:
    """Return whether a namespace may have records of a codec. Every reader and every writer of records checks this.

    codec: its name. lossy_codec: the namespace's, "" if it is exact. An exact namespace has records of every lossless
    codec. A lossy namespace has records of its own codec, and raw records of the blocks that its codec cannot hold.
    """
    if lossy_codec:
        return codec in (lossy_codec, RAW.name)
    return any(known.name == codec and not known.is_lossy for known in CODECS)


def check_codec(codec: str, lossy_codec: str) -> None:
    """Raise CorruptBlockError unless `fits_namespace`: a record that does not fit is damage, and a miss."""
    if not fits_namespace(codec, lossy_codec):
        kind = f"is of {lossy_codec}" if lossy_codec else "is exact"
        raise CorruptBlockError(f"a record of {codec} in a namespace that {kind}")
