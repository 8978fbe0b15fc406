"""Merges attention over disjoint parts of K and V by log-sum-exp: a Triton kernel on a GPU, plain torch elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_gpu_merge: Callable[..., None] | None
try:
    from tierkv.kernels.states import merge_shared as _merge_kernel

    _gpu_merge = _merge_kernel
except ModuleNotFoundError:  # triton has no wheel for this machine
    _gpu_merge = None

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
    """Merge attention over shared prefixes with that over own blocks, as `kernels.states.merge_shared` does."""
    merge = _gpu_merge if _gpu_merge is not None and own.is_cuda else merge_shared_reference
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
    """Do in plain torch what `kernels.states.merge_shared` does, in the dtype of the log-sum-exps."""
    places = positions.long().clamp(min=0)
    lses = torch.cat([shared_lse.flatten(1, 2)[:, places], own_lse[None]])
    lses[:-1, positions < 0] = -torch.inf
    lses = lses.masked_fill(lses == torch.inf, -torch.inf)
    lse = lses.logsumexp(0)
    weights = (lses - lse).exp().nan_to_num(0.0).unsqueeze(-1)
    merged = (shared[:, places].to(lse.dtype) * weights[:-1]).sum(0) + own.to(lse.dtype) * weights[-1]
    out.copy_(add_sinks(merged.flatten(1, 2), lse.flatten(1, 2), sinks).view(out.shape))


def merge_in_place(total: Tensor, total_lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Merge attention over one more part of K and V into total [n, heads, dim] and total_lse [n, heads].

    total, total_lse: float32 or wider. part, part_lse: the same shapes, any strides before the last dim; every query
    sees some key of the part.
    """
    if total.is_cuda and _gpu_merge is not None and total.dtype == torch.float32:
        own = total.unsqueeze(2)
        _gpu_merge(part[None, :, :, None], part_lse[None, None, :, :, None], own, total_lse.unsqueeze(2), own)
        torch.logaddexp(total_lse, part_lse, out=total_lse)
        return
    lse = torch.logaddexp(total_lse, part_lse)
    total.mul_((total_lse - lse).exp_().unsqueeze(-1))
    total.addcmul_(part.to(total.dtype), (part_lse - lse).exp().unsqueeze(-1))
    total_lse.copy_(lse)


def merge_parts(parts: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge outputs and log-sum-exps of disjoint parts (the online softmax of flash attention)."""
    outs, lses = zip(*parts, strict=True)
    if len(outs) == 1:
        return outs[0], lses[0]
    stacked = torch.stack(lses)
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().unsqueeze(-1)
    return (torch.stack(outs).to(weights.dtype) * weights).sum(0), lse


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Add each head's sink to the softmax after attention: it changes only the denominator."""
    if sinks is None:
        return out
    share = torch.sigmoid(lse.float() - sinks.float()).unsqueeze(-1)
    return (out.float() * share).to(out.dtype)
