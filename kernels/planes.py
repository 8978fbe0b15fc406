"""Split 16-bit floats into an exponent plane and the rest, and merge them again: the cold tier's codec, on a GPU.

The planes are those of storage/planes.py, byte for byte, so that what the CPU wrote a GPU can merge.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous

__all__ = ["merge_planes", "split_planes"]

_BLOCK = 4096


def split_planes(values: Tensor, exponent: Tensor, rest: Tensor) -> None:
    """Write both planes of `values`: [n] of a 16-bit dtype; exponent, rest: [n] uint8. All contiguous, on one device.

    Asynchronous on the current stream. Raises ShapeError before launching anything.
    """
    _check(values, exponent, rest)
    _split[(triton.cdiv(values.numel(), _BLOCK),)](
        values.view(torch.int16), exponent, rest, values.numel(), BLOCK=_BLOCK
    )


def merge_planes(exponent: Tensor, rest: Tensor, values: Tensor) -> None:
    """Write `values` from both planes: the inverse of `split_planes`, same shapes."""
    _check(values, exponent, rest)
    _merge[(triton.cdiv(values.numel(), _BLOCK),)](
        exponent, rest, values.view(torch.int16), values.numel(), BLOCK=_BLOCK
    )


def _check(values: Tensor, exponent: Tensor, rest: Tensor) -> None:
    require_contiguous(values=values, exponent=exponent, rest=rest)
    require(values.dim() == 1 and values.element_size() == 2, "values must be [n] of a 16-bit dtype")
    require(exponent.dtype == rest.dtype == torch.uint8, "planes are uint8")
    require(exponent.shape == rest.shape == values.shape, "planes and values must have one length")


@triton.jit
def _split(values, exponent, rest, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    bits = tl.load(values + at, mask=inside, other=0).to(tl.int32) & 0xFFFF
    tl.store(exponent + at, ((bits >> 7) & 0xFF).to(tl.uint8), mask=inside)
    tl.store(rest + at, ((bits >> 8) & 0x80 | bits & 0x7F).to(tl.uint8), mask=inside)


@triton.jit
def _merge(exponent, rest, values, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    high = tl.load(exponent + at, mask=inside, other=0).to(tl.int32)
    low = tl.load(rest + at, mask=inside, other=0).to(tl.int32)
    bits = ((low & 0x80) << 8) | (high << 7) | (low & 0x7F)
    tl.store(values + at, bits.to(tl.int16), mask=inside)
