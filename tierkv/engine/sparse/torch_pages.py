"""Sparse decode in torch, for a CPU: the same choice of pages and the same attention as the Triton kernels'."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tierkv.engine.attention_merge import add_sinks
from tierkv.engine.backends.protocol import PagedQuery
from tierkv.engine.sparse.options import PageCounts

__all__ = ["attend_sparsely", "choose_pages", "score_pages"]


def attend_sparsely(
    paged: PagedQuery, bounds: Tensor, block_table: Tensor, lengths: list[int], counts: PageCounts
) -> Tensor:
    """Return [sequences, heads, v_dim] of one new token of each sequence.

    bounds: of the layer, [blocks, kv_heads, pages per block, 2, k_dim]. block_table: [sequences, width].
    """
    out = paged.query.new_empty((*paged.query.shape[:2], paged.values.shape[-1]))
    for row, length in enumerate(lengths):
        query, blocks = paged.query[row], block_table[row].long()
        pages = choose_pages(
            score_pages(query, bounds, blocks, length, counts, scale=paged.scale), length, counts, bounds.shape[1]
        )
        out[row] = _attend_one(paged, query, blocks, length, pages, counts)
    return out


def score_pages(
    query: Tensor, bounds: Tensor, blocks: Tensor, length: int, counts: PageCounts, *, scale: float
) -> Tensor:
    """Return the largest score [heads, scored] that a token of each page can have; float32, float64 for float64.

    query: [heads, dim]. blocks: [width] int64. Of the pages without a recent token.
    """
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    _, kv_heads, per_block, _, dim = bounds.shape
    scored = counts.scored(length)
    number = torch.arange(scored, device=query.device)
    found = bounds[blocks[number // per_block], :, number % per_block].to(compute)  # [scored, kv_heads, 2, dim]
    grouped = query.to(compute).view(kv_heads, -1, dim)
    scores = torch.einsum("kgd,pkd->kgp", grouped.clamp(max=0), found[:, :, 0])
    scores += torch.einsum("kgd,pkd->kgp", grouped.clamp(min=0), found[:, :, 1])
    return scores.flatten(0, 1) * scale


def choose_pages(scores: Tensor, length: int, counts: PageCounts, kv_heads: int) -> Tensor:
    """Return the pages that each KV head reads: [kv_heads, counts.read(length)] int64, in order.

    scores: [heads, scored]. The weight of a page is the largest, over the heads that share the KV head, of its part of
    that head's softmax over scores. Of equal weights the earlier pages are taken.
    """
    pages, scored = -(-length // counts.page), scores.shape[1]
    weights = scores.new_full((kv_heads, pages), math.inf)  # sinks and recent pages are before all others
    sinks = min(counts.sinks, scored)
    if scored > sinks:
        grouped = scores[:, sinks:].log_softmax(1).view(kv_heads, -1, scored - sinks)
        weights[:, sinks:scored] = grouped.amax(1)
    best = weights.sort(dim=1, descending=True, stable=True).indices[:, : counts.read(length)]
    found: Tensor = best.sort(1).values
    return found


def _attend_one(
    paged: PagedQuery, query: Tensor, blocks: Tensor, length: int, pages: Tensor, counts: PageCounts
) -> Tensor:
    """Attend to chosen pages [kv_heads, n] of one sequence. Return [heads, v_dim]."""
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    kv_heads = pages.shape[0]
    per_block = paged.keys.shape[1] // counts.page
    heads = torch.arange(kv_heads, device=query.device)[:, None]
    at = (blocks[pages // per_block], pages % per_block)
    keys, values = (
        each.unflatten(1, (per_block, counts.page))[at[0], at[1], :, heads].flatten(1, 2).to(compute)
        for each in (paged.keys, paged.values)
    )  # [kv_heads, tokens, dim]
    grouped = query.to(compute).view(kv_heads, -1, query.shape[-1])
    scores = grouped @ keys.transpose(1, 2) * paged.scale
    if paged.softcap:
        scores = torch.tanh(scores / paged.softcap) * paged.softcap
    missing = -length % counts.page  # of the last page, which is always read and the last in order
    if missing:
        scores[:, :, -missing:] = -math.inf
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp() @ values
    return add_sinks(out.flatten(0, 1)[None], lse.flatten()[None], paged.sinks)[0].to(query.dtype)
