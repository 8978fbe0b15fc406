"""Merge attention over disjoint parts of K and V by their log-sum-exps, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous

__all__ = ["merge_states"]


def merge_states(left: Tensor, left_lse: Tensor, right: Tensor, right_lse: Tensor, out: Tensor) -> None:
    """Write the attention over both parts: out = left * w + right * (1 - w), w from the log-sum-exps.

    left, right, out: [T, heads, dim], contiguous, one dtype; `out` may be `left`. left_lse, right_lse: [T, heads]
    float32, natural logarithm, contiguous; -inf says that a part is empty. Asynchronous on the current stream.
    Raises ShapeError before launching anything. Source: the merge of FlashInfer's cascade attention.
    """
    require_contiguous(left=left, right=right, out=out, left_lse=left_lse, right_lse=right_lse)
    require(left.dim() == 3 and left.shape == right.shape == out.shape, "outputs must have one shape [T, heads, dim]")
    require(left.dtype == right.dtype == out.dtype, "outputs must have one dtype")
    require(left_lse.shape == right_lse.shape == left.shape[:2], "log-sum-exps must be [T, heads]")
    require(left_lse.dtype == right_lse.dtype == torch.float32, "log-sum-exps must be float32")
    rows, dim = left.shape[0] * left.shape[1], left.shape[2]
    if rows:
        _merge_rows[(triton.cdiv(rows, 16),)](
            left, left_lse, right, right_lse, out, rows, dim, ROWS=16, DIM=triton.next_power_of_2(dim)
        )


@triton.jit
def _merge_rows(left, left_lse, right, right_lse, out, rows, dim, ROWS: tl.constexpr, DIM: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    a = tl.load(left_lse + row, mask=row < rows, other=0.0)
    b = tl.load(right_lse + row, mask=row < rows, other=0.0)
    top = tl.maximum(tl.maximum(a, b), -3.0e38)  # of two empty parts: no NaN
    weight_a = tl.exp(a - top)
    weight_b = tl.exp(b - top)
    total = tl.maximum(weight_a + weight_b, 1.0e-38)
    at = row[:, None] * dim + tl.arange(0, DIM)[None, :]
    inside = (row[:, None] < rows) & (tl.arange(0, DIM)[None, :] < dim)
    x = tl.load(left + at, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(right + at, mask=inside, other=0.0).to(tl.float32)
    merged = (x * weight_a[:, None] + y * weight_b[:, None]) / total[:, None]
    tl.store(out + at, merged.to(out.dtype.element_ty), mask=inside)
