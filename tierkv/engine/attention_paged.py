"""Attention of packed queries over paged K and V: flash-attn on CUDA, torch's own kernels elsewhere.

All attention here is exact and causal, with the queries at the end of their sequence. Plain torch computes what no
fused kernel supports: soft-capped scores, and K and V of different dims on a CPU.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from tierkv.engine.attention_merge import add_sinks, merge_parts
from tierkv.values.layout import BlockLayout

__all__ = [
    "MAX_SHORT_TOKENS",
    "MAX_SPLIT_TOKENS",
    "Batch",
    "BatchPart",
    "PagedQuery",
    "attend",
    "attend_cpu",
    "can_use_flash",
    "cpu_attention",
    "flash_head_dims",
    "layout_uses_flash",
]

MAX_SPLIT_TOKENS = 64
"""New tokens of each of any number of sequences that `flash_attn_with_kvcache` gets: above it all multiprocessors are
busy even if K and V are not split."""

MAX_SHORT_TOKENS = 512
"""New tokens of all sequences together that it gets too: the other function's call takes longer in Python than these
tokens on the GPU, and it cannot be in a graph."""

_cpu_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Batch(Protocol):
    """The fields of an AttentionBatch that paged attention reads."""

    block_size: int
    query_starts: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    query_starts_tensor: Tensor
    kv_starts_tensor: Tensor
    kv_lengths_tensor: Tensor
    max_new: int
    is_even: bool
    has_past: bool
    parts: tuple[BatchPart, ...]


@dataclass(slots=True, kw_only=True)
class BatchPart:
    """Some sequences of a batch, with the fields of a batch. tokens: their new tokens in the packed input."""

    tokens: slice
    block_size: int
    query_starts: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    query_starts_tensor: Tensor
    kv_starts_tensor: Tensor
    kv_lengths_tensor: Tensor
    max_new: int
    is_even: bool
    has_past: bool
    parts: tuple[BatchPart, ...] = ()


@dataclass(slots=True, kw_only=True)  # not frozen: each layer of each pass makes one
class PagedQuery:
    """One layer's attention. query: [T, heads, dim]; keys, values: [num_blocks, block_size, kv_heads, dim].

    new_keys, new_values: [T, kv_heads, dim], of the new tokens; each function says whether keys and values have them.
    window: each token sees itself and the window - 1 tokens before it.
    softcap: scores are softcap * tanh(score / softcap).
    sinks: [heads] logits that take part in the softmax and have no value (gpt-oss).
    """

    query: Tensor
    new_keys: Tensor
    new_values: Tensor
    keys: Tensor
    values: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(paged: PagedQuery, batch: Batch) -> Tensor:
    """Return [T, heads, v_dim], contiguous, of the query's dtype. keys and values have the new tokens already.

    The parts of a batch are attended apart: each kernel is fast for its own kind of sequence.
    """
    if batch.parts:
        found = paged.query.new_empty((*paged.query.shape[:2], paged.values.shape[-1]))
        for part in batch.parts:
            tokens = part.tokens
            new = (paged.query[tokens], paged.new_keys[tokens], paged.new_values[tokens])
            found[tokens] = attend(replace(paged, query=new[0], new_keys=new[1], new_values=new[2]), part)
        return found
    if can_use_flash(paged, batch.block_size):
        return _attend_flash(paged, batch)
    out = paged.query.new_empty((*paged.query.shape[:2], paged.values.shape[-1]))
    for i, length in enumerate(batch.kv_lengths):
        first, last = batch.query_starts[i], batch.query_starts[i + 1]
        blocks = batch.block_table[i, : -(-length // batch.block_size)].long()
        out[first:last] = _attend_one(paged, paged.query[first:last], blocks, length)
    return out


def can_use_flash(paged: PagedQuery, block_size: int) -> bool:
    """Return whether flash-attn 2 supports this layer: pages of 256 tokens and 16-bit floats."""
    return (
        paged.query.is_cuda
        and paged.query.dtype in (torch.bfloat16, torch.float16)
        and block_size % 256 == 0
        and paged.keys.shape[-1] == paged.values.shape[-1]
        and paged.keys.shape[-1] in flash_head_dims()
    )


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


def layout_uses_flash(layout: BlockLayout) -> bool:
    """Return whether flash-attn supports every layer of a layout on a GPU."""
    return (
        layout.dtype in ("bfloat16", "float16")
        and layout.block_size % 256 == 0
        and all(layer.k_dim == layer.v_dim and layer.k_dim in flash_head_dims() for layer in layout.layers)
    )


@cache
def flash_head_dims() -> frozenset[int]:
    """Return the head dims that flash-attn was tested with here; empty if it is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return frozenset()
    return frozenset({64, 128})


def _attend_flash(paged: PagedQuery, batch: Batch) -> Tensor:
    """Run flash-attn on the strided pages.

    For few new tokens, equally many per sequence, it is `flash_attn_with_kvcache`, which splits long K and V over
    multiprocessors. Otherwise it is `flash_attn_varlen_func`; if nothing is cached, on K and V as the layer gives them.
    The log-sum-exp is needed for sinks.
    """
    flash: Any = importlib.import_module("flash_attn")
    options: dict[str, Any] = {
        "softmax_scale": paged.scale,
        "causal": True,
        "window_size": (paged.window - 1, 0) if paged.window else (-1, -1),
        "softcap": paged.softcap or 0.0,
    }
    query = paged.query.contiguous()
    is_short = batch.max_new <= MAX_SPLIT_TOKENS or query.shape[0] <= MAX_SHORT_TOKENS
    if batch.is_even and is_short:
        out, lse = flash.flash_attn_with_kvcache(
            query.view(-1, batch.max_new, *query.shape[1:]),
            paged.keys,
            paged.values,
            cache_seqlens=batch.kv_lengths_tensor,
            block_table=batch.block_table,
            return_softmax_lse=True,
            **options,
        )
        if paged.sinks is not None:
            return add_sinks(out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1), paged.sinks)
        return torch.flatten(out, 0, 1)
    if batch.has_past:
        keys, values, max_length = paged.keys, paged.values, max(batch.kv_lengths)
        options["block_table"] = batch.block_table
    else:
        keys, values, max_length = paged.new_keys, paged.new_values, batch.max_new
    starts = (batch.query_starts_tensor, batch.kv_starts_tensor)
    out, lse, _ = flash.flash_attn_varlen_func(
        query, keys, values, *starts, batch.max_new, max_length, return_attn_probs=True, **options
    )
    return add_sinks(out, lse.transpose(0, 1), paged.sinks)


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
