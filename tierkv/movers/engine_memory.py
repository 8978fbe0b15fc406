"""The KV tensors of an engine that owns them: blocks are copied between its pages and warm slots, page by page.

On a GPU the copy engines do it, in one call for a group of layers, so that no multiprocessor is taken from the model,
and a model can begin with its first layers while the rest is in flight.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tierkv.errors import ShapeError, StoreError
from tierkv.movers.batch_copy import copy_addresses
from tierkv.movers.engine_frames import EngineFrames, open_engine_frames
from tierkv.movers.mover import CudaReady, layer_groups, page_lock, page_unlock, record_event, synchronize_streams
from tierkv.movers.pages import PageMover, page_mover
from tierkv.movers.ready import AllReady, Done, Ready
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout

_log = logging.getLogger(__name__)

__all__ = ["LEFT_OUT", "EngineMemory", "LockedSlots"]

_Numbers: TypeAlias = "npt.NDArray[np.int64]"

_SMALL_BYTES = 256 << 10

LEFT_OUT = -1
"""Stands for a page that a load leaves as it is, because the engine has it already."""


class _Tensor(NamedTuple):
    """One tensor as [pages, page bytes] uint8, and where a block's pages of it begin in a slot."""

    rows: Tensor
    offset: int


class _Pages(NamedTuple):
    """Pages to copy, [n] each: their numbers, the slots of their blocks, and their places among the block's pages.

    lengths: how many pages follow each other in both memories, from that one on.
    """

    pages: _Numbers
    slots: _Numbers
    places: _Numbers
    lengths: _Numbers


