"""Moves blocks between page-locked memory and an engine's layer-major pages, through a few staging blocks on the GPU.

For engines with small pages that lie scattered: as single copies they would cost the CPU 2 us each. The copy engine
moves whole blocks at the bus's speed, and a kernel scatters or gathers pages at the speed of GPU memory. A kernel that
reads page-locked memory itself reaches 0.91 of the bus and occupies its multiprocessors 50 times as long.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierkv.errors import ShapeError, StoreError
from tierkv.movers.mover import CudaReady, Ready, record_event, synchronize_streams

if TYPE_CHECKING:
    from tierkv.kernels.pages import LayerPages

__all__ = ["PageMover", "page_mover"]

_log = logging.getLogger(__name__)


class PageMover:
    """Loads and stores whole blocks of one engine's pages. Needs a GPU and triton.

    pages: the engine's pools. block_bytes: bytes of a block in page-locked memory. num_staging: blocks on the GPU
    for each direction.
    """

    def __init__(self, pages: LayerPages, block_bytes: int, *, num_staging: int = 2) -> None:
        from tierkv.kernels import pages as kernels  # needs triton, which is there if there is a GPU

        self._kernels = kernels
        self.pages: LayerPages = pages
        self._up = _Direction(block_bytes, num_staging, pages.device)
        self._down = _Direction(block_bytes, num_staging, pages.device)
        self._pages_per_block = block_bytes // pages.bytes_per_page

    def warm_up(self) -> None:
        """Compile what the first request would have to wait for. Reads page 0 and writes no page.

        A second row of numbers may lie otherwise than the first in the words that the GPU reads: a kernel of its own.
        """
        page_0 = torch.zeros((2, self._pages_per_block), dtype=torch.int64, device=self.pages.device)
        nowhere = page_0 - 1
        for row in (slice(0, 1), slice(1, 2)):
            self._kernels.gather_blocks(self.pages, page_0[row], self._down.first_row)
            self._kernels.scatter_blocks(self.pages, nowhere[row], self._up.first_row)
        torch.cuda.current_stream(self.pages.device).synchronize()

    def load(self, blocks: Sequence[Tensor], page_ids: Tensor, *, after: Ready) -> Ready:
        """Copy blocks into pages. Pages may be read after `wait`, blocks reused after `is_done`.

        blocks: n of [block_bytes] uint8, page-locked. page_ids: [n, pages_per_block] int64 on the GPU, no page twice;
        -1 leaves a page as it is. Blocks are read and pages overwritten after `after`. Raises StoreError; no copy is in
        flight then.
        """
        way = self._up
        with way.take_turn("loading"):
            _keep_for(page_ids, way.kernel_stream)
            for stream in (way.copy_stream, way.kernel_stream):
                with torch.cuda.stream(stream):
                    after.wait()
            for i, block in enumerate(blocks):
                row, free = way.next()
                with torch.cuda.stream(way.copy_stream):
                    free.wait()
                    row[0].copy_(block, non_blocking=True)
                    copied = record_event(way.copy_stream)
                with torch.cuda.stream(way.kernel_stream):
                    copied.wait()
                    self._kernels.scatter_blocks(self.pages, page_ids[i : i + 1], row)
                    free.record()
            return CudaReady([record_event(way.kernel_stream)])

    def store(self, page_ids: Tensor, blocks: Sequence[Tensor], *, after: Ready) -> Ready:
        """Copy pages into blocks after `after`: the inverse of `load`, with the same shapes and errors."""
        way = self._down
        with way.take_turn("storing"):
            _keep_for(page_ids, way.kernel_stream)
            with torch.cuda.stream(way.kernel_stream):
                after.wait()
            for i, block in enumerate(blocks):
                row, free = way.next()
                with torch.cuda.stream(way.kernel_stream):
                    free.wait()
                    self._kernels.gather_blocks(self.pages, page_ids[i : i + 1], row)
                    gathered = record_event(way.kernel_stream)
                with torch.cuda.stream(way.copy_stream):
                    gathered.wait()
                    block.copy_(row[0], non_blocking=True)
                    free.record()
            return CudaReady([record_event(way.copy_stream)])


def page_mover(rows: Sequence[Tensor], block_bytes: int) -> PageMover | None:
    """Return a mover of an engine's pages, ready for its first request.

    None where there is no triton, or none that compiles, or the pages are nothing for the kernels.

    rows: [pages, page bytes] uint8 of each tensor, in the order in which they lie in a block.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    from tierkv.kernels import pages as kernels

    try:
        mover = PageMover(kernels.LayerPages(rows), block_bytes)
    except (ShapeError, RuntimeError):  # RuntimeError: an engine that left no memory for the staging blocks
        return None
    try:
        mover.warm_up()
    except Exception as exc:  # noqa: BLE001 - triton raises various errors without a compiler
        _log.warning("small pages are copied one by one, kernels cannot move them: %s", exc)
        return None
    return mover


def _keep_for(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Let no other stream get a tensor's memory before the work on this one has ended."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


class _Direction:
    """The streams and staging blocks of one direction. Blocks are used in turn; an event says when each is free."""

    def __init__(self, block_bytes: int, num_staging: int, device: torch.device) -> None:
        self.copy_stream = torch.cuda.Stream(device)
        self.kernel_stream = torch.cuda.Stream(device)
        self._lock = threading.Lock()
        self._rows = torch.empty((num_staging, block_bytes), dtype=torch.uint8, device=device)
        self._free = [torch.cuda.Event() for _ in range(num_staging)]
        self._turn = 0

    @contextmanager
    def take_turn(self, doing: str) -> Iterator[None]:
        """Let one caller at a time queue a batch. If that fails, wait for the queued part, then raise StoreError."""
        with self._lock:
            try:
                yield
            except RuntimeError as exc:
                synchronize_streams(self.copy_stream, self.kernel_stream)
                raise StoreError(f"{doing} pages failed: {exc}") from exc

    @property
    def first_row(self) -> Tensor:
        """The first staging block, [1, block_bytes]."""
        return self._rows[:1]

    def next(self) -> tuple[Tensor, torch.cuda.Event]:
        """Return the next block, [1, block_bytes], and its event."""
        at = self._turn % len(self._free)
        self._turn += 1
        return self._rows[at : at + 1], self._free[at]
