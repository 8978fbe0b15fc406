"""Triton kernels of decode attention over chosen pages: one new token of each sequence, other pages for each KV head.

Source: flash decoding (Dao et al., 2023): programs read parts of a sequence, and a second kernel merges them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous
from tierkv.kernels.page_scores import PageChoice

__all__ = ["PartSpace", "attend_pages"]

_TILE = 64  # tokens that a program reads at once
_PROGRAMS = 264  # two for each multiprocessor of an H200


@dataclass(frozen=True, slots=True, eq=False)
class PartSpace:
    """Memory for the parts of an attention that programs compute apart.

    outputs: [sequences, heads, parts, v_dim] float32. sums: [sequences, heads, parts] float32, log-sum-exps.
    """

    outputs: Tensor
    sums: Tensor

    @classmethod
    def of(
        cls, *, sequences: int, heads: int, kv_heads: int, v_dim: int, most_tokens: int, device: torch.device
    ) -> PartSpace:
        """Return memory for sequences that read `most_tokens` tokens each."""
        wanted = -(-_PROGRAMS // max(1, sequences * kv_heads))
        parts = max(1, min(wanted, -(-most_tokens // (2 * _TILE))))
        outputs = torch.empty(sequences, heads, parts, v_dim, dtype=torch.float32, device=device)
        return cls(outputs, torch.empty(sequences, heads, parts, dtype=torch.float32, device=device))


def attend_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    chosen: Tensor,
    out: Tensor,
    space: PartSpace,
    *,
    choice: PageChoice,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Attend to the chosen pages.

    query: [sequences, heads, dim], contiguous. keys, values: [blocks, block_size, kv_heads, dim], the last dim
    contiguous. lengths: [sequences] int32. chosen: from `choose_pages`; the last page is the last of each row.
    out: [sequences, heads, v_dim], contiguous, written entirely. softcap, sinks [heads]: as in `PagedQuery`.
    Asynchronous on the current stream. Raises ShapeError before a launch.
    """
    sequences, heads, dim = query.shape
    _, block_size, kv_heads, v_dim = values.shape
    require(keys.shape == (*values.shape[:3], dim), f"keys {tuple(keys.shape)}, values {tuple(values.shape)}")
    require(heads % kv_heads == 0 and block_size % choice.page == 0, "heads or pages do not divide")
    require(keys.stride(3) == values.stride(3) == 1, "the last dim of keys and values must be contiguous")
    require(out.shape == (sequences, heads, v_dim) and out.dtype == query.dtype, "out does not fit the query")
    require(keys.dtype == values.dtype == query.dtype, "keys and values must have the query's dtype")
    require(chosen.shape[:2] == (sequences, kv_heads) and chosen.dtype == torch.int32, "chosen must be int32")
    require(lengths.shape == (sequences,) and lengths.dtype == torch.int32, "lengths must be [sequences] int32")
    require(sinks is None or sinks.shape == (heads,), "sinks must be [heads]")
    parts = space.sums.shape[2]
    require(space.outputs.shape == (sequences, heads, parts, v_dim), "the space does not fit the query")
    require_contiguous(query=query, chosen=chosen, out=out, outputs=space.outputs, sums=space.sums)
    if not sequences:
        return
    group = heads // kv_heads
    v_block = max(16, triton.next_power_of_2(v_dim))
    _attend_pages[(parts, kv_heads, sequences)](
        query,
        keys,
        values,
        lengths,
        chosen,
        space.outputs,
        space.sums,
        scale,
        softcap or 0.0,
        chosen.shape[2],
        choice.share,
        choice.least,
        *keys.stride()[:3],
        *values.stride()[:3],
        parts,
        KV_HEADS=kv_heads,
        GROUP=group,
        PAGE=choice.page,
        PER_BLOCK=block_size // choice.page,
        DIM=dim,
        V_DIM=v_dim,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        DIM_BLOCK=max(16, triton.next_power_of_2(dim)),
        V_BLOCK=v_block,
        TILE=_TILE,
        HAS_CAP=softcap is not None and softcap > 0,
        num_warps=4,
        num_stages=3 if max(dim, v_dim) <= 128 else 2,  # of K and V in shared memory
    )
    _merge_parts[(sequences * heads,)](
        space.outputs,
        space.sums,
        out,
        out if sinks is None else sinks,
        parts,
        heads,
        V_DIM=v_dim,
        V_BLOCK=v_block,
        PARTS=triton.next_power_of_2(parts),
        HAS_SINKS=sinks is not None,
        num_warps=4,
    )


