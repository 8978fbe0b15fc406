"""The lossy codec: half the bytes, for users that accept an error. It is never a default.

`lossy-int8` takes 255 steps for each channel of the keys, and for each token and head of the values: keys have
outlying channels (KIVI, Liu et al., 2024). benchmarks/attention_error.py measures its effect on attention, and
results/lossy_codecs_cpu.txt says why a second codec, float8_e4m3, was removed.

Decoded values encode to the same bytes again: a block may be demoted and promoted any number of times.

The codec takes bfloat16, float16 and float32. It refuses a run with a NaN, an infinity or a number that would round to
one, and a run so short that its scales outweigh the saving; the block is then stored raw. Everything is numpy, in
steps that release the GIL, on arrays that stay in cache.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from tierkv.errors import ConfigError, CorruptBlockError
from tierkv.storage.codec import FRAME_BYTES, LITERALS_ONLY, Bytes, Codec, FrameCoder
from tierkv.values.layout import Run

__all__ = ["FloatFormat", "Floats", "Int8Codec", "float_format"]

Floats: TypeAlias = "npt.NDArray[np.float32]"
FloatWords: TypeAlias = "npt.NDArray[np.unsignedinteger[Any]]"

_PIECE_VALUES = 32 << 10  # numbers per step: the few arrays of it stay in the second cache
_MOST_STEPS = np.float32(127)
_SMALLEST_STEP = np.float32(2.0**-126)  # dividing by it does not overflow
_HALF_OF_BFLOAT16 = np.uint32(0x8000)
_SIXTEEN = np.uint32(16)


@dataclass(frozen=True, slots=True)
class FloatFormat:
    """How a dtype's numbers lie in unsigned integers: numpy has no bfloat16.

    word: the integer. magnitude: its bits beside the sign; as integers they are ordered as the numbers are.
    largest: the magnitude of the largest number of three mantissa bits; infinities and NaNs lie above it.
    """

    name: str
    word: np.dtype[np.unsignedinteger[Any]]
    magnitude: int
    largest: int

    def widen(self, words: FloatWords, out: Floats) -> None:
        """Write the numbers of contiguous `words` [n] into `out` [n]."""
        if self.name == "bfloat16":
            bits = out.view(np.uint32)
            np.copyto(bits, words)
            np.left_shift(bits, _SIXTEEN, out=bits)
        else:
            np.copyto(out, words.view(np.float16 if self.name == "float16" else np.float32))

    def narrow(self, floats: Floats, out: FloatWords) -> None:
        """Write the nearest numbers of this format into contiguous `out` [n]; `floats` [n] is overwritten."""
        if self.name == "bfloat16":
            bits = floats.view(np.uint32)
            np.add(bits, _HALF_OF_BFLOAT16, out=bits)
            np.right_shift(bits, _SIXTEEN, out=bits)
            np.copyto(out, bits, casting="unsafe")
        else:
            np.copyto(out.view(np.float16 if self.name == "float16" else np.float32), floats, casting="same_kind")


_FORMATS = (
    FloatFormat("bfloat16", np.dtype(np.uint16), 0x7FFF, 0x7F70),
    FloatFormat("float16", np.dtype(np.uint16), 0x7FFF, 0x7B80),
    FloatFormat("float32", np.dtype(np.uint32), 0x7FFF_FFFF, 0x7F70_0000),
)


def float_format(dtype: str) -> FloatFormat:
    """Return the format of a layout's dtype. Raises ConfigError for a dtype that the lossy codec does not take."""
    for known in _FORMATS:
        if known.name == dtype:
            return known
    names = ", ".join(known.name for known in _FORMATS)
    raise ConfigError(f"no lossy codec takes {dtype}", hint=f"they take {names}; choose a lossless codec")


