"""Merge exponent planes of 16-bit floats with the rest: the decoder of the cold tier's codec, on a GPU.

The planes are those of storage/planes.py, byte for byte.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous

__all__ = ["merge_frames"]

_BLOCK = 4096


def merge_frames(
    planes: Tensor, payloads: Tensor, rests: Tensor, tiles: Tensor, block_ids: Tensor, pool: Tensor
) -> None:
    """Write whole blocks from their decoded exponent planes and the raw rests in their payloads.

    planes: [n, values] uint8, in the order of the block's values. payloads: [n, stride] uint8. rests: [n, runs] int64,
    where in its payload a run's rest begins. tiles: [t, 4] int32 of `CodedLayout.tiles`. block_ids: [n] int64.
    pool: [num_blocks, values] of a 16-bit dtype. All contiguous, on one device. Asynchronous on the current stream.
    Raises ShapeError before launching anything.
    """
    require_contiguous(planes=planes, payloads=payloads, rests=rests, tiles=tiles, block_ids=block_ids, pool=pool)
    count = block_ids.shape[0]
    require(pool.dim() == 2 and pool.element_size() == 2, "pool must be [num_blocks, values] of a 16-bit dtype")
    require(planes.shape == (count, pool.shape[1]) and planes.dtype == torch.uint8, "planes must be [n, values] uint8")
    require(payloads.dim() == 2 and payloads.dtype == torch.uint8, "payloads must be [n, stride] uint8")
    require(payloads.shape[0] == rests.shape[0] == count, "there must be one payload for each block id")
    require(rests.dim() == 2 and rests.dtype == block_ids.dtype == torch.int64, "rests and block_ids are int64")
    require(tiles.dim() == 2 and tiles.shape[1] == 4 and tiles.dtype == torch.int32, "tiles must be [t, 4] int32")
    if count:
        _merge_frames[(tiles.shape[0], count)](
            planes,
            payloads,
            rests,
            tiles,
            block_ids,
            pool.view(torch.int16),
            pool.shape[1],
            payloads.shape[1],
            rests.shape[1],
            BLOCK=_BLOCK,
        )


@triton.jit
def _merge_frames(planes, payloads, rests, tiles, block_ids, values, num_values, stride, num_runs, BLOCK: tl.constexpr):
    tile, item = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = tl.load(tiles + tile * 4)
    at = tl.load(tiles + tile * 4 + 1)
    run = tl.load(tiles + tile * 4 + 2)
    count = tl.load(tiles + tile * 4 + 3)
    i = tl.arange(0, BLOCK)
    inside = i < count
    rest = payloads + item * stride + tl.load(rests + item * num_runs + run) + at
    high = tl.load(planes + item * num_values + first + i, mask=inside, other=0).to(tl.int32)
    low = tl.load(rest + i, mask=inside, other=0).to(tl.int32)
    bits = ((low & 0x80) << 8) | (high << 7) | (low & 0x7F)
    target = values + tl.load(block_ids + item) * num_values + first
    tl.store(target + i, bits.to(tl.int16), mask=inside)
