"""Chooses a token from each row of logits: greedy rows and sampled rows in one launch, without a sort.

A sampled row takes the token with the largest score/temperature + Gumbel noise, which is a draw from the softmax. The
noise is a hash of the row's key and the token id, so a row's token depends on nothing outside the row. `top_k` and
`top_p` are thresholds on the score; a search over the bits of a float finds them in 8 passes (16-bit floats) or 16.
Source: the Gumbel-max trick; the sorting-free sampling of FlashInfer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous

__all__ = ["COLUMNS", "choose_tokens"]

COLUMNS = 6
"""Of a row's settings, int32: temperature (float32 bits; 0 is greedy), top_k (0: all), top_p (float32 bits; 1: all),
the key's low and high word, and whether the log-probability of the token is wanted."""

# By dtype: how many bits of a float32 such a number never uses, less what makes the rest an even number of bits.
_UNUSED_BITS = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}
_BLOCK = 8192


def choose_tokens(
    logits: Tensor, settings: Tensor | None, out: Tensor, *, is_sampled: bool, has_logprobs: bool
) -> None:
    """Choose a token for each row, and compute its log-probability under the plain softmax where it is wanted.

    logits: [rows, vocabulary], bfloat16, float16 or float32, each row contiguous. settings: [rows, COLUMNS] int32 on
    the same device; None if every row is greedy and no log-probability is wanted. out: [2, rows] int32, written
    entirely: token ids, and the bits of float32 log-probabilities (0 where not wanted).
    is_sampled: some row has a temperature. has_logprobs: some row wants its log-probability. Ties of greedy rows go to
    the lowest id; tokens that tie with the last one in `top_k` or `top_p` are kept. Asynchronous on the current stream.
    Raises ShapeError before launching anything.
    """
    require(logits.dim() == 2 and logits.shape[1] > 0, "logits must be [rows, vocabulary]")
    require(logits.dtype in _UNUSED_BITS, f"logits of {logits.dtype} are not supported")
    require(logits.stride(1) == 1, "each row of logits must be contiguous")
    rows, vocabulary = logits.shape
    require_contiguous(out=out)
    require(out.shape == (2, rows) and out.dtype == torch.int32, "out must be [2, rows] int32")
    has_settings = is_sampled or has_logprobs
    require(not has_settings or settings is not None, "sampled rows and log-probabilities need settings")
    if settings is not None:
        require_contiguous(settings=settings)
        fits = settings.shape == (rows, COLUMNS) and settings.dtype == torch.int32
        require(fits, f"settings must be [rows, {COLUMNS}] int32")
    require(len({each.device for each in (logits, out, settings) if each is not None}) == 1, "several devices")
    if not rows:
        return
    _choose[(rows,)](
        logits,
        settings if settings is not None else out,
        out,
        rows,
        vocabulary,
        logits.stride(0),
        COLUMNS=COLUMNS,
        SAMPLED=is_sampled,
        LOGPROBS=has_logprobs,
        UNUSED_BITS=_UNUSED_BITS[logits.dtype],
        BLOCK=min(_BLOCK, triton.next_power_of_2(vocabulary)),
        num_warps=16,
    )


