"""Loads cold blocks as they are stored: their zstd frames cross the bus, and nvCOMP decodes them on the GPU.

The CPU compares the checksum and copies; it decodes nothing. That needs a GPU and the extra `nvcomp`. A GPU decodes one
frame in milliseconds and thousands at once in little more, so one call decodes a wave of blocks.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tierkv.errors import StoreError
from tierkv.movers.batch_copy import Piece, copy_pieces
from tierkv.movers.mover import CudaReady, Move, Ready, record_event, synchronize_streams
from tierkv.movers.nvcomp_zstd import Decoding, ZstdBatch, has_nvcomp
from tierkv.storage.coded import CodedBlock, CodedLayout, zero_frames
from tierkv.values.layout import BlockLayout

__all__ = ["FrameMover", "can_decode"]

_ALIGNMENT_BYTES = 16


def can_decode(layout: BlockLayout, device: torch.device) -> bool:
    """Return whether blocks of this layout can be decoded here: 16-bit floats, a GPU, nvCOMP and triton."""
    is_possible = device.type == "cuda" and layout.item_bytes == 2
    return is_possible and has_nvcomp() and importlib.util.find_spec("triton") is not None


@dataclass(frozen=True, slots=True, eq=False)
class _Wave:
    """Coded blocks in GPU memory. payloads: [n, stride] uint8; offsets and sizes: of all coded frames, in bytes."""

    payloads: Tensor
    rests: Tensor
    targets: Tensor
    frame_offsets: npt.NDArray[np.int64]
    frame_sizes: npt.NDArray[np.int64]


class _HeldReady(CudaReady):
    """Keeps memory alive that the GPU still uses."""

    def __init__(self, events: list[torch.cuda.Event], held: object) -> None:
        super().__init__(events)
        self._held = held


class FrameMover:
    """Decodes blocks from slots that hold payloads into blocks on a GPU.

    blocks: [num_blocks, values] of a 16-bit dtype. slots: [num_slots, block bytes] uint8, page-locked. load_stream:
    copies payloads to the GPU. stream: what writes the blocks. room: memory on the GPU for so many blocks in work is
    kept, for an engine that leaves none or takes what is free; 0 takes it anew each time.
    """

    def __init__(
        self, blocks: Tensor, layout: BlockLayout, slots: Tensor, load_stream: torch.cuda.Stream, *, room: int = 0
    ) -> None:
        from tierkv.kernels import planes as kernels  # needs triton, which is there if there is a GPU

        self._kernels = kernels
        self._blocks = blocks
        self._slots = slots
        self._load_stream = load_stream
        self._layout = CodedLayout(layout)
        self._tiles = torch.from_numpy(self._layout.tiles).to(blocks.device)
        self.stream: torch.cuda.Stream = torch.cuda.Stream(blocks.device)
        self._batch = ZstdBatch(blocks.device, keeps_memory=bool(room))
        self._payload_room = blocks.new_empty(room * layout.block_bytes, dtype=torch.uint8)
        self._plane_room = blocks.new_empty((room, blocks.shape[1]), dtype=torch.uint8)
        self._lock = threading.Lock()

    def warm_up(self, moves: Sequence[Move]) -> None:
        """Decode blocks of zeros, all from one slot that is not in use, into blocks that are not. Raises StoreError.

        The first use of nvCOMP and triton takes 1.2 seconds, which the first request must not wait for.
        """
        parts = zero_frames(self._layout)
        payload = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
        self._slots[moves[0].source, : payload.numel()] = payload
        coded = CodedBlock(tuple(len(part) for part in parts))
        try:
            self.promote(moves, [coded] * len(moves)).synchronize()
        except StoreError:
            raise
        except Exception as exc:  # triton raises various errors without a compiler or for an unknown GPU
            synchronize_streams(self._load_stream, self.stream)
            raise StoreError(f"this GPU cannot decode blocks: {exc}") from exc

    def promote(self, moves: Sequence[Move], coded: Sequence[CodedBlock], *, after: Ready | None = None) -> Ready:
        """Decode the payloads in slots into block ids; `after` is as in `Mover.promote`. Raises StoreError.

        Waits until all frames are known to be right: no block may be registered before.
        """
        with self._lock:
            try:
                if after is None:
                    self.stream.wait_stream(torch.cuda.current_stream(self._blocks.device))
                with torch.cuda.stream(self.stream):
                    if after is not None:
                        after.wait()
                    wave = self._copy_up(moves, coded)
                    planes, decoding = self._decode(wave)
                    self._kernels.merge_frames(
                        planes, wave.payloads, wave.rests, self._tiles, wave.targets, self._blocks
                    )
                    merged = record_event(self.stream)
                    if decoding:
                        merged.synchronize()  # without the interpreter's lock: other threads read meanwhile
                        decoding.check()
                    return _HeldReady([merged], (wave, planes))
            except (RuntimeError, ValueError, StoreError) as exc:
                synchronize_streams(self._load_stream, self.stream)
                raise StoreError(f"decoding {len(moves)} blocks on the GPU failed: {exc}") from exc

    def _copy_up(self, moves: Sequence[Move], coded: Sequence[CodedBlock]) -> _Wave:
        """Copy payloads and their tables to the GPU; the decoding stream waits for the copies."""
        device = self._blocks.device
        stride = -(-max(block.payload_bytes for block in coded) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        payloads = self._payload_memory(len(moves), stride)
        self._load_stream.wait_stream(self.stream)  # queued work may still use this memory
        with torch.cuda.stream(self._load_stream):
            rows = enumerate(zip(moves, coded, strict=True))
            copy_pieces(payloads, self._slots, [Piece(row, m.source, c.payload_bytes) for row, (m, c) in rows])
            copied = record_event(self._load_stream)
        parts = [self._layout.parts(block.frame_sizes) for block in coded]
        rests = np.stack([rests for _, _, rests in parts])
        frame_offsets = np.concatenate([row * stride + offsets for row, (offsets, _, _) in enumerate(parts)])
        wave = _Wave(
            payloads=payloads,
            rests=_on_device(torch.from_numpy(rests), device),
            targets=_on_device(torch.tensor([move.target for move in moves]), device),
            frame_offsets=frame_offsets,
            frame_sizes=np.concatenate([sizes for _, sizes, _ in parts]),
        )
        copied.wait()
        return wave

    def _payload_memory(self, count: int, stride: int) -> Tensor:
        """Return [count, stride] uint8. What is kept is free again: copies wait for all that is queued to decode."""
        kept = self._payload_room[: count * stride]
        if kept.numel() < count * stride:
            kept = torch.empty(count * stride, dtype=torch.uint8, device=self._blocks.device)
        return kept.view(count, stride)

    def _decode(self, wave: _Wave) -> tuple[Tensor, Decoding | None]:
        """Return the exponent planes, [n, values] uint8, and what says whether they are right, if any is decoded."""
        count, values = wave.payloads.shape[0], self._blocks.shape[1]
        planes = self._plane_room[:count]
        if len(planes) < count:
            planes = torch.empty((count, values), dtype=torch.uint8, device=self._blocks.device)
        starts = (np.arange(count)[:, None] * values + self._layout.planes).ravel()
        lengths = np.tile(self._layout.plane_bytes, count)
        is_coded = wave.frame_sizes != lengths
        flat, flat_planes = wave.payloads.view(-1), planes.view(-1)
        for i in np.flatnonzero(~is_coded).tolist():  # an incompressible plane is stored as it is
            start, offset, length = int(starts[i]), int(wave.frame_offsets[i]), int(lengths[i])
            flat_planes[start : start + length] = flat[offset : offset + length]
        if not is_coded.any():
            return planes, None
        decoding = self._batch.decode(
            flat.data_ptr() + wave.frame_offsets[is_coded],
            wave.frame_sizes[is_coded],
            flat_planes.data_ptr() + starts[is_coded],
            lengths[is_coded],
            stream=self.stream,
        )
        return planes, decoding


def _on_device(numbers: Tensor, device: torch.device) -> Tensor:
    return numbers.pin_memory().to(device, non_blocking=True)
