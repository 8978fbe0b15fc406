"""The hot tier's bytes: one block-major tensor that attention reads in place.

Source: paging is PagedAttention's (Kwon et al., 2023). Unlike there, a block holds all layers in one piece: one copy
promotes or demotes it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tierkv.errors import CapacityError, ClosedError, ConfigError
from tierkv.values.layout import BlockLayout, Run

__all__ = ["HotPool", "hot_pool_blocks"]


class HotPool:
    """Paged memory of `num_blocks` blocks on one device, zeroed at the start, and one scratch block after them.

    `blocks` is [num_blocks + 1, block_bytes / item_bytes] of the layout's dtype. Each layer's K and V are strided
    views of it, made once: [num_blocks + 1, block_size, kv_heads, dim], with a page stride of a whole block. So is a
    layer's latent, as K of one head; such a layer has no V. No sequence owns the scratch block: padded tokens write
    there.
    """

    def __init__(self, layout: BlockLayout, num_blocks: int, device: torch.device) -> None:
        if num_blocks <= 0:
            raise CapacityError(
                f"the hot pool holds no block: one block takes {layout.block_bytes} bytes",
                hint="raise hot_bytes, or lower block_size",
            )
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.dtype: torch.dtype = getattr(torch, layout.dtype)
        elements = layout.block_bytes // layout.item_bytes
        self.scratch_block = num_blocks
        try:
            self.blocks: Tensor = torch.zeros((num_blocks + 1, elements), dtype=self.dtype, device=device)
        except RuntimeError as exc:  # out of memory, by torch's own name on a GPU
            raise CapacityError(
                f"there is no memory for a hot pool of {num_blocks} blocks of {layout.block_bytes} bytes",
                hint="lower hot_bytes or block_size",
            ) from exc
        self.bytes_view: Tensor = self.blocks.view(torch.uint8)
        self._views = [self._view(run) for run in layout.runs]

    def key_cache(self, layer: int) -> Tensor:
        """Return K, or the latent, of one layer: [num_blocks + 1, block_size, kv_heads, k_dim], sharing memory."""
        return self._view_of(self.layout.first_runs[layer])

    def value_cache(self, layer: int) -> Tensor:
        """Return V of one layer: [num_blocks + 1, block_size, kv_heads, v_dim], strided, sharing memory."""
        assert not self.layout.layers[layer].is_latent, "a latent has no V"
        return self._view_of(self.layout.first_runs[layer] + 1)

    def close(self) -> None:
        """Free the memory, which nothing reads or writes any more. May be called twice.

        An object that still holds the pool, such as a runner until Python collects it, holds no memory then. A CUDA
        graph would still write to it: close only a pool that no sequence uses.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.blocks = self.blocks.new_empty((0, self.blocks.shape[1]))
        self.bytes_view = self.blocks.view(torch.uint8)
        self._views.clear()

    def _view_of(self, run: int) -> Tensor:
        try:
            return self._views[run]
        except IndexError as exc:
            if self._views:
                raise
            raise ClosedError("the cache is closed") from exc

    def _view(self, run: Run) -> Tensor:
        shape = (self.num_blocks + 1, self.layout.block_size, run.heads, run.dim)
        strides = (self.blocks.stride(0), run.heads * run.dim, run.dim, 1)
        return self.blocks.as_strided(shape, strides, run.offset_bytes // self.layout.item_bytes)


def hot_pool_blocks(layout: BlockLayout, device: torch.device, *, hot_bytes: int | None, hot_fraction: float) -> int:
    """Return how many blocks the hot pool gets: from `hot_bytes`, or a share of the GPU memory free now.

    Raises ConfigError for a CUDA device that this machine, or this torch, does not have.
    """
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"there is no device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
    if hot_bytes is None:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        hot_bytes = int(free * hot_fraction) if free is not None else 1 << 30
    return hot_bytes // layout.block_bytes
