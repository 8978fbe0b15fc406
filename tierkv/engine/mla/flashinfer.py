"""Absorbed MLA by FlashInfer, in place over the hot pool: planned once a pass, run once a layer.

A layer's latents are strided views of the pool, [blocks, block_size, rank] and [blocks, block_size, rope_dim], with the
stride of a whole block between pages. FlashInfer 0.6 takes any page size and any strides but of the last dim. Its
kernels multiply page number and stride in 32 bits, so a pool beyond that is copied page by page before each layer.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierkv.engine.attention import to_device
from tierkv.engine.mla.attention import MlaBatch
from tierkv.engine.mla.layers import MlaLayer

__all__ = ["MAX_SPAN", "FlashInferMla", "flashinfer_kernel", "why_no_flashinfer"]

MAX_SPAN = 1 << 32
"""Numbers of a pool that FlashInfer can address: `indices[q] * ckv_stride_page` is of 32 bits in its mla.cuh."""

_MODULE = "flashinfer.mla"
_RANK, _ROPE_DIM = 512, 64  # the dims that its MLA kernels are written for
_WORKSPACE_BYTES = 128 << 20  # as FlashInfer recommends; one plan's partial results take 17 MB on 132 multiprocessors
_TILE_ROWS = 64
_MAX_TILES = 8192  # of a plan: FlashInfer has room for 16384 pieces of work, split ones included


def why_no_flashinfer(model: Any, layers: Sequence[MlaLayer]) -> str | None:
    """Return why FlashInfer cannot compute a model's absorbed attention; None if it can."""
    if model.device.type != "cuda":
        return "it needs CUDA"
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed"
    if model.dtype not in (torch.bfloat16, torch.float16):
        return f"it does not compute in {model.dtype}"
    if any((layer.rank, layer.rope_dim) != (_RANK, _ROPE_DIM) for layer in layers):
        return f"it wants latents of {_RANK} and {_ROPE_DIM} numbers"
    if len({(layer.scale, layer.heads) for layer in layers}) != 1:
        return "the layers' scales or heads differ"
    try:
        importlib.import_module(_MODULE)
    except (AttributeError, ImportError, OSError, RuntimeError) as exc:  # a package that it needs, or the driver
        return f"it cannot be imported: {exc}"
    return None


def flashinfer_kernel(model: Any, layers: Sequence[MlaLayer]) -> FlashInferMla:
    """Return FlashInfer's MLA for a model without `why_no_flashinfer`."""
    first = layers[0]
    library = importlib.import_module(_MODULE)
    return FlashInferMla(
        library, device=torch.device(model.device), dtype=model.dtype, heads=first.heads, scale=first.scale
    )


class FlashInferMla:
    """The MLA of FlashInfer for one model. library: the module `flashinfer.mla`.

    copied_passes: passes for which the latents were copied, because the pool is larger than FlashInfer can address.
    """

    def __init__(self, library: Any, *, device: torch.device, dtype: torch.dtype, heads: int, scale: float) -> None:
        self.copied_passes: int = 0
        self._library = library
        self._device = device
        self._dtype = dtype
        self._heads = heads
        self._scale = scale
        self._workspace: Tensor | None = None
        self._wrappers: list[Any] = []
        self._groups: list[slice] = []  # the new tokens of each wrapper's sequences
        self._copied: Tensor | None = None  # block ids [pages] int64, if pages are copied
        self._planned: torch.cuda.Event | None = None

    def plan(self, batch: MlaBatch, rows: list[int], span: int) -> None:
        """Prepare a pass over the batch's sequences `rows`, as `MlaKernel.plan`."""
        if self._planned is not None:
            self._planned.synchronize()  # FlashInfer copies each plan from the same page-locked memory
        counts = [batch.query_starts[row + 1] - batch.query_starts[row] for row in rows]
        lengths = [batch.kv_lengths[row] for row in rows]
        pages = [-(-length // batch.block_size) for length in lengths]
        indices = self._page_indices(batch, rows, pages)
        self._copied = None
        if span > MAX_SPAN:
            self.copied_passes += 1
            self._copied = indices.long()
            indices = torch.arange(len(indices), dtype=torch.int32, device=self._device)
        page_starts, token_starts = np.cumsum([0, *pages]), np.cumsum([0, *counts])
        self._groups.clear()
        for number, (first, last) in enumerate(pairwise(_group_ends(counts, self._heads))):
            self._wrapper(number).plan(
                torch.from_numpy((token_starts[first : last + 1] - token_starts[first]).astype(np.int32)),
                torch.from_numpy((page_starts[first : last + 1] - page_starts[first]).astype(np.int32)),
                indices[page_starts[first] : page_starts[last]],
                torch.tensor(lengths[first:last], dtype=torch.int32),
                self._heads,
                _RANK,
                _ROPE_DIM,
                batch.block_size,
                max(counts[first:last]) > 1,
                self._scale,
                self._dtype,
                self._dtype,
            )
            self._groups.append(slice(int(token_starts[first]), int(token_starts[last])))
        if self._device.type == "cuda":
            self._planned = torch.cuda.Event()
            self._planned.record(torch.cuda.current_stream(self._device))

    def attend(self, query: Tensor, query_rope: Tensor, pages: Tensor) -> Tensor:
        """Attend as `MlaKernel.attend`, with the last plan."""
        if self._copied is not None:
            pages = pages.index_select(0, self._copied)
        latent, rope = pages[..., :_RANK], pages[..., _RANK:]
        parts = [
            self._wrappers[number].run(query[tokens], query_rope[tokens], latent, rope)
            for number, tokens in enumerate(self._groups)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _page_indices(self, batch: MlaBatch, rows: list[int], pages: list[int]) -> Tensor:
        """Return the block ids of all sequences in a row, int32 on the device, without a wait for it."""
        width = batch.block_table.shape[1]
        places = np.concatenate([np.arange(count) + row * width for row, count in zip(rows, pages, strict=True)])
        (at,) = to_device([places.astype(np.int64)], self._device)
        return batch.block_table.reshape(-1)[at]

    def _wrapper(self, number: int) -> Any:
        if self._workspace is None:
            self._workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=self._device)
        while len(self._wrappers) <= number:
            self._wrappers.append(self._library.BatchMLAPagedAttentionWrapper(self._workspace, backend="auto"))
        return self._wrappers[number]


def _group_ends(counts: Sequence[int], heads: int) -> Iterator[int]:
    """Yield 0 and the ends of the groups of sequences that one plan has room for; each has at least one sequence."""
    yield 0
    tiles = 0
    for number, count in enumerate(counts):
        more = -(-count * heads // _TILE_ROWS)
        if tiles and tiles + more > _MAX_TILES:
            yield number
            tiles = 0
        tiles += more
    yield len(counts)