@triton.jit
def _attend_pages(
    query,
    keys,
    values,
    lengths,
    chosen,
    outputs,
    sums,
    scale,
    softcap,
    most,
    share,
    least,
    key_block,
    key_token,
    key_head,
    value_block,
    value_token,
    value_head,
    parts,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    V_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
):
    """One program per part of a sequence's chosen tokens and KV head; a part is whole tiles, and may be empty."""
    sequence, head, part = tl.program_id(2).to(tl.int64), tl.program_id(1), tl.program_id(0)
    length = tl.load(lengths + sequence)
    pages = (length + PAGE - 1) // PAGE
    count = tl.minimum(pages, tl.maximum(least, (pages * share + 1023) // 1024))
    tokens = count * PAGE - (pages * PAGE - length)  # the last page may be partly filled
    per_part = ((tokens + parts - 1) // parts + TILE - 1) // TILE * TILE
    first = part * per_part
    last = tl.minimum(first + per_part, tokens)
    group = tl.arange(0, GROUP_BLOCK)
    is_head = group < GROUP
    which = (sequence * KV_HEADS + head) * GROUP + group
    dim, v_dim = tl.arange(0, DIM_BLOCK), tl.arange(0, V_BLOCK)
    q = tl.load(query + which[:, None] * DIM + dim[None, :], mask=is_head[:, None] & (dim < DIM)[None, :], other=0.0)
    numbers = chosen + (sequence * KV_HEADS + head) * most
    top = tl.full((GROUP_BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_BLOCK,), tl.float32)
    found = tl.zeros((GROUP_BLOCK, V_BLOCK), tl.float32)
    for start in range(first, last, TILE):
        token = start + tl.arange(0, TILE)
        is_token = token < last
        number = tl.load(numbers + token // PAGE, mask=is_token, other=0)
        block = (number // PER_BLOCK).to(tl.int64)
        offset = (number % PER_BLOCK) * PAGE + token % PAGE
        key_row = keys + block * key_block + offset * key_token + head * key_head
        k = tl.load(key_row[:, None] + dim[None, :], mask=is_token[:, None] & (dim < DIM)[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if HAS_CAP:
            score = softcap * (2.0 * tl.sigmoid(2.0 * score / softcap) - 1.0)  # tanh
        score = tl.where(is_token[None, :], score, float("-inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp(score - highest[:, None])
        fade = tl.exp(top - highest)
        value_row = values + block * value_block + offset * value_token + head * value_head
        v = tl.load(value_row[:, None] + v_dim[None, :], mask=is_token[:, None] & (v_dim < V_DIM)[None, :], other=0.0)
        found = found * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        top = highest
    row = which * parts + part
    found = found / tl.where(total > 0, total, 1.0)[:, None]
    target = outputs + row[:, None] * V_DIM + v_dim[None, :]
    tl.store(target, found, mask=is_head[:, None] & (v_dim < V_DIM)[None, :])
    log = tl.log(tl.where(total > 0, total, 1.0))
    tl.store(sums + row, tl.where(total > 0, top + log, float("-inf")), mask=is_head)


@triton.jit
def _merge_parts(
    outputs,
    sums,
    out,
    sinks,
    parts,
    heads,
    V_DIM: tl.constexpr,
    V_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One program per sequence and head."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    v_dim = tl.arange(0, V_BLOCK)
    logs = tl.load(sums + row * parts + part, mask=part < parts, other=float("-inf"))
    top = tl.max(logs, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + row % heads).to(tl.float32)
        top = tl.maximum(top, sink)
    weight = tl.exp(logs - top)
    total = tl.sum(weight, 0)
    if HAS_SINKS:
        total += tl.exp(sink - top)
    inside = (part < parts)[:, None] & (v_dim < V_DIM)[None, :]
    each = tl.load(outputs + (row * parts + part)[:, None] * V_DIM + v_dim[None, :], mask=inside, other=0.0)
    merged = tl.sum(each * weight[:, None], 0) / total
    tl.store(out + row * V_DIM + v_dim, merged.to(out.dtype.element_ty), mask=v_dim < V_DIM)
