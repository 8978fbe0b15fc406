"""The backend torch: attention over paged K and V by torch's own kernels, on every device.

Plain torch computes what no fused kernel supports: soft-capped scores, and K and V of different dims on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from tierkv.engine.attention_merge import add_sinks, merge_parts
from tierkv.engine.backends.protocol import AttentionPlan, Batch, LayerShape, PagedQuery

__all__ = ["TorchBackend", "attend_cpu", "cpu_attention"]

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class TorchBackend:
    """torch: every layer on every device, one sequence after another. A CUDA graph cannot capture it."""

    name = "torch"

    def why_not(self, layer: LayerShape, batch: Batch | None = None) -> str | None:
        """Return why it does not serve a layer, or a batch of it; None if it does."""
        if layer.device == "cuda" and batch is not None and batch.kv_range is not None:
            return "its gathered K and V have the lengths of one step, so it cannot be in a CUDA graph"
        return None

    def prepare(self, layer: LayerShape, *, wait: bool) -> bool:
        """Return True: nothing is compiled."""
        return True

    def plan(self, layer: LayerShape, batch: Batch) -> AttentionPlan:
        """Plan a batch."""
        return _TorchPlan(batch)


class _TorchPlan:
    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def update(self, batch: Batch) -> None:
        """Do nothing: `run` reads the batch's lengths and its block table."""

    def run(self, paged: PagedQuery) -> Tensor:
        """Attend one sequence after another."""
        batch = self._batch
        out = paged.query.new_empty((*paged.query.shape[:2], paged.values.shape[-1]))
        for i, length in enumerate(batch.kv_lengths):
            first, last = batch.query_starts[i], batch.query_starts[i + 1]
            blocks = batch.block_table[i, : -(-length // batch.block_size)].long()
            out[first:last] = _attend_one(paged, paged.query[first:last], blocks, length)
        return out


def attend_cpu(paged: PagedQuery, query: Tensor, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Attend query [T, heads, dim] to all `length` tokens of `blocks`, without mask, window, soft cap or sinks.

    Returns ([T, heads, dim], log-sum-exp [T, heads]); for no tokens, zeros and minus infinity.
    """
    if not length:
        return torch.zeros_like(query), query.new_full(query.shape[:2], -math.inf, dtype=_lse_dtype(query))
    if query.shape[0] == 1:  # `_cpu_parts` does not gather large pages
        return merge_parts(_cpu_parts(paged, query, blocks, length))
    keys, values = (_gather(pages, blocks, length) for pages in (paged.keys, paged.values))
    return cpu_attention(query, keys, values, paged.scale)


def _attend_one(paged: PagedQuery, query: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Attend one sequence's new tokens, query [T, heads, dim], to its `length` tokens of K and V."""
    if paged.window and length - query.shape[0] >= paged.window:
        # Leave out whole blocks before the first new token's window: no token sees them.
        block_size = paged.keys.shape[1]
        skipped = (length - query.shape[0] - paged.window + 1) // block_size
        blocks, length = blocks[skipped:], length - skipped * block_size
    if query.is_cuda or paged.softcap or paged.keys.shape[-1] != paged.values.shape[-1]:
        keys, values = (_gather(pages, blocks, length) for pages in (paged.keys, paged.values))
        if paged.softcap or paged.sinks is not None:
            return _attend_eager(paged, query, keys, values)
        return _attend_sdpa(paged, query, keys, values)
    out, lse = merge_parts(_cpu_parts(paged, query, blocks, length))
    return add_sinks(out, lse, paged.sinks).to(query.dtype)


def _gather(pages: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Return the first `length` tokens of a sequence's pages as [length, kv_heads, dim]."""
    return pages.index_select(0, blocks).flatten(0, 1)[:length]


def _cpu_parts(paged: PagedQuery, query: Tensor, blocks: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the outputs and log-sum-exps of attention over parts that together are the whole sequence.

    The past needs no mask and the new tokens are causal, so no mask of [T, length] is made; only a window needs one.
    """
    num_new, block_size = query.shape[0], paged.keys.shape[1]
    num_past = length - num_new
    if paged.window and length > paged.window:
        keys, values = (_gather(pages, blocks, length) for pages in (paged.keys, paged.values))
        yield cpu_attention(query, keys, values, paged.scale, mask=_mask(num_new, length, paged.window, query))
        return
    if num_new == 1 and block_size >= 256:
        # For one query, attention page by page is faster than gathering large pages first; the merge is cheap.
        for at, block in enumerate(blocks.tolist()):
            count = min(block_size, length - at * block_size)
            yield cpu_attention(query, paged.keys[block, :count], paged.values[block, :count], paged.scale)
        return
    keys, values = (_gather(pages, blocks, length) for pages in (paged.keys, paged.values))
    if num_past:
        yield cpu_attention(query, keys[:num_past], values[:num_past], paged.scale)
    yield cpu_attention(query, keys[num_past:], values[num_past:], paged.scale, is_causal=True)


def cpu_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    *,
    is_causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ([T, heads, dim], log-sum-exp [T, heads]) by the CPU kernel of scaled_dot_product_attention."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    out, lse = _cpu_flash(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1), lse[0].transpose(0, 1)


def _attend_sdpa(paged: PagedQuery, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend by scaled_dot_product_attention; keys, values: [length, kv_heads, dim]."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    mask = _mask(query.shape[0], keys.shape[0], paged.window, query)
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=paged.scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _attend_eager(paged: PagedQuery, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend in plain torch, scores in float32 (float64 for float64); keys, values [length, kv_heads, dim]."""
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads, kv_heads, num_new, length = query.shape[1], keys.shape[1], query.shape[0], keys.shape[0]
    grouped = query.to(compute).view(num_new, kv_heads, heads // kv_heads, -1)
    scores = torch.einsum("tkgd,lkd->kgtl", grouped, keys.to(compute)) * paged.scale
    if paged.softcap:
        scores = torch.tanh(scores / paged.softcap) * paged.softcap
    scores = scores + _mask(num_new, length, paged.window, scores)
    lse = scores.logsumexp(-1)
    out = torch.einsum("kgtl,lkd->tkgd", (scores - lse.unsqueeze(-1)).exp(), values.to(compute))
    return add_sinks(out.flatten(1, 2), lse.permute(2, 0, 1).flatten(1, 2), paged.sinks).to(query.dtype)


def _mask(num_new: int, length: int, window: int | None, like: Tensor) -> Tensor:
    """Return an additive causal mask [num_new, length] for queries at the end of the sequence."""
    queries = torch.arange(length - num_new, length, device=like.device).unsqueeze(1)
    keys = torch.arange(length, device=like.device).unsqueeze(0)
    hidden = keys > queries
    if window:
        hidden = hidden | (keys <= queries - window)
    return torch.zeros(num_new, length, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
