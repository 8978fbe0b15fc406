"""Sums of sampled lines of many tensors, in one launch.

A model's weights are sampled beside every forward pass, so the kernel is small: one program for each piece of a
tensor, no atomics, one number each. Source: multiply-and-add hashing; with odd multipliers a change of one word
always changes the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous

__all__ = ["LINES_PER_PIECE", "LINE_BYTES", "sum_lines"]

LINE_BYTES = 1024
LINES_PER_PIECE = 64
_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}


def sum_lines(pieces: Tensor, sums: Tensor, *, phase: int, word_bytes: int) -> None:
    """Write one sum for each piece, over the lines of its tensor that this phase samples.

    pieces: [4, n] int64, contiguous: the address of the tensor, its size in words, its stride (every how many lines one
    is sampled; those whose number is phase modulo stride are), and the first of the sampled lines that are the piece's,
    which has LINES_PER_PIECE of them. sums: [n] int64 on the same device, written entirely. word_bytes: 8, 4, 2 or 1;
    every address and size is a multiple of it. Asynchronous on the current stream. Raises ShapeError.
    """
    require_contiguous(pieces=pieces, sums=sums)
    require(pieces.dim() == 2 and pieces.shape[0] == 4 and pieces.dtype == torch.int64, "pieces must be [4, n] int64")
    require(sums.dtype == torch.int64 and sums.shape == pieces.shape[1:], "sums must be [n] int64")
    require(sums.device == pieces.device, "sums must lie where the pieces lie")
    require(word_bytes in _WORDS and phase >= 0, f"no words of {word_bytes} bytes, or no phase {phase}")
    count = pieces.shape[1]
    if count:
        _sum_lines[(count,)](
            pieces,
            sums,
            phase,
            count,
            WORD=_WORDS[word_bytes],
            LINE=LINE_BYTES // word_bytes,
            LINES=LINES_PER_PIECE,
            STEP=2 * word_bytes,  # 16 KiB of products at a time, whatever the words
            num_warps=4,
        )


@triton.jit(do_not_specialize=["phase", "count"])
def _sum_lines(
    pieces,
    sums,
    phase,
    count,
    WORD: tl.constexpr,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
    STEP: tl.constexpr,
):
    at = tl.program_id(0)
    words = tl.load(pieces + at).to(tl.pointer_type(WORD))
    num_words = tl.load(pieces + count + at)
    stride = tl.load(pieces + 2 * count + at)
    first = tl.load(pieces + 3 * count + at)
    start = phase % stride
    total = tl.zeros([STEP, LINE], dtype=tl.int64)
    for step in range(0, LINES, STEP):
        lines = (first + step + tl.arange(0, STEP)) * stride + start
        places = lines[:, None] * LINE + tl.arange(0, LINE)[None, :]
        found = tl.load(words + places, mask=places < num_words, other=0).to(tl.int64)
        factors = (places * 0x2545F4914F6CDD1D) ^ (places >> 7)
        total += found * (factors | 1)
    tl.store(sums + at, tl.sum(tl.sum(total, axis=1), axis=0))
