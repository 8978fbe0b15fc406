"""Numbers to bytes and back: eight-bit integers with a step, and eight-bit floats with a power of two.

A piece is some whole tokens of a run, [tokens, channels], where channels are heads times dims. Everything is done in
numpy, in steps that release the GIL, on arrays that stay in cache.
"""

from __future__ import annotations

import threading
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from tierkv.errors import CorruptBlockError
from tierkv.storage.float_words import FloatWords, float_format
from tierkv.storage.planes import Bytes
from tierkv.values.layout import Run

__all__ = ["Fp8Quantiser", "Int8Quantiser", "Quantiser", "Scales", "Scratch"]

Scales: TypeAlias = "npt.NDArray[Any]"

_MOST_STEPS = np.float32(127)
_SMALLEST_STEP = np.float32(2.0**-126)  # dividing by it does not overflow
_FP8_LARGEST = 0x7E  # 448; one above it is NaN
_FP8_SMALLEST_NORMAL = 8  # its code, and that of all with exponent bits, is at least this
_FP8_EXPONENT = np.uint8(0x78)
_FP8_SIGN = np.uint8(0x80)
_FP8_MAGNITUDE = np.uint8(0x7F)
_FP8_LARGEST_CODE = {
    "bfloat16": 0x7F7,
    "float32": 0x7F7,
    "float16": 0x477,
}  # exponent as float32's, mantissa: of `largest`


