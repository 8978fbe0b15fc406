"""Store K and V of new tokens into the slots of a paged pool, whatever its page stride."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require

__all__ = ["store_slots"]


def store_slots(keys: Tensor, values: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Write K and V of T tokens where `slot_mapping` says.

    keys, values: [T, kv_heads, dim], last two dims contiguous. key_cache, value_cache: [num_blocks, block_size,
    kv_heads, dim], tokens contiguous inside a page, any page stride. slot_mapping: [T] int64, block_id * block_size +
    offset; negative ones are left out. Asynchronous on the current stream. Raises ShapeError before launching anything.
    Source: the store kernel of nano-vLLM, without its limits (powers of two, 32-bit offsets).
    """
    for name, new, cache in (("keys", keys, key_cache), ("values", values, value_cache)):
        row = new.shape[1] * new.shape[2]
        require(new.dim() == 3 and cache.dim() == 4, f"{name} must be [T, heads, dim] and its cache four-dimensional")
        require(new.shape[1:] == cache.shape[2:], f"{name} of {tuple(new.shape)} do not fit {tuple(cache.shape)}")
        require(new.stride()[1:] == (new.shape[2], 1), f"{name} must be contiguous in heads and dim")
        require(cache.stride()[1:] == (row, new.shape[2], 1), f"the pages of {name} must be contiguous")
        require(new.dtype == cache.dtype, f"{name} are {new.dtype}, their cache is {cache.dtype}")
    fits = slot_mapping.shape == (keys.shape[0],) and slot_mapping.dtype == torch.int64
    require(fits, "slot_mapping must be [T] int64")
    if not keys.shape[0]:
        return
    for new, cache in ((keys, key_cache), (values, value_cache)):
        row = new.shape[1] * new.shape[2]
        strides = (new.stride(0), cache.stride(0))
        row_power = triton.next_power_of_2(row)
        _store_rows[(new.shape[0],)](new, cache, slot_mapping, *strides, cache.shape[1], row, ROW=row_power)


@triton.jit
def _store_rows(new, cache, slot_mapping, new_stride, page_stride, block_size, row, ROW: tl.constexpr):
    """One program a token: copy its heads in one row."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    if slot >= 0:
        column = tl.arange(0, ROW)
        inside = column < row
        target = cache + (slot // block_size) * page_stride + (slot % block_size) * row
        tl.store(target + column, tl.load(new + token * new_stride + column, mask=inside), mask=inside)
