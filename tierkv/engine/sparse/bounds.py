"""KeyBounds: the smallest and largest keys of each page in the hot pool, computed when a sequence first wants them.

They are of the bytes that lie in the hot pool, so they are the same whichever tier a block came from, and no tier
stores them. They only decide what is read: wrong ones would make an answer less exact, and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tierkv.engine.sparse.options import PageCounts
from tierkv.errors import CapacityError
from tierkv.values.block import BlockHash
from tierkv.values.layout import BlockLayout

_kernels: ModuleType | None
try:
    from tierkv.kernels import page_scores as _score_kernels

    _kernels = _score_kernels
except ModuleNotFoundError:  # triton has no wheel for this machine
    _kernels = None

__all__ = ["BoundedSequence", "BoundedStep", "KeyBounds"]


class BoundedSequence(Protocol):
    """A running sequence: `chain` has the hashes of its leading registered blocks."""

    @property
    def chain(self) -> Sequence[BlockHash]: ...
    def wait_all(self) -> None: ...


class BoundedStep(Protocol):
    """One sequence's part of a decode step."""

    @property
    def block_table(self) -> Sequence[int]: ...
    @property
    def num_past(self) -> int: ...


class Pool(Protocol):
    """The hot pool: `blocks` is [blocks, elements]."""

    @property
    def blocks(self) -> Tensor: ...
    @property
    def layout(self) -> BlockLayout: ...


@dataclass(slots=True)
class _Known:
    """A sequence's block table when it was last looked at, and how many of its leading pages have bounds."""

    table: list[int]
    pages: int


@dataclass(frozen=True, slots=True, eq=False)
class _LayerGroup:
    """Layers whose keys have one shape. offsets: [layers] int64, of their keys in a block, in elements."""

    offsets: Tensor
    bounds: Tensor


