"""The codecs that give back something near: half the bytes, for who accepts an error. Never a default.

`lossy-int8` takes 255 steps for each channel of the keys and for each token and head of the values, since keys have
outlying channels (KIVI, Liu et al., 2024). `lossy-fp8-e4m3` rounds to three bits of mantissa; its scale, one for
each head, is a power of two, since a finer one changes the error by nothing: so decoding is exact, a shift and an
addition on integers. attention_error.py measures what either does to attention.

What was decoded is encoded to the same numbers again: a block may go up and down as often as it likes.

Both take bfloat16, float16 and float32. Each refuses a run that it cannot hold, with a NaN, an infinity or a number
that would round to one, or so short that its scales outweigh what is saved; the block is then stored raw.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from tierkv.errors import CorruptBlockError
from tierkv.storage.codec import decode_one_by_one
from tierkv.storage.float_words import FloatWords, float_format
from tierkv.storage.frames import FRAME_BYTES, LITERALS_ONLY, FrameCoder
from tierkv.storage.planes import Bytes
from tierkv.storage.quantisers import Quantiser, Scales, Scratch
from tierkv.values.layout import Run

__all__ = ["LossyCodec"]

_PIECE_VALUES = 32 << 10  # numbers per step: the few arrays of it stay in the second cache


class LossyCodec:
    """A byte for each number, in frames of whole tokens, at most FRAME_BYTES of the run; then a frame of scales.

    is_coded: whether the frames are written with Huffman coding; they may be read so or plain. It takes 17 % off
    fp8's exponents, but 4 % off int8's steps, and either decodes at half the speed (K and V of MiniLM).
    """

    version = 1
    is_lossy = True

    def __init__(self, *, name: str, codec_id: int, quantiser: Quantiser, is_coded: bool) -> None:
        self.name = name
        self.codec_id = codec_id
        self._quantiser = quantiser
        self._is_coded = is_coded
        self._frames = FrameCoder(LITERALS_ONLY)
        self._scratch = Scratch()

    def num_frames(self, run: Run, num_tokens: int) -> int:
        return -(-num_tokens // _frame_tokens(run)) + 1

    def encode_run(self, values: Bytes, run: Run, out: Bytes) -> list[int] | None:
        words = _words_of(values, run)
        num_tokens, channels = words.shape
        if num_tokens * channels + self._quantiser.scale_bytes(run, num_tokens) > values.size:
            return None
        peaks = self._find_peaks(words, run)
        if peaks.max() > float_format(run.dtype).largest:
            return None
        packed = self._quantiser.pack_scales(peaks, run)
        scales = self._quantiser.unpack_scales(packed, run)
        sizes: list[int] = []
        end = 0
        for frame in _pieces(num_tokens, _frame_tokens(run)):
            plane = self._scratch.get("plane", (frame.stop - frame.start, channels), np.uint8)
            for piece in _pieces(len(plane), _piece_tokens(run)):
                tokens = slice(frame.start + piece.start, frame.start + piece.stop)
                self._quantiser.encode(words[tokens], self._scales_of(scales, run, tokens), run, plane[piece])
            sizes.append(self._write_frame(plane.reshape(-1), out[end:]))
            end += sizes[-1]
        out[end : end + packed.size] = packed
        return [*sizes, packed.size]

    def decode_run(self, frames: Bytes, frame_sizes: Sequence[int], run: Run, out: Bytes) -> None:
        words = _words_of(out, run)
        num_tokens, channels = words.shape
        if frame_sizes[-1] != self._quantiser.scale_bytes(run, num_tokens):
            raise CorruptBlockError(f"scales of {frame_sizes[-1]} bytes for {num_tokens} tokens")
        scales = self._quantiser.unpack_scales(frames[frames.size - frame_sizes[-1] :], run)
        begin = 0
        for frame, size in zip(_pieces(num_tokens, _frame_tokens(run)), frame_sizes[:-1], strict=True):
            count = frame.stop - frame.start
            plane = self._frames.decode(frames[begin : begin + size], count * channels).reshape(count, channels)
            for piece in _pieces(count, _piece_tokens(run)):
                tokens = slice(frame.start + piece.start, frame.start + piece.stop)
                self._quantiser.decode(plane[piece], self._scales_of(scales, run, tokens), run, words[tokens])
            begin += size

    def decode_runs(
        self, payload: Bytes, frame_sizes: Sequence[int], block: Bytes, runs: Sequence[Run], num_tokens: int
    ) -> None:
        decode_one_by_one(self, payload, frame_sizes, block, runs, num_tokens)

    def _write_frame(self, plane: Bytes, out: Bytes) -> int:
        if self._is_coded:
            return self._frames.encode(plane, out)
        out[: plane.size] = plane
        return plane.size

    def _find_peaks(self, words: FloatWords, run: Run) -> FloatWords:
        """Return the largest magnitude of each channel [channels], or of each token and head [tokens * heads]."""
        mask = words.dtype.type(float_format(run.dtype).magnitude)
        is_per_token = self._quantiser.is_per_token(run)
        num_tokens, channels = words.shape
        peaks: FloatWords = np.zeros(num_tokens * run.heads if is_per_token else channels, dtype=words.dtype)
        for piece in _pieces(num_tokens, _piece_tokens(run)):
            magnitudes = self._scratch.get("magnitudes", words[piece].shape, words.dtype)
            np.bitwise_and(words[piece], mask, out=magnitudes)
            if is_per_token:
                own = peaks[piece.start * run.heads : piece.stop * run.heads]
                np.max(magnitudes.reshape(-1, run.dim), axis=1, out=own)
            else:
                np.maximum(peaks, magnitudes.max(axis=0), out=peaks)
        return peaks

    def _scales_of(self, scales: Scales, run: Run, tokens: slice) -> Scales:
        is_per_token = self._quantiser.is_per_token(run)
        return scales[tokens.start * run.heads : tokens.stop * run.heads] if is_per_token else scales


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