class Int8Codec(Codec):
    """-127 to 127 steps, a byte for each number, in frames of whole tokens of at most FRAME_BYTES; then the scales.

    Keys have a scale for each channel (a dim of a head), values for each token and head. A scale is the largest
    magnitude, in the run's own dtype: the step made of it is the same when decoded numbers are encoded again.

    Frames are written plain: Huffman coding takes 4 % off them and decodes at half the speed (K and V of MiniLM).
    Coded frames are read too.
    """

    name = "lossy-int8"
    codec_id = 6
    is_lossy = True

    def __init__(self) -> None:
        self._frames = FrameCoder(LITERALS_ONLY)
        self._scratch = _Scratch()

    def num_frames(self, run: Run, num_tokens: int) -> int:
        return -(-num_tokens // _frame_tokens(run)) + 1

    def encode_run(self, values: Bytes, run: Run, out: Bytes) -> list[int] | None:
        words = _words_of(values, run)
        num_tokens, channels = words.shape
        if words.size + _scale_bytes(run, num_tokens) > values.size:
            return None
        peaks = self._find_peaks(words, run)
        if peaks.max() > float_format(run.dtype).largest:
            return None
        steps = _steps_of(peaks, run)
        plane = out[: words.size].reshape(num_tokens, channels)
        for tokens in _pieces(num_tokens, _piece_tokens(run)):
            self._encode_piece(words[tokens], _steps_at(steps, run, tokens), run, plane[tokens])
        out[words.size : words.size + peaks.nbytes] = peaks.view(np.uint8)
        frames = [(frame.stop - frame.start) * channels for frame in _pieces(num_tokens, _frame_tokens(run))]
        return [*frames, peaks.nbytes]

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], run: Run, out: Bytes) -> None:
        words = _words_of(out, run)
        num_tokens, channels = words.shape
        if frame_sizes[-1] != _scale_bytes(run, num_tokens):
            raise CorruptBlockError(f"scales of {frame_sizes[-1]} bytes for {num_tokens} tokens")
        packed = frames[frames.size - frame_sizes[-1] :].tobytes()  # in a record they need not be aligned
        steps = _steps_of(np.frombuffer(packed, dtype=words.dtype), run)
        begin = 0
        for frame, size in zip(_pieces(num_tokens, _frame_tokens(run)), frame_sizes[:-1], strict=True):
            count = frame.stop - frame.start
            plane = self._frames.decode(frames[begin : begin + size], count * channels).reshape(count, channels)
            for piece in _pieces(count, _piece_tokens(run)):
                tokens = slice(frame.start + piece.start, frame.start + piece.stop)
                self._decode_piece(plane[piece], _steps_at(steps, run, tokens), run, words[tokens])
            begin += size

    def _find_peaks(self, words: FloatWords, run: Run) -> FloatWords:
        """Return the largest magnitude of each channel [channels], or of each token and head [tokens * heads]."""
        mask = words.dtype.type(float_format(run.dtype).magnitude)
        num_tokens, channels = words.shape
        peaks: FloatWords = np.zeros(channels if run.is_key else num_tokens * run.heads, dtype=words.dtype)
        for piece in _pieces(num_tokens, _piece_tokens(run)):
            magnitudes = self._scratch.get("magnitudes", words[piece].shape, words.dtype)
            np.bitwise_and(words[piece], mask, out=magnitudes)
            if run.is_key:
                np.maximum(peaks, magnitudes.max(axis=0), out=peaks)
            else:
                own = peaks[piece.start * run.heads : piece.stop * run.heads]
                np.max(magnitudes.reshape(-1, run.dim), axis=1, out=own)
        return peaks

    def _encode_piece(self, words: FloatWords, steps: Floats, run: Run, plane: Bytes) -> None:
        """Write the bytes of some whole tokens: words and plane [tokens, channels]."""
        floats = self._scratch.get("floats", words.shape, np.float32)
        float_format(run.dtype).widen(words, floats)
        grouped, steps = _grouped(floats, steps, run)
        np.divide(grouped, steps, out=grouped)
        np.rint(floats, out=floats)
        np.copyto(plane.view(np.int8), floats, casting="unsafe")

    def _decode_piece(self, plane: Bytes, steps: Floats, run: Run, words: FloatWords) -> None:
        """Write the numbers of some whole tokens, all of them finite: plane and words [tokens, channels].

        Raises CorruptBlockError for a byte that `_encode_piece` never writes.
        """
        numbers = plane.view(np.int8)
        if numbers.min() < -_MOST_STEPS:
            raise CorruptBlockError("a number of more steps than there are")
        floats = self._scratch.get("floats", plane.shape, np.float32)
        np.copyto(floats, numbers)
        grouped, steps = _grouped(floats, steps, run)
        np.multiply(grouped, steps, out=grouped)
        float_format(run.dtype).narrow(floats, words)


class _Scratch(threading.local):
    """Arrays for one piece, by their use; one set per thread."""

    def __init__(self) -> None:
        self._arrays: dict[str, Bytes] = {}

    def get(self, use: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array with undefined contents."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        held = self._arrays.get(use)
        if held is None or held.size < size:
            held = self._arrays[use] = np.empty(size, dtype=np.uint8)
        array: npt.NDArray[Any] = held[:size].view(dtype).reshape(shape)
        return array


def _steps_of(peaks: FloatWords, run: Run) -> Floats:
    """Return the step for each largest magnitude. Raises CorruptBlockError for one that no number of the run has."""
    form = float_format(run.dtype)
    if peaks.max() > form.largest:  # negative, infinite or no number: magnitudes are compared as integers
        raise CorruptBlockError("a largest magnitude that no number of the run can have")
    steps = np.empty(peaks.size, dtype=np.float32)
    form.widen(peaks, steps)
    np.divide(steps, _MOST_STEPS, out=steps)
    np.maximum(steps, _SMALLEST_STEP, out=steps)
    return steps


def _steps_at(steps: Floats, run: Run, tokens: slice) -> Floats:
    return steps if run.is_key else steps[tokens.start * run.heads : tokens.stop * run.heads]


def _grouped(floats: Floats, steps: Floats, run: Run) -> tuple[Floats, Floats]:
    """Return views of which each row of the first one goes with one step, or with one step a column."""
    return (floats, steps) if run.is_key else (floats.reshape(-1, run.dim), steps.reshape(-1, 1))


def _scale_bytes(run: Run, num_tokens: int) -> int:
    item_bytes = run.token_bytes // (run.heads * run.dim)
    return run.heads * (run.dim if run.is_key else num_tokens) * item_bytes


def _words_of(values: Bytes, run: Run) -> FloatWords:
    """Return a run's numbers as integers [tokens, channels], a view. Raises ConfigError for another dtype."""
    words: FloatWords = values.view(float_format(run.dtype).word).reshape(-1, run.heads * run.dim)
    return words


def _frame_tokens(run: Run) -> int:
    return max(1, FRAME_BYTES // run.token_bytes)


def _piece_tokens(run: Run) -> int:
    return max(1, _PIECE_VALUES // (run.heads * run.dim))


def _pieces(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