class KeyBounds:
    """Bounds of the pages of one hot pool.

    They take 2 / page of the bytes of K: at 32 tokens a page, 1/32 of a pool of equal K and V. Registered blocks are
    known by their hashes, so a prefix that many sequences share is bounded once; other blocks by the sequence.
    Not thread-safe. Raises CapacityError where the device has no memory for them.
    """

    def __init__(self, pool: Pool, counts: PageCounts) -> None:
        self._pool = pool
        self._counts = counts
        self._per_block = pool.layout.block_size // counts.page
        self._hashes: dict[int, BlockHash] = {}  # of registered blocks all of whose pages have bounds
        self._known: dict[BoundedSequence, _Known] = {}
        self._groups: list[_LayerGroup] = []
        self._of_layer: list[Tensor] = []
        layout = pool.layout
        self._of_layer = [torch.empty(0)] * layout.num_layers
        for shape in dict.fromkeys((each.kv_heads, each.k_dim) for each in layout.layers):
            layers = [at for at, each in enumerate(layout.layers) if (each.kv_heads, each.k_dim) == shape]
            self._add_group(layers, *shape)

    def of(self, layer: int) -> Tensor:
        """Return the bounds of a layer: [blocks, kv_heads, pages per block, 2, k_dim]; the smallest, the largest."""
        return self._of_layer[layer]

    def update(self, steps: Iterable[tuple[BoundedSequence, BoundedStep]]) -> int:
        """Compute the bounds that a decode step needs and that are not there. Return of how many pages.

        Where one lacks any, all get what they can: so a launch serves several sequences, and the next ones are rare.
        """
        steps = list(steps)
        known = {sequence: self._look(sequence, step) for sequence, step in steps}
        self._known = known  # those of other sequences are forgotten
        page, per_block = self._counts.page, self._per_block
        if all(known[sequence].pages >= self._counts.scored(step.num_past + 1) for sequence, step in steps):
            return 0
        wanted: dict[int, None] = {}  # page numbers, in order, each once
        for sequence, step in steps:
            sequence.wait_all()  # their bytes may be arriving
            state = known[sequence]
            for at in range(state.pages, step.num_past // page):
                place, inner = divmod(at, per_block)
                block_id = state.table[place]
                if not self._is_bounded(sequence, place, block_id):
                    wanted[block_id * per_block + inner] = None
        for number in wanted:  # their bounds are no longer of the block that had the hash
            self._hashes.pop(number // per_block, None)
        self._compute(list(wanted))
        for sequence, step in steps:
            state = known[sequence]
            state.pages = max(state.pages, step.num_past // page)
            for place in range(min(len(sequence.chain), state.pages // per_block)):
                self._hashes[state.table[place]] = sequence.chain[place]
        return len(wanted)

    def _look(self, sequence: BoundedSequence, step: BoundedStep) -> _Known:
        """Return what is known of a sequence, up to the first block that is another one than before."""
        state = self._known.get(sequence)
        table = step.block_table
        if state is None:
            return _Known(list(table), 0)
        if state.table != table:
            same = next(
                (at for at, (old, new) in enumerate(zip(state.table, table, strict=False)) if old != new),
                min(len(state.table), len(table)),
            )
            state.table, state.pages = list(table), min(state.pages, same * self._per_block)
        return state

    def _is_bounded(self, sequence: BoundedSequence, place: int, block_id: int) -> bool:
        """Return whether a registered block has bounds, perhaps from another sequence."""
        return place < len(sequence.chain) and self._hashes.get(block_id) == sequence.chain[place]

    def _add_group(self, layers: list[int], kv_heads: int, k_dim: int) -> None:
        layout, blocks = self._pool.layout, self._pool.blocks
        offsets = [layout.layer_offsets[layer] // layout.item_bytes for layer in layers]
        shape = (len(layers), blocks.shape[0], kv_heads, self._per_block, 2, k_dim)
        try:
            bounds = torch.zeros(shape, dtype=blocks.dtype, device=blocks.device)
        except RuntimeError as exc:  # out of memory, by torch's own name on a GPU
            raise CapacityError(
                f"there is no memory for the key bounds of sparse decode: {np.prod(shape) * layout.item_bytes} bytes",
                hint="lower hot_bytes, or take larger pages",
            ) from exc
        self._groups.append(_LayerGroup(torch.tensor(offsets, dtype=torch.int64, device=blocks.device), bounds))
        for at, layer in enumerate(layers):
            self._of_layer[layer] = bounds[at]

    def _compute(self, pages: list[int]) -> None:
        """Compute the bounds of pages in all layers, on the current stream."""
        if not pages:
            return
        blocks = self._pool.blocks
        numbers = torch.from_numpy(np.array(pages, dtype=np.int32))
        if blocks.is_cuda and _kernels is not None:
            numbers = numbers.pin_memory().to(blocks.device, non_blocking=True)
            for group in self._groups:
                _kernels.bound_pages(blocks, group.offsets, numbers, group.bounds, page=self._counts.page)
            return
        for group in self._groups:
            bound_pages_cpu(blocks, group.offsets, numbers, group.bounds, page=self._counts.page)


def bound_pages_cpu(pool: Tensor, offsets: Tensor, pages: Tensor, bounds: Tensor, *, page: int) -> None:
    """Do as `kernels.page_scores.bound_pages`, in torch."""
    layers, blocks, kv_heads, per_block, _, dim = bounds.shape
    block_ids, inner = pages.long() // per_block, pages.long() % per_block
    shape = (blocks, per_block, page, kv_heads, dim)
    token = kv_heads * dim
    for layer in range(layers):
        strides = (pool.stride(0), page * token, token, dim, 1)
        keys = pool.as_strided(shape, strides, pool.storage_offset() + int(offsets[layer]))
        found = keys[block_ids, inner]  # [n, page, kv_heads, dim]
        bounds[layer][block_ids, :, inner] = torch.stack([found.amin(1), found.amax(1)], dim=2)
