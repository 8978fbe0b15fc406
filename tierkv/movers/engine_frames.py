"""Loads coded blocks into the pages of an engine: a GPU decodes them into blocks of its own, a kernel scatters those.

The decoded blocks are copied back to the slots that held the payloads, while the engine computes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierkv.errors import StoreError
from tierkv.movers.frames import FrameMover, can_decode
from tierkv.movers.mover import CudaReady, Move, Ready, record_event, synchronize_streams
from tierkv.movers.ready import DONE, AllReady
from tierkv.storage.coded import CodedBlock
from tierkv.values.layout import BlockLayout

if TYPE_CHECKING:
    from tierkv.kernels.pages import LayerPages

__all__ = ["EngineFrames", "open_engine_frames"]

_log = logging.getLogger(__name__)

_MOST_BLOCKS = 64
_LEAST_BLOCKS = 4  # fewer at once take a GPU as long as the CPU's cores
_BATCH_BYTES = 512 << 20  # of decoded blocks
_FREE_SHARE = 24  # of the memory that the engine has left, one part in so many is a batch; all is about 5 of them


class EngineFrames:
    """Decodes blocks for one engine's pages, `blocks_at_once` in a batch; two batches are on their way at a time.

    pages: the engine's. slots: [num_slots, block bytes] uint8, page-locked; they hold payloads.
    """

    def __init__(self, pages: LayerPages, layout: BlockLayout, slots: Tensor, *, blocks_at_once: int) -> None:
        from tierkv.kernels import pages as kernels  # needs triton, which is there if there is a GPU

        self.blocks_at_once = blocks_at_once
        self._kernels = kernels
        self._pages = pages
        self._pages_per_block = layout.block_bytes // pages.bytes_per_page
        self._slots = slots
        device = pages.device
        self._blocks = torch.empty((2 * blocks_at_once, layout.block_bytes // 2), dtype=torch.int16, device=device)
        self._mover = FrameMover(self._blocks, layout, slots, torch.cuda.Stream(device), room=blocks_at_once)
        self._scatter_stream = torch.cuda.Stream(device)
        self._keep_stream = torch.cuda.Stream(device)
        self._free: list[Ready] = [DONE, DONE]  # when what a half of the blocks held was copied on
        self._turn = 0
        self._lock = threading.Lock()

    def warm_up(self, slot: int) -> None:
        """Compile, load and take what the first request would have to wait for. Raises StoreError.

        slot: one that is not in use.
        """
        self._mover.warm_up([Move(slot, at) for at in range(self.blocks_at_once)])
        nowhere = [[-1] * self._pages_per_block] * self.blocks_at_once
        self._scatter(self._blocks[: self.blocks_at_once].view(torch.uint8), nowhere, []).synchronize()

    def load(
        self,
        slots: Sequence[int],
        coded: Sequence[CodedBlock],
        pages: Sequence[Sequence[int]],
        *,
        after: Ready,
        keeps_decoded: bool,
    ) -> tuple[Ready, Ready]:
        """Decode the payloads in slots into pages, which are overwritten `after`; -1 leaves a page as it is.

        Waits until all are known to be right. Return when the pages may be read, and when the slots hold the decoded
        blocks, if those are to be kept there; the caller holds the slots until then. Raises StoreError: some pages may
        have been written then, and no copy is in flight.
        """
        loaded: Ready = DONE
        kept: Ready = DONE
        with self._lock:
            try:
                for first in range(0, len(slots), self.blocks_at_once):
                    part = slice(first, first + self.blocks_at_once)
                    loaded, kept = self._load_batch(slots[part], coded[part], pages[part], after, keeps_decoded)
            except Exception as exc:  # triton raises various errors
                self.synchronize()
                raise StoreError(f"decoding {len(slots)} blocks on the GPU failed: {exc}") from exc
        return loaded, kept

    def synchronize(self) -> None:
        """Wait until nothing is read or written any more."""
        synchronize_streams(self._mover.stream, self._scatter_stream, self._keep_stream)

    def _load_batch(
        self,
        slots: Sequence[int],
        coded: Sequence[CodedBlock],
        pages: Sequence[Sequence[int]],
        after: Ready,
        keeps_decoded: bool,
    ) -> tuple[Ready, Ready]:
        half = self._turn % 2
        self._turn += 1
        start = half * self.blocks_at_once
        moves = [Move(slot, start + at) for at, slot in enumerate(slots)]
        decoded = self._mover.promote(moves, coded, after=self._free[half])
        blocks = self._blocks[start : start + len(slots)].view(torch.uint8)
        loaded = self._scatter(blocks, pages, [decoded, after])
        kept = self._keep(slots, blocks, decoded) if keeps_decoded else DONE
        self._free[half] = AllReady([loaded, kept])
        return loaded, kept

    def _scatter(self, blocks: Tensor, pages: Sequence[Sequence[int]], after: Sequence[Ready]) -> Ready:
        """Copy blocks to pages, on a stream that may wait for the engine without holding up the next batch."""
        with torch.cuda.stream(self._scatter_stream):
            AllReady(after).wait()
            ids = torch.tensor(pages, dtype=torch.int64).pin_memory().to(self._pages.device, non_blocking=True)
            self._kernels.scatter_blocks(self._pages, ids, blocks)
            return CudaReady([record_event(self._scatter_stream)])

    def _keep(self, slots: Sequence[int], blocks: Tensor, decoded: Ready) -> Ready:
        """Copy blocks back to the slots that held their payloads."""
        with torch.cuda.stream(self._keep_stream):
            decoded.wait()
            for slot, block in zip(slots, blocks, strict=True):
                self._slots[slot].copy_(block, non_blocking=True)
            return CudaReady([record_event(self._keep_stream)])


def open_engine_frames(pages: LayerPages, layout: BlockLayout, slots: Tensor, slot: int) -> EngineFrames | None:
    """Return what decodes blocks for an engine's pages; None where the CPU has to. slot: one that is not in use."""
    if not can_decode(layout, pages.device):
        return None
    try:
        free_bytes, _ = torch.cuda.mem_get_info(pages.device)
        free_bytes += torch.cuda.memory_reserved(pages.device) - torch.cuda.memory_allocated(pages.device)
        batch_bytes = min(_BATCH_BYTES, free_bytes // _FREE_SHARE)
        blocks_at_once = min(_MOST_BLOCKS, batch_bytes // layout.block_bytes)
        if blocks_at_once < _LEAST_BLOCKS:
            _log.info("the GPU has no memory left to decode blocks in, the CPU decodes")
            return None
        frames = EngineFrames(pages, layout, slots, blocks_at_once=blocks_at_once)
        frames.warm_up(slot)
    except Exception as exc:  # noqa: BLE001 - triton raises various errors
        _log.warning("cold blocks cannot be decoded on the GPU, the CPU decodes: %s", exc)
        return None
    return frames