class Scratch(threading.local):
    """Arrays for one piece, by what they are used for; one set per thread."""

    def __init__(self) -> None:
        self._arrays: dict[str, Bytes] = {}

    def get(self, use: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array with anything in it."""
        count = int(np.prod(shape))
        size = count * np.dtype(dtype).itemsize
        held = self._arrays.get(use)
        if held is None or held.size < size:
            held = self._arrays[use] = np.empty(size, dtype=np.uint8)
        array: npt.NDArray[Any] = held[:size].view(dtype).reshape(shape)
        return array


class Quantiser(Protocol):
    """One byte for each number. A scale belongs to a channel, or to a token and head, as `is_per_token` says."""

    def is_per_token(self, run: Run) -> bool: ...

    def scale_bytes(self, run: Run, num_tokens: int) -> int:
        """Return how many bytes the scales of so many tokens take."""

    def pack_scales(self, peaks: FloatWords, run: Run) -> Bytes:
        """Return the scales for the largest magnitudes of all channels, or of all tokens and heads."""

    def unpack_scales(self, packed: Bytes, run: Run) -> Scales:
        """Return what was packed, one item for each channel, or for each token and head.

        Raises CorruptBlockError for what `pack_scales` never writes.
        """

    def encode(self, words: FloatWords, scales: Scales, run: Run, plane: Bytes) -> None:
        """Write the bytes of a piece: words and plane [tokens, channels]."""

    def decode(self, plane: Bytes, scales: Scales, run: Run, words: FloatWords) -> None:
        """Write the numbers of a piece: plane and words [tokens, channels].

        Raises CorruptBlockError for bytes that `encode` never writes: all numbers that come of the others are finite.
        """


class Int8Quantiser:
    """-127 to 127 steps. Keys have a step for each channel, since some are outliers; values for each token and head.

    The largest magnitude is kept instead of the step, in the run's own dtype: the step made of it is the same when the
    decoded numbers are encoded again.
    """

    def __init__(self) -> None:
        self._scratch = Scratch()

    def is_per_token(self, run: Run) -> bool:
        return not run.is_key

    def scale_bytes(self, run: Run, num_tokens: int) -> int:
        item_bytes = run.token_bytes // (run.heads * run.dim)
        return run.heads * (run.dim if run.is_key else num_tokens) * item_bytes

    def pack_scales(self, peaks: FloatWords, run: Run) -> Bytes:
        return peaks.view(np.uint8)

    def unpack_scales(self, packed: Bytes, run: Run) -> Scales:
        form = float_format(run.dtype)
        peaks = np.frombuffer(packed.tobytes(), dtype=form.word)  # in a record they need not be aligned
        if peaks.max() > form.largest:  # negative, infinite or no number: magnitudes are compared as integers
            raise CorruptBlockError("a largest magnitude that no number of the run can have")
        steps = np.empty(peaks.size, dtype=np.float32)
        form.widen(peaks, steps)
        np.divide(steps, _MOST_STEPS, out=steps)
        np.maximum(steps, _SMALLEST_STEP, out=steps)
        return steps

    def encode(self, words: FloatWords, scales: Scales, run: Run, plane: Bytes) -> None:
        floats = self._scratch.get("floats", words.shape, np.float32)
        float_format(run.dtype).widen(words, floats)
        grouped = self._grouped(floats, run)
        np.divide(grouped, scales.reshape(-1, 1) if self.is_per_token(run) else scales, out=grouped)
        np.rint(floats, out=floats)
        np.copyto(plane.view(np.int8), floats, casting="unsafe")

    def decode(self, plane: Bytes, scales: Scales, run: Run, words: FloatWords) -> None:
        steps = plane.view(np.int8)
        if steps.min() < -_MOST_STEPS:
            raise CorruptBlockError("a number of more steps than there are")
        floats = self._scratch.get("floats", plane.shape, np.float32)
        np.copyto(floats, steps)
        grouped = self._grouped(floats, run)
        np.multiply(grouped, scales.reshape(-1, 1) if self.is_per_token(run) else scales, out=grouped)
        float_format(run.dtype).narrow(floats, words)

    def _grouped(self, floats: npt.NDArray[np.float32], run: Run) -> npt.NDArray[np.float32]:
        return floats.reshape(-1, run.dim) if self.is_per_token(run) else floats


class Fp8Quantiser:
    """e4m3 as in float8_e4m3fn, times 2 ** (scale - 120), a scale for each head.

    bfloat16 and float32 have the same eight bits of exponent: an e4m3 number's bits, put where those of the wider one
    begin, mean 2 ** -120 of it, and the scale is added to its exponent. float16 goes through float32.
    """

    def __init__(self) -> None:
        self._scratch = Scratch()

    def is_per_token(self, run: Run) -> bool:
        return False

    def scale_bytes(self, run: Run, num_tokens: int) -> int:
        return run.heads

    def pack_scales(self, peaks: FloatWords, run: Run) -> Bytes:
        words = self._as_wide(peaks.reshape(1, -1), run)
        codes = self._round(words).reshape(run.heads, run.dim).max(axis=1)
        scales: Bytes = _scale_of(codes.astype(np.int32)).astype(np.uint8)
        return scales

    def unpack_scales(self, packed: Bytes, run: Run) -> Scales:
        if packed.min() < 1 or packed.max() > _scale_of(_FP8_LARGEST_CODE[run.dtype]):
            raise CorruptBlockError("a scale that no number of the run can have")
        return np.repeat(packed, run.dim).astype(np.int16)

    def encode(self, words: FloatWords, scales: Scales, run: Run, plane: Bytes) -> None:
        wide = self._as_wide(words, run)
        codes = self._round(wide)
        np.subtract(codes, scales * np.int16(8), out=codes)
        flat, small = codes.reshape(-1), np.flatnonzero(codes < _FP8_SMALLEST_NORMAL)
        if small.size:  # below the normal numbers a code is a multiple of 2 ** -9
            flat[small] = np.rint(np.ldexp(self._magnitudes(wide, small), 129 - scales[small % scales.size]))
        np.copyto(plane, codes, casting="unsafe")
        signs = self._scratch.get("signs", words.shape, np.uint8)
        np.copyto(signs, np.right_shift(wide, 8 * wide.itemsize - 8, out=wide), casting="unsafe")
        np.bitwise_and(signs, _FP8_SIGN, out=signs)
        np.bitwise_or(plane, signs, out=plane)

    def decode(self, plane: Bytes, scales: Scales, run: Run, words: FloatWords) -> None:
        self._check(plane, scales, run)
        is_half = run.dtype == "float16"
        wide = self._scratch.get("wide", plane.shape, np.uint32) if is_half else words
        kind, shift = (np.int16, 4) if wide.itemsize == 2 else (np.int32, 20)
        np.copyto(wide.view(kind), plane.view(np.int8))
        np.left_shift(wide, shift, out=wide)
        np.bitwise_and(wide, wide.dtype.type(0x87F << shift), out=wide)
        np.add(wide, scales.astype(wide.dtype) << wide.dtype.type(shift + 3), out=wide)
        small = np.flatnonzero((plane & _FP8_EXPONENT) == 0)
        if small.size:
            self._put_small(plane.reshape(-1)[small], scales[small % scales.size], wide, small)
        if is_half:
            float_format("float16").narrow(wide.view(np.float32), words)

    def _check(self, plane: Bytes, scales: Scales, run: Run) -> None:
        """Raise CorruptBlockError for NaN, and for a number too large for the run."""
        codes = self._scratch.get("magnitudes", plane.shape, np.uint8)
        np.bitwise_and(plane, _FP8_MAGNITUDE, out=codes)
        largest = _FP8_LARGEST_CODE[run.dtype]
        if codes.max() > _FP8_LARGEST or (
            int(codes.max()) + 8 * int(scales.max()) > largest and np.any(codes + scales * np.int16(8) > largest)
        ):
            raise CorruptBlockError("a number that is none, or too large for its dtype")

    def _put_small(self, codes: Bytes, scales: Scales, wide: FloatWords, places: npt.NDArray[np.intp]) -> None:
        """Write numbers without exponent bits, zeros among them: multiples of 2 ** -9."""
        magnitudes = np.ldexp((codes & np.uint8(7)).astype(np.float32), scales.astype(np.int32) - 129)
        small = np.where(codes & _FP8_SIGN, -magnitudes, magnitudes).astype(np.float32).view(np.uint32)
        wide.reshape(-1)[places] = (small >> np.uint32(32 - 8 * wide.itemsize)).astype(wide.dtype)

    def _as_wide(self, words: FloatWords, run: Run) -> FloatWords:
        """Return a copy of words with eight bits of exponent."""
        if run.dtype == "float16":
            wide = self._scratch.get("wide", words.shape, np.uint32)
            float_format("float16").widen(words, wide.view(np.float32))
            return wide
        wide = self._scratch.get("wide", words.shape, words.dtype)
        np.copyto(wide, words)
        return wide

    def _round(self, wide: FloatWords) -> npt.NDArray[np.int16]:
        """Return exponent and three bits of mantissa of the magnitudes, the last of them rounded to even."""
        shift, one = wide.dtype.type(4 if wide.itemsize == 2 else 20), wide.dtype.type(1)
        rounded = self._scratch.get("rounded", wide.shape, wide.dtype)
        odd = self._scratch.get("odd", wide.shape, wide.dtype)
        np.bitwise_and(wide, wide.dtype.type(0x7FF << int(shift) | (1 << int(shift)) - 1), out=rounded)
        np.right_shift(rounded, shift, out=odd)
        np.bitwise_and(odd, one, out=odd)
        np.add(rounded, odd, out=rounded)
        np.add(rounded, wide.dtype.type((1 << int(shift) - 1) - 1), out=rounded)
        np.right_shift(rounded, shift, out=rounded)
        codes: npt.NDArray[np.int16] = self._scratch.get("codes", wide.shape, np.int16)
        np.copyto(codes, rounded, casting="unsafe")
        return codes

    def _magnitudes(self, wide: FloatWords, places: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        chosen = wide.reshape(-1)[places].astype(np.uint32) << np.uint32(32 - 8 * wide.itemsize)
        magnitudes: npt.NDArray[np.float64] = np.abs(chosen.view(np.float32)).astype(np.float64)
        return magnitudes


def _scale_of(code: Any) -> Any:
    """Return the smallest scale with which a number of this code, or each of an array of them, is an e4m3 number."""
    return np.maximum(-(-(code - _FP8_LARGEST) // 8), 1)
