"""Attention over the latents of MLA in the paged cache, exact and causal, in two ways.

Absorbed: the projection of the keys is applied to the query, that of the values to the result, and all heads attend to
the latents themselves. Decoding reads few bytes so. Expanded: K and V of one layer are computed from the latents for
the duration of the call, which takes less arithmetic for many new tokens. The arithmetic decides for each sequence.
Source: DeepSeek-V2 (2024), section 2.1.2 and appendix C.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from tierkv.engine.attention_merge import merge_parts
from tierkv.engine.backends.torch_attention import cpu_attention
from tierkv.engine.mla.layers import MlaInput, MlaLayer
from tierkv.errors import ShapeError

__all__ = ["MlaAttention", "MlaBatch", "MlaKernel", "is_expanding_cheaper"]

_EXPANDED_BYTES = 256 << 20  # of K and V of some heads at a time
_LEAST_EXPANDED = 32  # tokens: for fewer, the calls for one sequence cost more than the arithmetic that they save
_SCORE_BYTES = 256 << 20  # of the scores of some queries at a time


class MlaPool(Protocol):
    """Paged memory: the latents of each layer, [num_blocks, block_size, 1, latent_dim]."""

    def key_cache(self, layer: int) -> Tensor: ...


class MlaBatch(Protocol):
    """The fields of an AttentionBatch that MLA reads."""

    block_size: int
    query_starts: list[int]
    kv_lengths: list[int]
    block_table: Tensor
    block_ids: Tensor
    offsets: Tensor


class MlaKernel(Protocol):
    """Absorbed attention of several sequences by one call of a library."""

    def plan(self, batch: MlaBatch, rows: list[int], span: int) -> None:
        """Prepare a pass. rows: the batch's sequences; span: numbers from the pool's first to behind its last one."""
        ...

    def attend(self, query: Tensor, query_rope: Tensor, pages: Tensor) -> Tensor:
        """Return [T, heads, rank] of the planned sequences' new tokens, in the order of the plan.

        query: [T, heads, rank]. query_rope: [T, heads, rope_dim]. pages: [num_blocks, block_size, latent_dim].
        """
        ...


@dataclass(slots=True, kw_only=True)
class _Plan:
    """Which sequences of a batch attend in which way; made once a pass."""

    batch: MlaBatch
    absorbed: list[int]
    expanded: list[int]


class MlaAttention:
    """Attends layer by layer through a batch's block table.

    kernel: computes absorbed attention; None is plain torch. always: "absorbed" or "expanded" for every sequence, as
    the self-test forces it; None lets the arithmetic decide. absorbed, expanded: how many sequences were attended in
    each way, counted once a pass.
    """

    def __init__(self, kernel: MlaKernel | None = None) -> None:
        self.kernel = kernel
        self.always: str | None = None
        self.absorbed: int = 0
        self.expanded: int = 0
        self._plan: _Plan | None = None

    @contextmanager
    def only(self, way: str) -> Iterator[None]:
        """Attend in one way inside the `with` block: "absorbed" or "expanded"."""
        before, self.always = self.always, way
        try:
            yield
        finally:
            self.always = before

    def attend(self, layer: MlaLayer, new: MlaInput, pool: MlaPool, batch: MlaBatch) -> Tensor:
        """Write the new tokens' latents and attend. Return [T, heads, v_dim]."""
        pages = pool.key_cache(layer.index).squeeze(2)
        if pages.shape[-1] != layer.latent_dim:
            raise ShapeError(
                f"the cache holds latents of {pages.shape[-1]} numbers, the layer's have {layer.latent_dim}"
            )
        pages[batch.block_ids, batch.offsets] = new.latent
        plan = self._plan_of(layer, batch, pages)
        if not plan.expanded:
            return self._attend_absorbed(layer, new.query, new.query_rope, pages, plan)
        out = new.query.new_empty(new.query.shape[0], layer.heads, layer.v_dim)
        spans = {row: slice(*batch.query_starts[row : row + 2]) for row in range(len(batch.kv_lengths))}
        if plan.absorbed:
            query, rope = (
                torch.cat([each[spans[row]] for row in plan.absorbed]) for each in (new.query, new.query_rope)
            )
            found = self._attend_absorbed(layer, query, rope, pages, plan)
            counts = [spans[row].stop - spans[row].start for row in plan.absorbed]
            for row, part in zip(plan.absorbed, found.split(counts), strict=True):
                out[spans[row]] = part
        for row in plan.expanded:
            _attend_expanded(layer, new, spans[row], _latents_of(pages, batch, row), out)
        return out

    def end_pass(self) -> None:
        """Forget the last pass's plan, which refers to its batch."""
        self._plan = None

    def _plan_of(self, layer: MlaLayer, batch: MlaBatch, pages: Tensor) -> _Plan:
        if self._plan is not None and self._plan.batch is batch:
            return self._plan
        plan = _Plan(batch=batch, absorbed=[], expanded=[])
        for row, length in enumerate(batch.kv_lengths):
            num_new = batch.query_starts[row + 1] - batch.query_starts[row]
            is_expanded = is_expanding_cheaper(layer, num_new, length) if self.always is None else None
            way = self.always or ("expanded" if is_expanded else "absorbed")
            (plan.expanded if way == "expanded" else plan.absorbed).append(row)
        self.absorbed += len(plan.absorbed)
        self.expanded += len(plan.expanded)
        if self.kernel is not None and plan.absorbed:
            self.kernel.plan(batch, plan.absorbed, pages.shape[0] * pages.stride(0))
        self._plan = plan
        return plan

    def _attend_absorbed(self, layer: MlaLayer, query: Tensor, rope: Tensor, pages: Tensor, plan: _Plan) -> Tensor:
        """Return [T, heads, v_dim] of the new tokens of the plan's absorbed sequences, in a row."""
        wide = torch.bmm(query.transpose(0, 1), layer.key_weight).transpose(0, 1)  # [T, heads, rank]
        if self.kernel is not None:
            found = self.kernel.attend(wide, rope, pages)
        else:
            batch, first = plan.batch, 0
            parts: list[Tensor] = []
            for row in plan.absorbed:
                last = first + batch.query_starts[row + 1] - batch.query_starts[row]
                whole = torch.cat((wide[first:last], rope[first:last]), dim=-1)
                parts.append(_attend_latents(whole, _latents_of(pages, batch, row), layer))
                first = last
            found = torch.cat(parts)
        return torch.bmm(found.transpose(0, 1), layer.value_weight.transpose(1, 2)).transpose(0, 1)


