"""What flash-attn's functions compute, in plain torch and float32, with the layouts of 2.8.3."""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from torch import Tensor

__all__ = ["flash_reference"]


def flash_reference() -> ModuleType:
    """Return a stand-in for the module, for tests of how it is called where there is no GPU."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.flash_attn_with_kvcache = _with_kvcache  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = _varlen  # type: ignore[attr-defined]
    return module


def _with_kvcache(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    cache_seqlens: Tensor,
    block_table: Tensor,
    softmax_scale: float,
    causal: bool,
    softcap: float,
    window_size: tuple[int, int] = (-1, -1),
    num_splits: int = 0,
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out [n, tokens, heads, dim], contiguous, log-sum-exp [n, heads, tokens]); +inf where nothing is seen."""
    assert return_softmax_lse
    assert num_splits >= 0
    assert all(t.stride(-1) == 1 for t in (query, keys, values, block_table))
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert block_table.shape[0] == cache_seqlens.shape[0] == query.shape[0]
    out = torch.zeros(query.shape, dtype=query.dtype)
    lse = torch.full((query.shape[0], query.shape[2], query.shape[1]), torch.inf)
    for i, length in enumerate(cache_seqlens.tolist()):
        if k is not None and v is not None:
            assert k.shape == v.shape == (query.shape[0], 1, *keys.shape[2:])
            place = block_table[i, length // keys.shape[1]], length % keys.shape[1]
            keys[place], values[place] = k[i, 0], v[i, 0]
            length += 1
        if not length:
            continue
        blocks = block_table[i, : -(-length // keys.shape[1])].long()
        seen = [x[blocks].flatten(0, 1)[:length] for x in (keys, values)]
        out[i], lse[i] = _attend(query[i], *seen, softmax_scale, softcap, causal=causal, window=window_size)
    return out, lse


def _varlen(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_query: int,
    max_key: int,
    *,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    block_table: Tensor | None = None,
    return_attn_probs: bool,
) -> tuple[Tensor, Tensor, None]:
    """Return (out [T, heads, dim], log-sum-exp [heads, T], None)."""
    assert return_attn_probs
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert int(query_starts.diff().max()) <= max_query
    assert int(key_starts.diff().max()) <= max_key
    assert int(query_starts[-1]) == query.shape[0]
    out = torch.empty_like(query)
    lse = torch.empty(query.shape[1], query.shape[0])
    for i in range(len(query_starts) - 1):
        rows, span = (slice(int(each[i]), int(each[i + 1])) for each in (query_starts, key_starts))
        if block_table is None:
            seen = [keys[span], values[span]]
        else:
            length = span.stop - span.start
            blocks = block_table[i, : -(-length // keys.shape[1])].long()
            seen = [x[blocks].flatten(0, 1)[:length] for x in (keys, values)]
        out[rows], lse[:, rows] = _attend(query[rows], *seen, softmax_scale, softcap, causal=causal, window=window_size)
    return out, lse, None


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, softcap: float, *, causal: bool, window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Attend query [T, heads, dim], the last tokens, to keys [L, kv_heads, dim]. Return out and lse [heads, T]."""
    group, length = query.shape[1] // keys.shape[1], keys.shape[0]
    k, v = (x.float().repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("thd,lhd->htl", query.float(), k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(length - query.shape[0], length)[:, None]
    places = torch.arange(length)[None]
    hidden = (places > at) & causal
    if window[0] >= 0:
        assert window[1] == 0
        hidden = hidden | (places < at - window[0])
    scores = scores.masked_fill(hidden, -torch.inf)
    out = torch.einsum("htl,lhd->thd", scores.softmax(-1), v).to(query.dtype)
    return out, scores.logsumexp(-1)
