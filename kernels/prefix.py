"""Attention of many queries over one shared, paged prefix, as flash-attn's split kernel computes it, for packed heads.

All queries of the heads that share one of K and V are the rows of one matrix, taken from where they lie. So the rows
fill tiles of up to 128, twice flash-attn's 64, each read of K and V serves twice as many of them, and Hopper's
warp-group instructions get full tiles. Source: the packing of flash-decoding and of FlashInfer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require

__all__ = ["attend_prefix"]


def attend_prefix(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    table: Tensor,
    lengths: Tensor,
    out: Tensor,
    out_lse: Tensor,
    *,
    members: int,
    scale: float,
    gather: Tensor | None = None,
    key_tile: int = 64,
    num_warps: int = 8,
    num_stages: int = 3,
) -> None:
    """Attend queries to the prefix of their group, without a mask, in S parts of the prefix.

    query: [B, kv, g, dim], 16-bit or float32, dim a power of two. keys, values: [num_blocks, block_size, kv, dim],
    block_size a multiple of key_tile. table: [n, blocks] and lengths: [n], int32, of each of n groups; lengths in
    tokens, multiples of key_tile. gather: [n * members] int32, whose queries a group's are; without it there is one
    group, of the first queries. out: [S, n * members, kv, g, dim] and out_lse: [S, n, members, kv, g], float32,
    contiguous, written entirely; a part without tokens gives zeros and minus infinity.
    Asynchronous on the current stream. Raises ShapeError before launching anything.
    """
    count, kv_heads, group, dim = query.shape
    parts, groups = out.shape[0], table.shape[0]
    require(keys.shape == values.shape and keys.shape[2:] == (kv_heads, dim), "query, keys and values do not fit")
    require(query.dtype == keys.dtype == values.dtype, "query, keys and values must have one dtype")
    require(all(t.stride(-1) == 1 for t in (query, keys, values)), "the last dim must be contiguous")
    require(dim == triton.next_power_of_2(dim) and dim >= 16, f"dim must be a power of two from 16 on, got {dim}")
    require(keys.shape[1] % key_tile == 0, f"a block of {keys.shape[1]} tokens is not made of tiles of {key_tile}")
    require(out.shape == (parts, groups * members, kv_heads, group, dim), "out must be [S, n * members, kv, g, dim]")
    require(out_lse.shape == (parts, groups, members, kv_heads, group), "out_lse must be [S, n, members, kv, g]")
    require(out.dtype == out_lse.dtype == torch.float32, "out and out_lse must be float32")
    require(lengths.shape == (groups,), "lengths must be [n]")
    for name, tensor in {"table": table, "lengths": lengths, "out": out, "out_lse": out_lse}.items():
        require(tensor.is_contiguous(), f"{name} must be contiguous")
    require(table.dtype == lengths.dtype == torch.int32, "table and lengths must be int32")
    if gather is None:
        require(groups == 1 and members <= count, "without gather there is one group of the first queries")
    else:
        fits = gather.shape == (groups * members,) and gather.dtype == torch.int32 and gather.is_contiguous()
        require(fits, "gather must be [n * members] int32")
    rows = min(128, max(16, triton.next_power_of_2(members * group)))
    _attend_prefix[(triton.cdiv(members * group, rows), kv_heads, parts * groups)](
        query,
        keys,
        values,
        table,
        lengths,
        query if gather is None else gather,
        out,
        out_lse,
        scale * 1.4426950408889634,  # powers of two are faster than those of e
        members,
        table.shape[1],
        parts,
        *query.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        HAS_GATHER=gather is not None,
        BLOCK_SIZE=keys.shape[1],
        KV_HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        ROWS=rows,
        KEYS=key_tile,
        num_warps=num_warps if rows == 128 else 4,
        num_stages=num_stages,
    )


@triton.jit
def _attend_prefix(
    query,
    keys,
    values,
    table,
    lengths,
    gather,
    out,
    out_lse,
    scale,
    members,
    blocks,
    parts,
    query_b,
    query_k,
    query_g,
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    HAS_GATHER: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One program: ROWS queries of one head of K and V, one part of one group's prefix."""
    kv = tl.program_id(1)
    part = tl.program_id(2) % parts
    n = tl.program_id(2) // parts
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    member = row // GROUP
    g = row % GROUP
    inside = member < members
    slot = n * members + member
    b = tl.load(gather + slot, mask=inside, other=0) if HAS_GATHER else member
    column = tl.arange(0, DIM)
    q_at = b.to(tl.int64) * query_b + kv * query_k + g * query_g
    q = tl.load(query + q_at[:, None] + column[None, :], mask=inside[:, None], other=0.0)
    tiles = tl.load(lengths + n) // KEYS
    tiles_of_part = tl.cdiv(tiles, parts)
    first = part * tiles_of_part
    last = tl.minimum(first + tiles_of_part, tiles)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    merged = tl.zeros([ROWS, DIM], tl.float32)
    for tile in range(first, last):
        start = tile * KEYS
        block = tl.load(table + n * blocks + start // BLOCK_SIZE).to(tl.int64)
        token = start % BLOCK_SIZE + tl.arange(0, KEYS)
        k_at = keys + block * key_block + kv * key_head
        k = tl.load(k_at + token[None, :] * key_token + column[:, None])
        scores = tl.dot(q, k) * scale
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_at = values + block * value_block + kv * value_head
        v = tl.load(v_at + token[:, None] * value_token + column[None, :])
        merged = tl.dot(weights.to(v.dtype), v, merged * shrink[:, None])
        top = new_top
    is_empty = total == 0.0
    merged = merged / tl.where(is_empty, 1.0, total)[:, None]
    lse = tl.where(is_empty, -float("inf"), (top + tl.log2(tl.maximum(total, 1.0e-38))) * 0.6931471805599453)
    at = ((part * tl.num_programs(2) // parts * members + slot).to(tl.int64) * KV_HEADS + kv) * GROUP + g
    tl.store(out_lse + at, lse, mask=inside)
    tl.store(out + at[:, None] * DIM + column[None, :], merged, mask=inside[:, None])
