"""Triton kernels that choose which pages of a sequence a query reads: key bounds, their scores, and the best pages.

A page is `page` tokens, a divisor of a block. Its bounds are the smallest and the largest number that its keys have in
each dim, so sum(max(q * low, q * high)) is at least q . k of every key in it.
Source: Quest (Tang et al., 2024). Here the query heads that share a KV head choose pages together.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous

__all__ = ["PageChoice", "bound_pages", "choose_pages", "score_pages"]

_TILE = 64  # pages that a program scores
_MOST_PAGES = 1 << 20  # of a sequence: three counts of pages fit 63 bits


class PageChoice(Protocol):
    """How many pages of a sequence are read, and which of them always.

    Of `pages` pages, max(least, ceil(pages * share / 1024)) are read. page: tokens of each. sinks: first pages that are
    always read. recent: last tokens whose pages are always read. least >= sinks + recent // page + 2.
    """

    @property
    def page(self) -> int: ...
    @property
    def share(self) -> int: ...
    @property
    def least(self) -> int: ...
    @property
    def sinks(self) -> int: ...
    @property
    def recent(self) -> int: ...


def bound_pages(pool: Tensor, offsets: Tensor, pages: Tensor, bounds: Tensor, *, page: int) -> None:
    """Write the bounds of pages, for several layers whose keys have one shape.

    pool: [blocks, elements], contiguous. offsets: [layers] int64, where the keys [block_size, kv_heads, dim] of each
    layer begin in a block. pages: [n] int32, numbers of pages: block * pages per block + page of the block.
    bounds: [layers, blocks, kv_heads, pages per block, 2, dim], contiguous, of the pool's dtype: low, then high.
    Asynchronous on the current stream. Raises ShapeError before a launch.
    """
    layers, blocks, kv_heads, per_block, two, dim = bounds.shape
    require(two == 2 and blocks == pool.shape[0], f"bounds {tuple(bounds.shape)} of {pool.shape[0]} blocks do not fit")
    require(offsets.shape == (layers,) and offsets.dtype == torch.int64, "offsets must be [layers] int64")
    require(pages.dim() == 1 and pages.dtype == torch.int32, "pages must be [n] int32")
    require(page > 0 and per_block * page * kv_heads * dim <= pool.shape[1], "a block is smaller than its pages")
    require(bounds.dtype == pool.dtype, f"bounds of {bounds.dtype} for a pool of {pool.dtype}")
    require_contiguous(pool=pool, bounds=bounds, offsets=offsets, pages=pages)
    if not pages.numel():
        return
    _bound_pages[(pages.shape[0], layers * kv_heads)](
        pool,
        offsets,
        pages,
        bounds,
        pool.stride(0),
        blocks,
        KV_HEADS=kv_heads,
        PER_BLOCK=per_block,
        PAGE=page,
        DIM=dim,
        PAGE_BLOCK=triton.next_power_of_2(page),
        DIM_BLOCK=triton.next_power_of_2(dim),
        num_warps=4,
    )


def score_pages(
    query: Tensor,
    bounds: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scores: Tensor,
    *,
    scale: float,
    choice: PageChoice,
) -> None:
    """Write the largest score that a token of each page can have, for each query head.

    query: [sequences, heads, dim]. bounds: of one layer [blocks, kv_heads, pages per block, 2, dim]. block_table:
    [sequences, width] int32. lengths: [sequences] int32. scores: [sequences, heads, pages] float32, pages at most
    width * pages per block; only pages that are neither sinks nor recent are written. All contiguous.
    Asynchronous on the current stream. Raises ShapeError before a launch.
    """
    sequences, heads, dim = query.shape
    _, kv_heads, per_block, _, _ = bounds.shape
    pages = scores.shape[2]
    require(bounds.shape[3:] == (2, dim) and heads % kv_heads == 0, f"bounds {tuple(bounds.shape)} do not fit")
    require(scores.shape[:2] == (sequences, heads) and scores.dtype == torch.float32, "scores must be float32")
    require(pages <= block_table.shape[1] * per_block, f"{pages} pages are more than the block table has")
    require(block_table.shape[0] == sequences == lengths.shape[0], "the block table has other sequences")
    require(block_table.dtype == lengths.dtype == torch.int32, "block table and lengths must be int32")
    require_contiguous(query=query, bounds=bounds, scores=scores, block_table=block_table)
    if not sequences or not pages:
        return
    _score_pages[(triton.cdiv(pages, _TILE), kv_heads, sequences)](
        query,
        bounds,
        block_table,
        lengths,
        scores,
        scale,
        block_table.stride(0),
        pages,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        PER_BLOCK=per_block,
        PAGE=choice.page,
        RECENT=choice.recent,
        DIM=dim,
        GROUP_BLOCK=max(16, triton.next_power_of_2(heads // kv_heads)),
        DIM_BLOCK=max(16, triton.next_power_of_2(dim)),
        TILE=_TILE,
        num_warps=4,
    )


def choose_pages(
    scores: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    *,
    kv_heads: int,
    per_block: int,
    choice: PageChoice,
) -> None:
    """Write which pages each KV head reads, in order.

    The weight of a page is the largest, over the heads that share the KV head, of its part of that head's softmax over
    scores. Of equal weights the earlier pages are taken. No result is read by the host.

    scores: from `score_pages`. chosen: [sequences, kv_heads, most] int32, numbers of pages as `bound_pages` takes them;
    the first choice.count(length) of each row are written, and `most` is at least that. All contiguous.
    Asynchronous on the current stream. Raises ShapeError before a launch.
    """
    sequences, heads, pages = scores.shape
    require(chosen.shape[:2] == (sequences, kv_heads) and chosen.dtype == torch.int32, "chosen must be int32")
    require(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads}")
    require(pages < _MOST_PAGES, f"{pages} pages are more than {_MOST_PAGES - 1}")
    require(choice.least >= choice.sinks + choice.recent // choice.page + 2, "fewer pages are read than always are")
    require(block_table.dtype == lengths.dtype == torch.int32, "block table and lengths must be int32")
    require_contiguous(scores=scores, chosen=chosen, block_table=block_table)
    if not sequences:
        return
    block = max(16, triton.next_power_of_2(pages))
    _choose_pages[(kv_heads, sequences)](
        scores,
        block_table,
        lengths,
        chosen,
        block_table.stride(0),
        pages,
        chosen.shape[2],
        choice.share,
        choice.least,
        choice.sinks,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        PER_BLOCK=per_block,
        PAGE=choice.page,
        RECENT=choice.recent,
        BLOCK=block,
        num_warps=min(32, max(4, block // 256)),
    )


@triton.jit
def _bound_pages(
    pool,
    offsets,
    pages,
    bounds,
    block_stride,
    blocks,
    KV_HEADS: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    PAGE_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    """One program per page, layer and KV head."""
    number = tl.load(pages + tl.program_id(0))
    block, inner = (number // PER_BLOCK).to(tl.int64), number % PER_BLOCK
    layer, head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    token = tl.arange(0, PAGE_BLOCK)[:, None]
    dim = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (token < PAGE) & (dim < DIM)
    source = pool + block * block_stride + tl.load(offsets + layer) + ((inner * PAGE + token) * KV_HEADS + head) * DIM
    keys = tl.load(source + dim, mask=inside, other=0.0).to(tl.float32)
    low = tl.min(tl.where(inside, keys, float("inf")), 0)
    high = tl.max(tl.where(inside, keys, float("-inf")), 0)
    row = ((layer.to(tl.int64) * blocks + block) * KV_HEADS + head) * PER_BLOCK + inner
    at = tl.arange(0, DIM_BLOCK)
    target = bounds + row * (2 * DIM) + at
    tl.store(target, low.to(bounds.dtype.element_ty), mask=at < DIM)
    tl.store(target + DIM, high.to(bounds.dtype.element_ty), mask=at < DIM)


@triton.jit
def _score_pages(
    query,
    bounds,
    block_table,
    lengths,
    scores,
    scale,
    table_stride,
    num_pages,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    RECENT: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per tile of pages, KV head and sequence. Two products: of q's positive numbers, and of the others."""
    sequence, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    scored = tl.maximum(tl.load(lengths + sequence) - RECENT, 0) // PAGE
    first = tl.program_id(0) * TILE
    if first >= scored:
        return
    page = first + tl.arange(0, TILE)
    is_scored = page < scored
    block = tl.load(block_table + sequence * table_stride + page // PER_BLOCK, mask=is_scored, other=0).to(tl.int64)
    row = (block * KV_HEADS + head) * PER_BLOCK + page % PER_BLOCK
    dim = tl.arange(0, DIM_BLOCK)
    inside = is_scored[:, None] & (dim < DIM)[None, :]
    source = bounds + row[:, None] * (2 * DIM) + dim[None, :]
    low = tl.load(source, mask=inside, other=0.0)
    high = tl.load(source + DIM, mask=inside, other=0.0)
    group = tl.arange(0, GROUP_BLOCK)
    is_head = group < GROUP
    which = (sequence * KV_HEADS + head) * GROUP + group
    q = tl.load(query + which[:, None] * DIM + dim[None, :], mask=is_head[:, None] & (dim < DIM)[None, :], other=0.0)
    zero = tl.zeros_like(q)
    found = tl.dot(tl.where(q > 0, q, zero), tl.trans(high), input_precision="ieee")
    found += tl.dot(tl.where(q > 0, zero, q), tl.trans(low), input_precision="ieee")
    target = scores + which[:, None] * num_pages + page[None, :]
    tl.store(target, found * scale, mask=is_head[:, None] & is_scored[None, :])


@triton.jit
def _choose_pages(
    scores,
    block_table,
    lengths,
    chosen,
    table_stride,
    num_pages,
    most,
    share,
    least,
    sinks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PAGE: tl.constexpr,
    RECENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per KV head and sequence. It finds the smallest weight that is taken by a search over its bits.

    A weight is a logarithm, at most 0, so its bits without the sign grow as it falls: 20 of them, inverted, are a rank.
    Each step of the search decides two bits: three counts share one 64-bit sum, because a sum over a program's threads
    is what costs.
    """
    sequence, head = tl.program_id(1).to(tl.int64), tl.program_id(0)
    length = tl.load(lengths + sequence)
    pages = (length + PAGE - 1) // PAGE
    count = tl.minimum(pages, tl.maximum(least, (pages * share + 1023) // 1024))
    scored = tl.maximum(length - RECENT, 0) // PAGE
    page = tl.arange(0, BLOCK)
    is_scored = (page >= sinks) & (page < scored)
    weight = tl.full((BLOCK,), float("-inf"), tl.float32)
    for member in tl.static_range(GROUP):
        row = (sequence * KV_HEADS + head) * GROUP + member
        score = tl.load(scores + row * num_pages + page, mask=is_scored, other=float("-inf"))
        top = tl.maximum(tl.max(score, 0), -1e30)  # of no page: finite
        total = tl.sum(tl.exp(score - top), 0)
        weight = tl.maximum(weight, score - (top + tl.log(tl.maximum(total, 1e-30))))
    bits = tl.minimum(weight, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    rank = (0x7FFFFFFF - bits) >> 11
    rank = tl.where(is_scored, rank, 1 << 20)  # sinks and recent pages are before all others
    rank = tl.where(page < pages, rank, -1)
    lowest = tl.full((), 0, tl.int32)
    bit = tl.full((), 1 << 20, tl.int32)
    for _ in range(11):  # not unrolled: long sequences would take minutes to compile
        held = (rank >= lowest + bit).to(tl.int64)
        held += (rank >= lowest + 2 * bit).to(tl.int64) << 21
        held += (rank >= lowest + 3 * bit).to(tl.int64) << 42
        sums = tl.sum(held, 0)
        lowest += bit * ((sums & 0x1FFFFF) >= count).to(tl.int32)
        lowest += bit * (((sums >> 21) & 0x1FFFFF) >= count).to(tl.int32)
        lowest += bit * ((sums >> 42) >= count).to(tl.int32)
        bit = bit >> 2
    above = rank > lowest
    ties = (rank == lowest) & (page < pages)
    room = count - tl.sum(above.to(tl.int32), 0)
    taken = above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= room))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    block = tl.load(block_table + sequence * table_stride + page // PER_BLOCK, mask=taken, other=0)
    target = chosen + (sequence * KV_HEADS + head) * most + place
    tl.store(target, block * PER_BLOCK + page % PER_BLOCK, mask=taken)
