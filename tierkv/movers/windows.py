"""Moves blocks between the hot tier and a warm tier that keeps them compressed.

On a GPU the kernels of kernels/windows.py compress and decompress on streams of their own, and only compressed bytes
cross the bus. A few buffers on the GPU keep the copy engine busy while the kernels work on the next section. On a CPU
numpy does both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tierkv.errors import StoreError
from tierkv.movers.batch_copy import Piece, copy_pieces
from tierkv.movers.mover import CudaReady, Done, Move, Mover, Ready, layer_groups, record_event, synchronize_streams
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.storage.windows import Section, WindowFormat
from tierkv.values.layout import BlockLayout

__all__ = ["WindowMover", "window_format"]

_NUM_BUFFERS = 4
_CHUNK_BLOCKS = 4


def window_format(layout: BlockLayout) -> WindowFormat:
    """Return the compressed format of a block: every second group of layers ends a section.

    With smaller sections the bus waits for kernels: five per block reach 1.30 of its speed, three reach 1.38.
    """
    groups = layer_groups(layout)
    return WindowFormat(layout, [*groups[:-1:2], groups[-1]])


class WindowMover:
    """Copies between one hot pool and one warm pool of `form.slot_bytes` slots, on the streams of a Mover.

    Calls of one direction take turns. Close it before the Mover and the pools.
    """

    def __init__(self, hot: HotPool, warm: WarmPool, form: WindowFormat, mover: Mover) -> None:
        self.form = form
        self._hot = hot
        self._slots = warm.slots
        self._gpu = _GpuWindows(hot, warm, form, mover) if mover.is_cuda else None

    def warm_up(self) -> None:
        """Compress the scratch block into slot 0 and expand it again, before either is in use. Raises StoreError.

        Triton compiles its kernels here, so that the first request does not wait for that.
        """
        if self._gpu:
            scratch, written = self._hot.scratch_block, record_event(torch.cuda.current_stream(self._hot.device))
            try:
                self.demote([Move(scratch, 0)], num_tokens=[self._hot.layout.block_size], after=[CudaReady([written])])
                self.promote([Move(0, scratch)]).synchronize()
            except StoreError:
                raise
            except Exception as exc:  # triton raises various errors without a compiler or for an unknown GPU
                raise StoreError(f"this GPU cannot compress blocks: {exc}") from exc

    def promote(self, moves: Sequence[Move]) -> Ready:
        """Expand warm slots into block ids; order and completion as in `Mover.promote`. Raises StoreError."""
        if self._gpu:
            return self._gpu.promote(moves)
        for move in moves:
            self.form.decompress(self._slots[move.source], self._hot.bytes_view[move.target].numpy())
        return Done()

    def demote(self, moves: Sequence[Move], *, num_tokens: Sequence[int], after: Sequence[Ready]) -> list[bool]:
        """Compress block ids into warm slots. Return which blocks fit their slots, after all copies have ended.

        num_tokens: valid tokens of each block. after: the completion of the writes to each block. Raises StoreError.
        """
        if self._gpu:
            return self._gpu.demote(moves, num_tokens, after)
        blocks = [self._hot.bytes_view[move.source].numpy() for move in moves]
        return [
            self.form.compress(block, self._slots[move.target], num_tokens=count)
            for block, move, count in zip(blocks, moves, num_tokens, strict=True)
        ]

    def close(self) -> None:
        """Wait for all copies and unregister the slab. May be called twice."""
        if self._gpu:
            self._gpu.close()
        self._gpu = None
        self._slots = np.empty((0, 0), dtype=np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class _Buffer:
    """GPU memory for one section of a chunk of blocks, and the event after which it may be overwritten."""

    bytes: Tensor
    free: torch.cuda.Event

    def sections(self, section: Section, count: int) -> Tensor:
        """Return [count, capacity of the section], a view."""
        return self.bytes[: count * section.capacity_bytes].view(count, section.capacity_bytes)


@dataclass(frozen=True, slots=True, eq=False)
class _Coded:
    """A section of a chunk, compressed after `done`. sizes: [n] int32, page-locked, the escapes of each block."""

    chunk: Sequence[int]
    group: int
    buffer: _Buffer
    sizes: Tensor
    done: torch.cuda.Event


class _GpuWindows:
    def __init__(self, hot: HotPool, warm: WarmPool, form: WindowFormat, mover: Mover) -> None:
        from tierkv.kernels import windows as kernels  # needs triton, which is there if there is a GPU

        self._kernels = kernels
        self._pool = hot.blocks
        self._form = form
        self._device = hot.device
        self._mover = mover
        self._array = warm.slots
        self._slots = mover.register(warm)
        self._tiles = [kernels.section_tiles(section, hot.device) for section in form.sections]
        self._decode_stream = torch.cuda.Stream(hot.device)
        self._code_stream = torch.cuda.Stream(hot.device)
        room = _CHUNK_BLOCKS * max(section.capacity_bytes for section in form.sections)
        self._up = [self._buffer(room) for _ in range(_NUM_BUFFERS)]
        self._down = [self._buffer(room) for _ in range(_NUM_BUFFERS)]
        self._up_lock = threading.Lock()
        self._down_lock = threading.Lock()

    def promote(self, moves: Sequence[Move]) -> Ready:
        events: list[torch.cuda.Event] = []
        with self._up_lock:
            try:
                self._decode_stream.wait_stream(torch.cuda.current_stream(self._device))
                targets = self._ids([move.target for move in moves], self._decode_stream)
                turn = 0
                for group in range(len(self._form.sections)):
                    for chunk in _chunks(len(moves)):
                        self._expand(group, [moves[i] for i in chunk], targets[chunk.start : chunk.stop], turn)
                        turn += 1
                    events.append(record_event(self._decode_stream))
            except RuntimeError as exc:
                synchronize_streams(self._mover.load_stream, self._decode_stream)
                raise StoreError(f"promoting {len(moves)} compressed blocks failed: {exc}") from exc
        return CudaReady(events, self._form.layer_groups)

    def demote(self, moves: Sequence[Move], num_tokens: Sequence[int], after: Sequence[Ready]) -> list[bool]:
        fits = [True] * len(moves)
        with self._down_lock:
            try:
                with torch.cuda.stream(self._code_stream):
                    for ready in after:
                        ready.wait()
                sources = self._ids([move.source for move in moves], self._code_stream)
                counts = self._ids(num_tokens, self._code_stream, torch.int32)
                coded: list[_Coded] = []
                turns = [(c, g) for c in _chunks(len(moves), first=1) for g in range(len(self._form.sections))]
                for turn, (chunk, group) in enumerate(turns):
                    coded.append(self._code(group, chunk, sources, counts, turn))
                    if len(coded) == 2:  # one is copied while the next is compressed
                        self._copy_down(coded.pop(0), moves, fits)
                for each in coded:
                    self._copy_down(each, moves, fits)
                self._mover.store_stream.synchronize()
            except RuntimeError as exc:
                synchronize_streams(self._code_stream, self._mover.store_stream)
                raise StoreError(f"compressing {len(moves)} blocks failed: {exc}") from exc
        return fits

    def close(self) -> None:
        self._decode_stream.synchronize()
        self._code_stream.synchronize()
        self._mover.unregister(self._slots)
        self._slots = torch.empty(0)
        self._array = np.empty((0, 0), dtype=np.uint8)

    def _expand(self, group: int, moves: Sequence[Move], targets: Tensor, turn: int) -> None:
        """Copy one section of a chunk to the GPU and decode it, after the previous use of its buffer."""
        section = self._form.sections[group]
        buffer = self._up[turn % _NUM_BUFFERS]
        sections = buffer.sections(section, len(moves))
        with torch.cuda.stream(self._mover.load_stream):
            buffer.free.wait()
            lengths = [self._form.section_bytes(self._array[move.source], group) for move in moves]
            pieces = [
                Piece(row, move.source, length, 0, section.offset)
                for row, (move, length) in enumerate(zip(moves, lengths, strict=True))
            ]
            copy_pieces(sections, self._slots, pieces)
            copied = record_event(self._mover.load_stream)
        with torch.cuda.stream(self._decode_stream):
            copied.wait()
            self._kernels.decompress_section(sections, targets, section, self._tiles[group], self._pool)
            buffer.free.record()

    def _code(self, group: int, chunk: Sequence[int], sources: Tensor, counts: Tensor, turn: int) -> _Coded:
        section = self._form.sections[group]
        buffer = self._down[turn % _NUM_BUFFERS]
        sections = buffer.sections(section, len(chunk))
        span = slice(chunk[0], chunk[-1] + 1)
        with torch.cuda.stream(self._code_stream):
            buffer.free.wait()
            sizes = torch.empty(len(chunk), dtype=torch.int32, pin_memory=True)
            self._kernels.compress_section(
                self._pool, sources[span], counts[span], section, self._tiles[group], sections, sizes
            )
            return _Coded(chunk, group, buffer, sizes, record_event(self._code_stream))

    def _copy_down(self, coded: _Coded, moves: Sequence[Move], fits: list[bool]) -> None:
        """Copy a compressed section into its slots once its sizes are known; clear `fits` of blocks that do not fit."""
        section = self._form.sections[coded.group]
        sections = coded.buffer.sections(section, len(coded.chunk))
        coded.done.synchronize()
        pieces: list[Piece] = []
        for row, (at, num_escapes) in enumerate(zip(coded.chunk, coded.sizes.tolist(), strict=True)):
            if num_escapes > section.max_escapes:
                fits[at] = False
                continue
            pieces.append(Piece(moves[at].target, row, section.escapes_at + num_escapes, section.offset, 0))
        with torch.cuda.stream(self._mover.store_stream):
            copy_pieces(self._slots, sections, pieces)
            coded.buffer.free.record()

    def _ids(self, numbers: Sequence[int], stream: torch.cuda.Stream, dtype: torch.dtype = torch.int64) -> Tensor:
        """Return numbers on the GPU, copied on the stream whose kernels read them."""
        with torch.cuda.stream(stream):
            return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(self._device, non_blocking=True)

    def _buffer(self, num_bytes: int) -> _Buffer:
        return _Buffer(torch.empty(num_bytes, dtype=torch.uint8, device=self._device), torch.cuda.Event())


def _chunks(count: int, *, first: int = _CHUNK_BLOCKS) -> Iterator[range]:
    """Yield ranges of at most _CHUNK_BLOCKS; a short first range lets the copy engine begin early."""
    start = 0
    while start < count:
        end = min(start + (_CHUNK_BLOCKS if start else first), count)
        yield range(start, end)
        start = end
