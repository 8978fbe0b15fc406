"""Decode attention of sequences that share a prefix: the prefix once for all of them, then what is each one's own.

Two passes and a merge. The shared pass takes the queries of a group as the tokens of one sequence against the shared
blocks, without a mask: all of them lie before every query. The own pass is the plain one with the shared blocks left
out; it also writes K and V of the new tokens. Their outputs are merged by log-sum-exp: exact, up to rounding.
Source: the cascade attention of FlashInfer; Hydragen (Juravsky et al., 2024).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tierkv.engine.attention_merge import merge_shared
from tierkv.engine.attention_paged import PagedQuery, attend_cpu, can_use_flash
from tierkv.engine.cascade_batch import CascadeBatch

_attend_prefix: Callable[..., None] | None
try:
    from tierkv.kernels.prefix import attend_prefix

    _attend_prefix = attend_prefix
except ModuleNotFoundError:  # triton has no wheel for this machine: flash-attn does it
    _attend_prefix = None

__all__ = [
    "PrefixKernel",
    "attend_cascade",
    "attend_with_flash",
    "can_cascade",
    "own_pass",
    "prefix_pass",
    "shared_pass",
]

_TILE_ROWS = 64  # queries that one program of flash-attn's split kernel takes, fewer are padded


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixKernel:
    """How the shared pass runs our own kernel: the parts of a prefix, and the shape of a program."""

    parts: int
    key_tile: int = 64
    num_warps: int = 8
    num_stages: int = 3


def can_cascade(paged: PagedQuery, block_size: int) -> bool:
    """Tell whether a layer can attend in two passes: not through a window, which hides most of a prefix anyway."""
    if paged.window is not None:
        return False
    if paged.query.is_cuda:
        return can_use_flash(paged, block_size)
    return not paged.softcap and paged.keys.shape[-1] == paged.values.shape[-1]


def attend_cascade(
    paged: PagedQuery,
    cascade: CascadeBatch,
    *,
    shared_splits: int = 0,
    kernel: PrefixKernel | None = None,
    side: torch.cuda.Stream | None = None,
) -> Tensor:
    """Write K and V of one new token for each of B sequences, and attend. Return [B, heads, dim], contiguous.

    shared_splits: in how many pieces flash-attn splits the shared K and V; 0 lets it choose. kernel: run the shared
    pass by our own kernel instead, where scores are not capped. side: a stream on which the own pass runs beside it
    (3 to 8 microseconds were seen to be gained in a graph).
    """
    if paged.query.is_cuda:
        return attend_with_flash(paged, cascade, shared_splits=shared_splits, kernel=kernel, side=side)
    return _attend_on_cpu(paged, cascade)


def attend_with_flash(
    paged: PagedQuery,
    cascade: CascadeBatch,
    *,
    shared_splits: int = 0,
    kernel: PrefixKernel | None = None,
    side: torch.cuda.Stream | None = None,
) -> Tensor:
    """Do what `attend_cascade` says by flash-attn and kernels of ours. May be captured in a CUDA graph."""
    query = paged.query.contiguous()

    def attend_shared() -> tuple[Tensor, Tensor]:
        if kernel is None or _attend_prefix is None or paged.softcap:
            return shared_pass(paged, query, cascade, num_splits=shared_splits)
        return prefix_pass(paged, query, cascade, kernel)

    if side is None:
        shared, shared_lse = attend_shared()
        own, own_lse = own_pass(paged, query, cascade)
    else:
        current = torch.cuda.current_stream(query.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            own, own_lse = own_pass(paged, query, cascade)
        shared, shared_lse = attend_shared()
        current.wait_stream(side)
        for tensor in (own, own_lse):
            tensor.record_stream(current)
    out = torch.empty_like(query)
    parts = (shared, shared_lse, own, own_lse, out.view(own.shape))
    merge_shared(*parts, positions=cascade.positions, sinks=paged.sinks)
    return out


def shared_pass(paged: PagedQuery, query: Tensor, cascade: CascadeBatch, *, num_splits: int) -> tuple[Tensor, Tensor]:
    """Attend each group's queries, as the tokens of one sequence, to the blocks that the group shares.

    query: [B, heads, dim]. Returns views ([1, P, kv, g, dim], [1, groups, members, kv, g]) for `merge_shared`.
    flash-attn pads the queries of a head to tiles of 64. Where that wastes at least half, the queries of all heads
    that share one of K and V are packed behind each other, for a small copy.
    """
    shape, (_, heads, dim) = cascade.shape, query.shape
    kv_heads = paged.keys.shape[2]
    group = heads // kv_heads
    by_kv = query.view(-1, kv_heads, group, dim)
    is_packed = 2 * _tiles(shape.members * group) * kv_heads <= _tiles(shape.members) * heads
    if is_packed:
        by_kv = by_kv.transpose(1, 2)
    by_kv = by_kv.contiguous() if cascade.gather is None else by_kv.index_select(0, cascade.gather)
    packed = (shape.members * group, kv_heads) if is_packed else (shape.members, heads)
    out, lse = _flash_attend(
        paged,
        by_kv.view(shape.groups, *packed, dim),
        lengths=cascade.shared_lengths,
        table=cascade.shared_table,
        num_splits=num_splits,
    )
    if is_packed:
        outs = out.view(-1, group, kv_heads, dim).transpose(1, 2)
        lses = lse.view(shape.groups, kv_heads, shape.members, group).transpose(1, 2)
    else:
        outs = out.view(-1, kv_heads, group, dim)
        lses = lse.view(shape.groups, kv_heads, group, shape.members).permute(0, 3, 1, 2)
    return outs[None], lses[None]


def prefix_pass(paged: PagedQuery, query: Tensor, cascade: CascadeBatch, kernel: PrefixKernel) -> tuple[Tensor, Tensor]:
    """Do what `shared_pass` does by our own kernel: ([S, P, kv, g, dim], [S, groups, members, kv, g]), in float32."""
    assert _attend_prefix is not None
    shape, (_, heads, dim) = cascade.shape, query.shape
    kv_heads = paged.keys.shape[2]
    by_kv = (kv_heads, heads // kv_heads)
    sizes = (kernel.parts, shape.groups, shape.members, *by_kv)
    out = torch.empty((*sizes, dim), dtype=torch.float32, device=query.device).flatten(1, 2)
    lse = torch.empty(sizes, dtype=torch.float32, device=query.device)
    _attend_prefix(
        query.unflatten(1, by_kv),
        paged.keys,
        paged.values,
        cascade.shared_table,
        cascade.shared_lengths,
        out,
        lse,
        members=shape.members,
        scale=paged.scale,
        gather=cascade.gather,
        key_tile=kernel.key_tile,
        num_warps=kernel.num_warps,
        num_stages=kernel.num_stages,
    )
    return out, lse


def own_pass(paged: PagedQuery, query: Tensor, cascade: CascadeBatch) -> tuple[Tensor, Tensor]:
    """Attend each sequence's query to its own blocks, where the same kernel writes the new token's K and V first.

    Returns ([B, kv, g, dim], [B, kv, g]), views. The heads that share one of K and V go in as tokens: flash-attn does
    that by itself too, but then copies its result back.
    """
    kv_heads = paged.keys.shape[2]
    by_kv = query.view(query.shape[0], kv_heads, -1, query.shape[-1])
    out, lse = _flash_attend(
        paged,
        by_kv.transpose(1, 2),
        lengths=cascade.own_past,
        table=cascade.own_table,
        new={"k": paged.new_keys.unsqueeze(1), "v": paged.new_values.unsqueeze(1)},
    )
    return out.transpose(1, 2), lse.view(by_kv.shape[:3])


def _flash_attend(
    paged: PagedQuery,
    query: Tensor,
    *,
    lengths: Tensor,
    table: Tensor,
    new: dict[str, Tensor] | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return flash-attn's (out [n, tokens, heads, dim], log-sum-exp [n, heads, tokens]), without a mask."""
    flash: Any = importlib.import_module("flash_attn")
    out, lse = flash.flash_attn_with_kvcache(
        query,
        paged.keys,
        paged.values,
        **(new or {}),
        cache_seqlens=lengths,
        block_table=table,
        softmax_scale=paged.scale,
        causal=False,
        softcap=paged.softcap or 0.0,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    return out, lse


def _tiles(queries: int) -> int:
    return -(-queries // _TILE_ROWS)


def _attend_on_cpu(paged: PagedQuery, cascade: CascadeBatch) -> Tensor:
    """Do the same with torch's own kernel, from the same tensors."""
    shape, query = cascade.shape, paged.query
    size, kv_heads = paged.keys.shape[1], paged.keys.shape[2]
    past = cascade.own_past.long()
    places = cascade.own_table.long().gather(1, (past // size).unsqueeze(1)).squeeze(1)
    paged.keys[places, past % size] = paged.new_keys
    paged.values[places, past % size] = paged.new_values
    members = query if cascade.gather is None else query.index_select(0, cascade.gather)
    parts = [
        attend_cpu(paged, queries, table[: -(-length // size)], length)
        for queries, table, length in zip(
            members.split(shape.members), cascade.shared_table.long(), cascade.shared_lengths.tolist(), strict=True
        )
    ]
    rows = zip(query.split(1), cascade.own_table.long(), past.tolist(), strict=True)
    own = [attend_cpu(paged, row, table[: length // size + 1], length + 1) for row, table, length in rows]
    by_kv = (kv_heads, query.shape[1] // kv_heads)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    merge_shared(
        torch.cat([part for part, _ in parts]).unflatten(1, by_kv)[None],
        torch.stack([lse for _, lse in parts]).unflatten(2, by_kv)[None],
        torch.cat([part for part, _ in own]).unflatten(1, by_kv),
        torch.cat([lse for _, lse in own]).unflatten(1, by_kv),
        out.unflatten(1, by_kv),
        positions=cascade.positions,
        sinks=paged.sinks,
    )
    return out