@triton.jit
def _choose(
    logits,
    settings,
    out,
    rows,
    vocabulary,
    row_stride,
    COLUMNS: tl.constexpr,
    SAMPLED: tl.constexpr,
    LOGPROBS: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row."""
    row = tl.program_id(0)
    base = logits + row.to(tl.int64) * row_stride
    within = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    for start in range(0, vocabulary, BLOCK):
        ids = start + within
        score = tl.load(base + ids, mask=ids < vocabulary, other=-float("inf")).to(tl.float32)
        at = tl.where(score > best, ids, at)
        best = tl.maximum(score, best)
    top = tl.max(best, 0)
    token = tl.min(tl.where(best == top, at, vocabulary), 0)
    token = tl.where(token < vocabulary, token, 0)
    own = settings + row * COLUMNS
    if SAMPLED:
        temperature = tl.load(own).to(tl.float32, bitcast=True)
        if temperature > 0:
            top_k = tl.load(own + 1)
            top_p = tl.load(own + 2).to(tl.float32, bitcast=True)
            least = (row * 0).to(tl.uint32)
            if top_k > 0:
                wanted = top_k.to(tl.float32)
                least = _threshold(
                    base, vocabulary, least, wanted, top, temperature, False, UNUSED_BITS=UNUSED_BITS, BLOCK=BLOCK
                )
            if top_p < 1:
                mass = tl.zeros([BLOCK], tl.float32)
                for start in range(0, vocabulary, BLOCK):
                    ids = start + within
                    score = tl.load(base + ids, mask=ids < vocabulary, other=-float("inf")).to(tl.float32)
                    weight = tl.exp((score - top) / temperature)
                    mass += tl.where((_ordered(score, UNUSED_BITS) >= least) & (ids < vocabulary), weight, 0.0)
                wanted = top_p * tl.sum(mass, 0)
                least = _threshold(
                    base, vocabulary, least, wanted, top, temperature, True, UNUSED_BITS=UNUSED_BITS, BLOCK=BLOCK
                )
            low = tl.load(own + 3).to(tl.uint32, bitcast=True)
            high = tl.load(own + 4).to(tl.uint32, bitcast=True)
            best = tl.full([BLOCK], -float("inf"), tl.float32)
            at = tl.zeros([BLOCK], tl.int32) + vocabulary
            for start in range(0, vocabulary, BLOCK):
                ids = start + within
                score = tl.load(base + ids, mask=ids < vocabulary, other=-float("inf")).to(tl.float32)
                drawn = (score - top) / temperature - tl.log(_exponential(ids, low, high))
                is_kept = (_ordered(score, UNUSED_BITS) >= least) & (ids < vocabulary)
                drawn = tl.where(is_kept, drawn, -float("inf"))
                at = tl.where(drawn > best, ids, at)
                best = tl.maximum(drawn, best)
            found = tl.min(tl.where(best == tl.max(best, 0), at, vocabulary), 0)
            token = tl.where(found < vocabulary, found, token)
    logprob = tl.full([], 0.0, tl.float32)
    if LOGPROBS:  # noqa: SIM102 - one is a constant of the compiler, the other a number of the row
        if tl.load(own + 5) != 0:
            mass = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocabulary, BLOCK):
                ids = start + within
                score = tl.load(base + ids, mask=ids < vocabulary, other=-float("inf")).to(tl.float32)
                mass += tl.exp(score - top)
            logprob = tl.load(base + token).to(tl.float32) - top - tl.log(tl.sum(mass, 0))
    tl.store(out + row, token)
    tl.store(out + rows + row, logprob.to(tl.int32, bitcast=True))


@triton.jit
def _threshold(
    base,
    vocabulary,
    least,
    wanted,
    top,
    temperature,
    BY_MASS: tl.constexpr,
    UNUSED_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the largest score, as an ordered number, from which on tokens have the wanted count or weight together.

    Two bits a pass. Tokens below `least` count nothing.
    """
    within = tl.arange(0, BLOCK)
    found = least * 0
    for step in range((32 - UNUSED_BITS) // 2):
        unit = (found * 0 + 1) << (30 - UNUSED_BITS - 2 * step)
        first, second, third = found + unit, found + 2 * unit, found + 3 * unit
        sum1 = tl.zeros([BLOCK], tl.float32)
        sum2 = tl.zeros([BLOCK], tl.float32)
        sum3 = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocabulary, BLOCK):
            ids = start + within
            score = tl.load(base + ids, mask=ids < vocabulary, other=-float("inf")).to(tl.float32)
            place = _ordered(score, UNUSED_BITS)
            weight = tl.exp((score - top) / temperature) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            weight = tl.where((place >= least) & (ids < vocabulary), weight, 0.0)
            sum1 += tl.where(place >= first, weight, 0.0)
            sum2 += tl.where(place >= second, weight, 0.0)
            sum3 += tl.where(place >= third, weight, 0.0)
        found = tl.where(tl.sum(sum1, 0) >= wanted, first, found)
        found = tl.where(tl.sum(sum2, 0) >= wanted, second, found)
        found = tl.where(tl.sum(sum3, 0) >= wanted, third, found)
    return found


@triton.jit
def _ordered(score, UNUSED_BITS: tl.constexpr):
    """Return uint32 numbers in the order of the scores, without the bits that the dtype never uses."""
    bits = score.to(tl.int32, bitcast=True)
    flipped = bits ^ ((bits >> 31) | -2147483648)
    return flipped.to(tl.uint32, bitcast=True) >> UNUSED_BITS


@triton.jit
def _exponential(ids, low, high):
    """Return exponentially distributed numbers, a hash of the ids and the key (`engine.draws` has the same).

    Small ones decide which token wins, so they are made of small uniform numbers, by a series: 1 - u would round.
    """
    bits = _mixed(ids.to(tl.uint32) ^ low)
    bits = _mixed(bits + high)
    uniform = tl.minimum(bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10, 0.99999994)
    series = uniform * (1.0 + uniform * (0.5 + uniform * (0.3333333333333333 + uniform * 0.25)))
    return tl.where(uniform < 0.015625, series, -tl.log(1.0 - uniform))


@triton.jit
def _mixed(bits):
    """Return a bijective hash of 32 bits. Source: Chris Wellons' lowbias32, second edition of its constants."""
    bits = (bits ^ (bits >> 16)) * 0x21F0AAAD
    bits = (bits ^ (bits >> 15)) * 0xD35A2D97
    return bits ^ (bits >> 15)