def is_expanding_cheaper(layer: MlaLayer, num_new: int, length: int) -> bool:
    """Return whether attention over expanded K and V takes less arithmetic than over latents, expansion included.

    num_new: the last tokens of `length`. With DeepSeek's dims it does from about 170 new tokens on.
    """
    if num_new < _LEAST_EXPANDED:
        return False
    pairs = num_new * (length - num_new) + num_new * (num_new + 1) // 2
    projection = layer.rank * (layer.nope_dim + layer.v_dim)
    absorbed = pairs * (2 * layer.rank + layer.rope_dim) + num_new * projection
    expanded = pairs * (layer.nope_dim + layer.rope_dim + layer.v_dim) + length * projection
    return expanded < absorbed


def _latents_of(pages: Tensor, batch: MlaBatch, row: int) -> Tensor:
    """Return a copy of one sequence's latents, [length, latent_dim]."""
    length = batch.kv_lengths[row]
    blocks = batch.block_table[row, : -(-length // batch.block_size)].long()
    return pages.index_select(0, blocks).flatten(0, 1)[:length]


def _attend_latents(query: Tensor, latents: Tensor, layer: MlaLayer) -> Tensor:
    """Attend query [n, heads, latent_dim] to latents [length, latent_dim]. Return [n, heads, rank]."""
    if query.is_cuda:
        return _attend_wide(query, latents, layer)
    keys = latents.unsqueeze(1)  # the values are the keys' beginning: what comes of the rest is dropped
    return _attend_cpu(query, keys, keys, layer.scale)[..., : layer.rank]


def _attend_wide(query: Tensor, latents: Tensor, layer: MlaLayer) -> Tensor:
    """Do as `_attend_latents` in plain torch, in float32, some queries at a time: for a GPU without a library."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    num_new, length = query.shape[0], latents.shape[0]
    keys = latents.to(wide)
    step = max(1, _SCORE_BYTES // (4 * query.shape[1] * length))
    positions = torch.arange(length, device=query.device)
    parts: list[Tensor] = []
    for first in range(0, num_new, step):
        part = query[first : first + step]
        last_seen = torch.arange(part.shape[0], device=query.device) + (length - num_new + first)
        scores = torch.matmul(part.to(wide), keys.T) * layer.scale
        scores.masked_fill_(positions > last_seen.view(-1, 1, 1), -torch.inf)
        parts.append(torch.matmul(scores.softmax(-1), keys[:, : layer.rank]).to(query.dtype))
    return torch.cat(parts)


def _attend_expanded(layer: MlaLayer, new: MlaInput, tokens: slice, latents: Tensor, out: Tensor) -> None:
    """Write attention of one sequence's new tokens over K and V that are expanded for some heads at a time."""
    length, rank = latents.shape[0], layer.rank
    head_bytes = length * (layer.nope_dim + layer.rope_dim + layer.v_dim) * latents.element_size()
    step = max(1, _EXPANDED_BYTES // head_bytes)
    compressed, rope = latents[:, :rank], latents[:, rank:].unsqueeze(1)
    for first in range(0, layer.heads, step):
        heads = slice(first, first + step)
        keys = torch.matmul(compressed, layer.key_weight[heads].transpose(1, 2)).transpose(0, 1)
        keys = torch.cat((keys, rope.expand(-1, keys.shape[1], -1)), dim=-1)
        values = torch.matmul(compressed, layer.value_weight[heads].transpose(1, 2)).transpose(0, 1)
        query = torch.cat((new.query[tokens, heads], new.query_rope[tokens, heads]), dim=-1)
        attend = _attend_gpu if query.is_cuda else _attend_cpu
        out[tokens, heads] = attend(query, keys, values, layer.scale)


def _attend_gpu(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend query [n, heads, dim] at the end of keys and values [length, heads, dim], without a mask in memory."""
    q, k, v = (each.transpose(0, 1).unsqueeze(0) for each in (query, keys, values))
    mask = causal_lower_right(query.shape[0], keys.shape[0])
    out: Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1)


def _attend_cpu(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend query [n, heads, dim] at the end of keys and values [length, kv_heads, dim]; the dims may differ.

    The past needs no mask and the new tokens are causal, so no mask of [n, length] is made. The kernel wants one dim.
    """
    v_dim, dim = values.shape[-1], max(keys.shape[-1], values.shape[-1])
    query, keys, values = (functional.pad(each, (0, dim - each.shape[-1])) for each in (query, keys, values))
    past = keys.shape[0] - query.shape[0]
    parts = [cpu_attention(query, keys[past:], values[past:], scale, is_causal=True)]
    if past and keys.shape[1] == 1:  # heads that share their keys are queries of one head: one matrix, not many vectors
        out, lse = cpu_attention(query.flatten(0, 1).unsqueeze(1), keys[:past], values[:past], scale)
        parts.append((out.view(query.shape), lse.view(query.shape[:2])))
    elif past:
        parts.append(cpu_attention(query, keys[:past], values[:past], scale))
    return merge_parts(parts)[0][..., :v_dim].to(query.dtype)
