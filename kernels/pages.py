"""Gather and scatter between an engine's layer-major pages and blocks of ours.

An engine that owns its pool has, for each layer, K and V of `[num_pages, page_size, kv_heads, dim]`; a block has
all layers of `block_size` tokens in one piece. These kernels move whole blocks between the two, also directly to
and from page-locked CPU memory. The hot pool does not need them: there a block is one copy.

They take multiprocessors from other kernels: a decode step beside them becomes 2 to 3 times slower at full speed
(measured), so `num_programs` bounds how many they occupy.
Source: the multi-layer transfer kernel of LMCache, the block copy of PagedAttention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.kernels.launch import require, require_contiguous

__all__ = ["LayerPages", "gather_blocks", "scatter_blocks"]

_WORD_BYTES = 8
_CHUNK_WORDS = 2048  # 16 KiB a step: 128-bit loads for 4 warps, several in flight


class LayerPages:
    """The pools of an engine, checked and listed once for the kernels.

    layers: K of layer 0, V of layer 0, K of layer 1, ...: each [num_pages, ...], contiguous, on one device. They must
    stay where they are. Raises ShapeError.
    """

    def __init__(self, layers: Sequence[Tensor]) -> None:
        require(bool(layers), "no layers given")
        require_contiguous(**{f"layer {i}": t for i, t in enumerate(layers)})
        require(len({t.device for t in layers}) == 1, "layers lie on several devices")
        page_bytes = [t[0].numel() * t.element_size() for t in layers]
        require(all(size % _WORD_BYTES == 0 for size in page_bytes), "a page's bytes must be a multiple of 8")
        self.layers: tuple[torch.Tensor, ...] = tuple(layers)
        self.device: torch.device = layers[0].device
        self.bytes_per_page: int = sum(page_bytes)
        self.chunks: int = -(-max(page_bytes) // (_WORD_BYTES * _CHUNK_WORDS))
        words = [size // _WORD_BYTES for size in page_bytes]
        starts = [0, *accumulate(words)][:-1]
        self.table: Tensor = torch.tensor([[t.data_ptr() for t in layers], starts, words], device=self.device)


def gather_blocks(pages: LayerPages, page_ids: Tensor, blocks: Tensor, *, num_programs: int = 128) -> None:
    """Copy pages into blocks.

    page_ids: [n, pages_per_block] int64, on the layers' device. blocks: [n, block_bytes] uint8, contiguous, on that
    device or page-locked CPU memory; written entirely. Asynchronous on the current stream.
    Raises ShapeError before launching anything.
    """
    _move(pages, page_ids, blocks, num_programs, to_blocks=True)


def scatter_blocks(pages: LayerPages, page_ids: Tensor, blocks: Tensor, *, num_programs: int = 128) -> None:
    """Copy blocks into pages: the inverse of `gather_blocks`, same arguments.

    No page may be named twice; -1 stands for a page that stays as it is.
    """
    _move(pages, page_ids, blocks, num_programs, to_blocks=False)


def _move(pages: LayerPages, page_ids: Tensor, blocks: Tensor, num_programs: int, *, to_blocks: bool) -> None:
    require_contiguous(page_ids=page_ids, blocks=blocks)
    require(page_ids.dim() == 2 and page_ids.dtype == torch.int64, "page_ids must be [n, pages_per_block] int64")
    require(blocks.dtype == torch.uint8 and blocks.dim() == 2, "blocks must be [n, block_bytes] uint8")
    require(page_ids.device == pages.device, "page_ids must lie where the layers lie")
    num_blocks, pages_per_block = page_ids.shape
    shape = (num_blocks, pages.bytes_per_page * pages_per_block)
    require(tuple(blocks.shape) == shape, f"blocks of shape {tuple(blocks.shape)} do not fit {shape}")
    require(blocks.device == page_ids.device or blocks.is_pinned(), "blocks must lie on the device or be page-locked")
    total = num_blocks * len(pages.layers) * pages_per_block * pages.chunks
    if not total:
        return
    _move_pages[(min(total, num_programs),)](
        pages.table,
        page_ids,
        blocks.view(torch.int64),
        total,
        len(pages.layers),
        pages_per_block,
        pages.chunks,
        blocks.shape[1] // _WORD_BYTES,
        TO_BLOCKS=to_blocks,
        CHUNK=_CHUNK_WORDS,
    )


@triton.jit
def _move_pages(
    table,
    page_ids,
    blocks,
    total,
    num_layers,
    pages_per_block,
    chunks,
    block_words,
    TO_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Each program takes every n-th (block, layer, page, chunk); words are int64."""
    for item in range(tl.program_id(0), total, tl.num_programs(0)):
        chunk = item % chunks
        page = (item // chunks) % pages_per_block
        layer = (item // (chunks * pages_per_block)) % num_layers
        block = (item // (chunks * pages_per_block * num_layers)).to(tl.int64)
        base = tl.load(table + layer).to(tl.pointer_type(tl.int64))
        start = tl.load(table + num_layers + layer) * pages_per_block
        page_words = tl.load(table + 2 * num_layers + layer)
        page_id = tl.load(page_ids + block * pages_per_block + page)
        word = chunk * CHUNK + tl.arange(0, CHUNK)
        inside = word < tl.where(page_id >= 0, page_words, 0)  # none of a page that is left out
        ours = blocks + block * block_words + start + page * page_words + word
        theirs = base + page_id * page_words + word
        if TO_BLOCKS:
            tl.store(ours, tl.load(theirs, mask=inside), mask=inside)
        else:
            tl.store(theirs, tl.load(ours, mask=inside), mask=inside)
