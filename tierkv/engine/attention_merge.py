"""Merges attention over disjoint parts of K and V by log-sum-exp: a Triton kernel on a GPU, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_on_gpu: Callable[..., None] | None
try:
    from tierkv.kernels.states import merge_shared as _merge_on_gpu

    _on_gpu = _merge_on_gpu
except ModuleNotFoundError:  # triton has no wheel for this machine
    _on_gpu = None

__all__ = ["add_sinks", "merge_in_place", "merge_parts", "merge_shared", "merge_shared_reference"]


def merge_shared(
    shared: Tensor,
    shared_lse: Tensor,
    own: Tensor,
    own_lse: Tensor,
    out: Tensor,
    *,
    positions: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Merge what sequences share with what is each one's own. Contract: `kernels.states.merge_shared`."""
    merge = _on_gpu if _on_gpu is not None and own.is_cuda else merge_shared_reference
    merge(shared, shared_lse, own, own_lse, out, positions=positions, sinks=sinks)


def merge_shared_reference(
    shared: Tensor,
    shared_lse: Tensor,
    own: Tensor,
    own_lse: Tensor,
    out: Tensor,
    *,
    positions: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Do in plain torch what `kernels.states.merge_shared` does, in float32 or the log-sum-exps' own dtype."""
    places = positions.long().clamp(min=0)
    lses = torch.cat([shared_lse.flatten(1, 2)[:, places], own_lse[None]])
    lses[:-1, positions < 0] = -torch.inf
    lses = lses.masked_fill(lses == torch.inf, -torch.inf)
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().nan_to_num(0.0).unsqueeze(-1)
    merged = (shared[:, places].to(lse.dtype) * weights[:-1]).sum(0) + own.to(lse.dtype) * weights[-1]
    out.copy_(add_sinks(merged.flatten(1, 2), lse.flatten(1, 2), sinks).view(out.shape))


def merge_in_place(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take attention over one more part of K and V into a sum: [n, heads, dim] and [n, heads], in float32 or wider.

    part, part_lse: of the same shapes, any strides before the last dim, not empty for any query.
    """
    if total.is_cuda and _on_gpu is not None and total.dtype == torch.float32:
        own = total.unsqueeze(2)
        _on_gpu(part[None, :, :, None], part_lse[None, None, :, :, None], own, total_lse.unsqueeze(2), own)
        torch.logaddexp(total_lse, part_lse, out=total_lse)
        return
    lse = torch.logaddexp(total_lse, part_lse)
    total.mul_((total_lse - lse).exp_().unsqueeze(-1))
    total.addcmul_(part.to(total.dtype), (part_lse - lse).exp().unsqueeze(-1))
    total_lse.copy_(lse)


def merge_parts(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint parts by their log-sum-exps (the online softmax of flash attention)."""
    outs, lses = zip(*parts, strict=True)
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = torch.stack(lses)
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().unsqueeze(-1)
    return (torch.stack(outs).to(weights.dtype) * weights).sum(0), lse


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Take each head's sink into the softmax after the fact: it adds to the denominator only."""
    if sinks is None:
        return out
    share = torch.sigmoid(lse.float() - sinks.float()).unsqueeze(-1)
    return (out.float() * share).to(out.dtype)