class EngineMemory:
    """The pages of one engine on one device. They must stay where they are until `close`.

    layers: for each layer its tensors, one with K and V together or two, each [pages, ...]: dim 0 counts pages, and a
    page is dense, its other dims in any order. A block is `pages_per_block` pages, the same in all tensors; in a slot
    it lies layer after layer, tensor after tensor, page after page, the bytes of a page in the order of its memory.
    It is bound to pools of slots: `load` and `save` say which of them they mean, by its memory.
    Raises ShapeError for tensors that do not fit the layout.
    """

    def __init__(self, layers: Sequence[Sequence[Tensor]], layout: BlockLayout, *, pages_per_block: int = 1) -> None:
        flat = [tensor for layer in layers for tensor in layer]
        if not flat or len({tensor.device for tensor in flat}) != 1:
            raise ShapeError("an engine's memory has tensors, all on one device")
        self.device: torch.device = flat[0].device
        self.pages_per_block = pages_per_block
        self.num_pages: int = min(tensor.shape[0] for tensor in flat)
        self.is_cuda: bool = self.device.type == "cuda"
        rows = [_rows_of(tensor) for tensor in flat]
        offsets = [0, *accumulate(row.shape[1] * pages_per_block for row in rows)]
        self._tensors = [_Tensor(row, offset) for row, offset in zip(rows, offsets, strict=False)]
        self._largest_page = max(row.shape[1] for row in rows)
        self._is_dense = all(row.stride(0) == row.shape[1] for row in rows)  # then neighbouring pages are one copy
        self._ends = list(accumulate(len(layer) for layer in layers))
        _check_layout([offsets[end] for end in self._ends], layout)
        self.layer_groups: list[int] = layer_groups(layout)
        self._slots: dict[int, Tensor] = {}  # of each bound pool, by the address of its memory
        self._page_mover: PageMover | None = None
        self._layout = layout
        self._frames: tuple[int, EngineFrames] | None = None  # and the pool whose payloads it decodes
        if self.is_cuda:
            self.load_stream: torch.cuda.Stream = torch.cuda.Stream(self.device)
            self.save_stream: torch.cuda.Stream = torch.cuda.Stream(self.device)
            self._page_mover = page_mover(rows, layout.block_bytes)

    def bind(self, address: int, slots: Tensor) -> None:
        """Copy to and from a pool of slots too. address: of its first byte; it names the pool."""
        self._slots[address] = slots

    def unbind(self, address: int) -> None:
        """Forget a pool from which, and to which, no copy is in flight. Does nothing for one that is not bound."""
        if self._frames and self._frames[0] == address:
            self._frames = None
        if self._slots.pop(address, None) is not None and self.is_cuda:
            with contextlib.suppress(RuntimeError):  # of a device that has failed: nothing is copied any more
                torch.cuda.synchronize(self.device)

    def open_frames(self, memory: Bytes, slot: int) -> None:
        """Decode payloads in a bound pool on the GPU from now on, if it can. slot: one that is not in use."""
        if self._page_mover:
            frames = open_engine_frames(self._page_mover.pages, self._layout, self._bound(memory), slot)
            self._frames = (memory.ctypes.data, frames) if frames else None

    def blocks_decoded_at_once(self, memory: Bytes) -> int:
        """Return how many payloads in a pool the GPU decodes at once; 0 where the CPU has to."""
        frames = self._frames
        return frames[1].blocks_at_once if frames and frames[0] == memory.ctypes.data else 0

    def mark(self) -> Ready:
        """Return the completion of the work queued on the current stream so far."""
        return CudaReady([record_event(torch.cuda.current_stream(self.device))]) if self.is_cuda else Done()

    def load(
        self, slots: Sequence[int], pages: Sequence[Sequence[int]], memory: Bytes, *, after: Sequence[Ready]
    ) -> Ready:
        """Copy slots into pages, the first layers of all blocks first; the pages of one block for each slot.

        memory: the pool of the slots, [slots, block bytes]; the caller holds the slots until the copies have ended.
        The pages are overwritten after `after` only, such as what `mark` returned. They may be read after `wait`, slots
        reused after `is_done`. Raises ShapeError for pages that do not exist, StoreError for a failed copy: some pages
        may have been written then, and no copy is in flight. StoreError also for a pool that is not bound.
        """
        warm = self._bound(memory)
        found = self._pages_of(slots, pages, may_leave_out=True)
        if not self.is_cuda:
            AllReady(after).synchronize()
            self._copy_one_by_one(found, warm, 0, len(self._ends), to_pages=True)
            return Done()
        if self._page_mover and self._is_scattered(found):
            ids = self._on_device(pages)
            return self._page_mover.load([warm[slot] for slot in slots], ids, after=self._now(after))
        events: list[torch.cuda.Event] = []
        first = 0
        try:
            with torch.cuda.stream(self.load_stream):
                AllReady(after).wait()
                for end in self.layer_groups:
                    theirs, ours, sizes = self._addresses(found, warm, first, end)
                    if not copy_addresses(theirs, ours, sizes, self.load_stream.cuda_stream):
                        self._copy_one_by_one(found, warm, first, end, to_pages=True)
                    events.append(record_event(self.load_stream))
                    first = end
        except RuntimeError as exc:
            synchronize_streams(self.load_stream)
            raise StoreError(f"loading {len(slots)} blocks failed: {exc}") from exc
        return CudaReady(events, self.layer_groups)

    def load_coded(
        self,
        slots: Sequence[int],
        coded: Sequence[CodedBlock],
        pages: Sequence[Sequence[int]],
        memory: Bytes,
        *,
        after: Sequence[Ready],
        keeps_decoded: bool,
    ) -> tuple[Ready, Ready]:
        """Decode payloads in slots into pages; see `EngineFrames.load`, and `load` for the rest.

        Raises StoreError where `blocks_decoded_at_once` is 0, and after a failure, which makes it 0.
        """
        self._pages_of(slots, pages, may_leave_out=True)
        frames = self._frames
        if frames is None or frames[0] != memory.ctypes.data:
            raise StoreError("the GPU does not decode blocks any more")
        try:
            return frames[1].load(slots, coded, pages, after=AllReady(after), keeps_decoded=keeps_decoded)
        except StoreError as exc:
            self._frames = None
            _log.warning("the CPU decodes cold blocks from now on: %s", exc)
            raise

    def decode_for_nothing(self, slots: Sequence[int], coded: Sequence[CodedBlock], memory: Bytes) -> None:
        """Decode payloads and write no page, as a measurement wants it; wait for that. Raises as `load_coded`."""
        nowhere = [[LEFT_OUT] * self.pages_per_block] * len(slots)
        loaded, _ = self.load_coded(slots, coded, nowhere, memory, after=[], keeps_decoded=False)
        loaded.synchronize()

    def save(
        self, pages: Sequence[Sequence[int]], slots: Sequence[int], memory: Bytes, *, after: Sequence[Ready]
    ) -> Ready:
        """Copy pages into slots: the inverse of `load`; no page may be left out."""
        warm = self._bound(memory)
        found = self._pages_of(slots, pages, may_leave_out=False)
        if not self.is_cuda:
            AllReady(after).synchronize()
            self._copy_one_by_one(found, warm, 0, len(self._ends), to_pages=False)
            return Done()
        if self._page_mover and self._is_scattered(found):
            ids = self._on_device(pages)
            return self._page_mover.store(ids, [warm[slot] for slot in slots], after=self._now(after))
        try:
            with torch.cuda.stream(self.save_stream):
                AllReady(after).wait()
                theirs, ours, sizes = self._addresses(found, warm, 0, len(self._ends))
                if not copy_addresses(ours, theirs, sizes, self.save_stream.cuda_stream):
                    self._copy_one_by_one(found, warm, 0, len(self._ends), to_pages=False)
            return CudaReady([record_event(self.save_stream)])
        except RuntimeError as exc:
            synchronize_streams(self.save_stream)
            raise StoreError(f"saving {len(slots)} blocks failed: {exc}") from exc

    def close(self) -> None:
        """Forget all pools and the engine's tensors, after all copies have ended. May be called twice."""
        for address in list(self._slots):
            self.unbind(address)
        self._tensors = []

    def _bound(self, memory: Bytes) -> Tensor:
        """Return the slots of a pool as a tensor. Raises StoreError for a pool that is not bound."""
        slots = self._slots.get(memory.ctypes.data)
        if slots is None:
            raise StoreError("the engine's memory is not bound to these slots any more")
        return slots

    def _pages_of(self, slots: Sequence[int], pages: Sequence[Sequence[int]], *, may_leave_out: bool) -> _Pages:
        """Return the pages to copy, neighbours together. Raises ShapeError for pages that do not exist."""
        if len(slots) != len(pages) or any(len(ids) != self.pages_per_block for ids in pages):
            raise ShapeError(f"each of the {len(slots)} blocks has {self.pages_per_block} pages")
        numbers = np.array(pages, dtype=np.int64).reshape(-1)
        least = LEFT_OUT if may_leave_out else 0
        if numbers.size and not least <= numbers.min() <= numbers.max() < self.num_pages:
            raise ShapeError(f"an engine's page lies in [0, {self.num_pages})")
        owners = np.repeat(np.array(slots, dtype=np.int64), self.pages_per_block)
        places = np.tile(np.arange(self.pages_per_block), len(slots))
        is_kept = numbers != LEFT_OUT
        numbers, owners, places = numbers[is_kept], owners[is_kept], places[is_kept]
        if not self._is_dense:
            return _Pages(numbers, owners, places, np.ones_like(numbers))
        is_first = np.ones(numbers.size, dtype=bool)
        follows = (np.diff(numbers) == 1) & (np.diff(owners) == 0) & (np.diff(places) == 1)
        is_first[1:] = ~follows
        firsts = np.flatnonzero(is_first)
        return _Pages(numbers[firsts], owners[firsts], places[firsts], np.diff(firsts, append=numbers.size))

    def _on_device(self, pages: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(pages, dtype=torch.int64).pin_memory().to(self.device, non_blocking=True)

    def _now(self, after: Sequence[Ready]) -> Ready:
        """Return the completion of `after` and of the work queued on the current stream."""
        return AllReady([*after, self.mark()])

    def _is_scattered(self, found: _Pages) -> bool:
        """Return whether the copies would be so small, and so many, that a kernel does better."""
        return bool(found.pages.size) and float(found.lengths.mean()) * self._largest_page < _SMALL_BYTES

    def _tensors_of(self, first_layer: int, end_layer: int) -> list[_Tensor]:
        return self._tensors[self._ends[first_layer - 1] if first_layer else 0 : self._ends[end_layer - 1]]

    def _copy_one_by_one(
        self, found: _Pages, warm: Tensor, first_layer: int, end_layer: int, *, to_pages: bool
    ) -> None:
        rows_of = [each.tolist() for each in found]
        for rows, offset in self._tensors_of(first_layer, end_layer):
            size = rows.shape[1]
            for page, slot, place, length in zip(*rows_of, strict=True):
                start = offset + place * size
                theirs = rows[page : page + length]
                ours = warm[slot, start : start + length * size].view(length, size)
                to, of = (theirs, ours) if to_pages else (ours, theirs)
                to.copy_(of, non_blocking=True)

    def _addresses(
        self, found: _Pages, warm: Tensor, first_layer: int, end_layer: int
    ) -> tuple[list[int], list[int], list[int]]:
        """Return addresses of pages, of their places in the slots, and sizes, tensor after tensor."""
        slot_starts = warm.data_ptr() + found.slots * warm.stride(0)
        theirs: list[int] = []
        ours: list[int] = []
        sizes: list[int] = []
        for rows, offset in self._tensors_of(first_layer, end_layer):
            size = rows.shape[1]
            theirs += (rows.data_ptr() + found.pages * rows.stride(0)).tolist()
            ours += (slot_starts + (offset + found.places * size)).tolist()
            sizes += (found.lengths * size).tolist()
        return theirs, ours, sizes


class LockedSlots:
    """The slots of one pool as a tensor for each kind of device, page-locked once for all that is on GPUs."""

    def __init__(self, warm: WarmPool) -> None:
        self._warm = warm
        self._slots: dict[str, tuple[torch.device, Tensor]] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the slots, [slots, block bytes], for copies to and from a device. Raises StoreError."""
        if device.type not in self._slots:
            self._slots[device.type] = device, page_lock(self._warm, device)
        return self._slots[device.type][1]

    def close(self) -> None:
        """Undo the page lock, after all copies have ended. May be called twice. Raises StoreError."""
        locked, self._slots = self._slots, {}
        for device, slots in locked.values():
            page_unlock(slots, device)


def _rows_of(tensor: Tensor) -> Tensor:
    """Return a view of a tensor as [pages, page bytes] uint8. Raises ShapeError unless each page is dense."""
    if tensor.dim() < 2 or not tensor.shape[0]:
        raise ShapeError(f"an engine's tensor is [pages, ...], got {tuple(tensor.shape)}")
    expected = 1
    for stride, size in sorted(zip(tensor.stride()[1:], tensor.shape[1:], strict=True)):
        if size != 1 and stride != expected:
            raise ShapeError(f"a page is not dense: shape {tuple(tensor.shape)}, strides {tensor.stride()}")
        expected *= size
    if tensor.shape[0] > 1 and tensor.stride(0) < expected:
        raise ShapeError(f"pages overlap: shape {tuple(tensor.shape)}, strides {tensor.stride()}")
    flat = tensor.detach().as_strided((tensor.shape[0], expected), (max(tensor.stride(0), expected), 1))
    return flat.view(torch.uint8)


def _check_layout(ends: Sequence[int], layout: BlockLayout) -> None:
    """Raise ShapeError unless the layers end where the layout's end."""
    expected = list(layout.layer_offsets[1:])
    if list(ends) != expected:
        raise ShapeError(
            f"the engine's layers end at bytes {list(ends)[-3:]} of a block, the layout's at {expected[-3:]}"
        )
