"""What flash-attn's functions compute, in plain torch and float32, with the layouts of 2.8.3."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

__all__ = ["flash_reference"]


def flash_reference() -> SimpleNamespace:
    """Return a stand-in for the module, for tests of how it is called where there is no GPU."""
    return SimpleNamespace(flash_attn_with_kvcache=_with_kvcache)


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
    num_splits: int = 0,
    return_softmax_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return (out [n, tokens, heads, dim], contiguous, log-sum-exp [n, heads, tokens]); +inf where nothing is seen."""
    assert not causal
    assert return_softmax_lse
    assert num_splits >= 0
    assert all(t.stride(-1) == 1 for t in (query, keys, values, block_table))
    assert block_table.dtype == cache_seqlens.dtype == torch.int32
    assert block_table.shape[0] == cache_seqlens.shape[0] == query.shape[0]
    group = query.shape[2] // keys.shape[2]
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
        seen = [x[blocks].flatten(0, 1)[:length].float().repeat_interleave(group, 1) for x in (keys, values)]
        scores = torch.einsum("thd,lhd->htl", query[i].float(), seen[0]) * softmax_scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        lse[i] = scores.logsumexp(-1)
        out[i] = torch.einsum("htl,lhd->thd", scores.softmax(-1), seen[1]).to(query.dtype)
    return out, lse
