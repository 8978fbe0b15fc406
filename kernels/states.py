"""Merge attention over disjoint parts of K and V by their log-sum-exps. Source: FlashInfer's cascade attention."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require

__all__ = ["merge_shared"]


def merge_shared(
    shared: Tensor,
    shared_lse: Tensor,
    own: Tensor,
    own_lse: Tensor,
    out: Tensor,
    *,
    positions: Tensor | None = None,
    sinks: Tensor | None = None,
) -> None:
    """Write the attention of B sequences over a prefix that they share and over what is their own.

    A head is (kv, g): the g-th of the heads that share one head of K and V. Everything but the last dim may have any
    strides, so the outputs of flash-attn are taken as they are, packed or not, and in either order of log-sum-exps.
    own, out: [B, kv, g, dim]; own_lse: [B, kv, g] float32. shared: [S, P, kv, g, dim], of S parts of the prefix;
    shared_lse: [S, n, m, kv, g] float32 with n * m = P, group after group. positions: [B] int32, where in `shared`
    each sequence lies, negative for one that shares nothing; without it sequence b lies at b. sinks: [kv * g] logits
    that take part in the softmax and have no value. A log-sum-exp that is infinite, of either sign, says that a part
    is empty (flash-attn writes both).
    Accumulates in float32. Asynchronous on the current stream. Raises ShapeError before launching anything.
    """
    count, kv_heads, group, dim = own.shape
    require(out.shape == own.shape, "own and out must have one shape [B, kv, g, dim]")
    require(shared.shape[2:] == own.shape[1:], f"shared of {tuple(shared.shape)} does not fit {tuple(own.shape)}")
    require(own_lse.shape == own.shape[:3], "own_lse must be [B, kv, g]")
    require(shared_lse.shape[3:] == own.shape[1:3], "shared_lse must be [S, n, m, kv, g]")
    parts, groups, members = shared_lse.shape[:3]
    require((parts, groups * members) == shared.shape[:2], "shared_lse does not fit shared")
    require(own_lse.dtype == shared_lse.dtype == torch.float32, "log-sum-exps must be float32")
    require(all(t.stride(-1) == 1 for t in (shared, own, out)), "the last dim must be contiguous")
    if positions is None:
        require(shared.shape[1] == count, "without positions every sequence needs a shared part")
    else:
        fits = positions.shape == (count,) and positions.dtype == torch.int32 and positions.is_contiguous()
        require(fits, "positions must be [B] int32")
    if sinks is not None:
        require(sinks.numel() == kv_heads * group and sinks.is_contiguous(), "sinks must be [heads], contiguous")
    rows = count * kv_heads * group
    if rows:
        _merge_shared[(triton.cdiv(rows, 8),)](
            shared,
            shared_lse,
            own,
            own_lse,
            out,
            own if positions is None else positions,
            own if sinks is None else sinks,
            rows,
            parts,
            members,
            *shared.stride()[:4],
            *shared_lse.stride(),
            *own.stride()[:3],
            *own_lse.stride(),
            *out.stride()[:3],
            HAS_POSITIONS=positions is not None,
            HAS_SINKS=sinks is not None,
            KV_HEADS=kv_heads,
            GROUP=group,
            DIM=dim,
            ROWS=8,
            WIDTH=triton.next_power_of_2(dim),
        )


@triton.jit
def _merge_shared(
    shared,
    shared_lse,
    own,
    own_lse,
    out,
    positions,
    sinks,
    rows,
    parts,
    members,
    shared_s,
    shared_p,
    shared_k,
    shared_g,
    lse_s,
    lse_n,
    lse_m,
    lse_k,
    lse_g,
    own_b,
    own_k,
    own_g,
    own_lse_b,
    own_lse_k,
    own_lse_g,
    out_b,
    out_k,
    out_g,
    HAS_POSITIONS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Each program merges ROWS pairs of a sequence and a head."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    b = row // (KV_HEADS * GROUP)
    k = (row // GROUP) % KV_HEADS
    g = row % GROUP
    place = tl.load(positions + b, mask=inside, other=-1) if HAS_POSITIONS else b
    has_shared = inside & (place >= 0)
    place = tl.maximum(place, 0)
    lse_at = (place // members) * lse_n + (place % members) * lse_m + k * lse_k + g * lse_g
    y_lse = tl.load(own_lse + b * own_lse_b + k * own_lse_k + g * own_lse_g, mask=inside, other=-float("inf"))
    y_lse = tl.where(y_lse == float("inf"), -float("inf"), y_lse)
    top = tl.maximum(y_lse, -3.0e38)  # of empty parts only: no NaN
    if HAS_SINKS:
        sink = tl.load(sinks + k * GROUP + g, mask=inside, other=0.0).to(tl.float32)
        top = tl.maximum(top, sink)
    for s in range(parts):
        x_lse = tl.load(shared_lse + lse_at + s * lse_s, mask=has_shared, other=-float("inf"))
        top = tl.maximum(top, tl.where(x_lse == float("inf"), -float("inf"), x_lse))
    column = tl.arange(0, WIDTH)[None, :]
    here = inside[:, None] & (column < DIM)
    y_at = b.to(tl.int64) * own_b + k * own_k + g * own_g
    y = tl.load(own + y_at[:, None] + column, mask=here, other=0.0).to(tl.float32)
    total = tl.exp(y_lse - top)
    merged = y * total[:, None]
    if HAS_SINKS:
        total += tl.exp(sink - top)
    x_at = place.to(tl.int64) * shared_p + k * shared_k + g * shared_g
    for s in range(parts):
        x_lse = tl.load(shared_lse + lse_at + s * lse_s, mask=has_shared, other=-float("inf"))
        weight = tl.exp(tl.where(x_lse == float("inf"), -float("inf"), x_lse) - top)
        x = tl.load(shared + s * shared_s + x_at[:, None] + column, mask=here & has_shared[:, None], other=0.0)
        merged += x.to(tl.float32) * weight[:, None]
        total += weight
    merged = merged / tl.maximum(total, 1.0e-38)[:, None]
    out_at = b.to(tl.int64) * out_b + k * out_k + g * out_g
    tl.store(out + out_at[:, None] + column, merged.to(out.dtype.element_ty), mask=here)
