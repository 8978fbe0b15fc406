"""Brings cold blocks up as they are stored: their zstd frames cross the link and nvCOMP decodes them on the GPU.

The CPU compares the checksum and copies; it decodes nothing. That needs the extra `nvcomp` and a GPU. A frame takes a
GPU milliseconds, thousands of them at once hardly more: so a wave of blocks is decoded in one call.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tierkv.errors import StoreError
from tierkv.movers.batch_copy import Piece, copy_pieces
from tierkv.movers.mover import CudaReady, Move, Mover, Ready, recorded, settle
from tierkv.storage.coded import CodedBlock, CodedLayout, zero_frames
from tierkv.storage.hot import HotPool
from tierkv.values.layout import BlockLayout

__all__ = ["FrameMover", "can_decode"]

_ALIGNMENT_BYTES = 16


def can_decode(layout: BlockLayout, device: torch.device) -> bool:
    """Tell whether blocks of this layout can be decoded here: 16-bit floats, a GPU, nvCOMP and triton."""
    is_there = all(_find(name) for name in ("nvidia.nvcomp", "triton"))
    return device.type == "cuda" and layout.item_bytes == 2 and is_there


@dataclass(frozen=True, slots=True, eq=False)
class _Wave:
    """Coded blocks in GPU memory. payloads: [n, stride] uint8; offsets and sizes: of all coded frames, in bytes."""

    payloads: Tensor
    rests: Tensor
    targets: Tensor
    frame_offsets: list[int]
    frame_sizes: list[int]


class _HeldReady(CudaReady):
    """Keeps the memory that the GPU still works on."""

    def __init__(self, events: list[torch.cuda.Event], held: object) -> None:
        super().__init__(events)
        self._held = held


class FrameMover:
    """Decodes blocks from raw slots that hold payloads into one hot pool, on the streams of a Mover."""

    def __init__(self, hot: HotPool, slots: Tensor, mover: Mover) -> None:
        from nvidia import nvcomp

        from tierkv.kernels import planes as kernels  # here: it needs triton, which comes with a GPU

        self._nvcomp: Any = nvcomp
        self._kernels = kernels
        self._hot = hot
        self._slots = slots
        self._mover = mover
        self._layout = CodedLayout(hot.layout)
        self._tiles = torch.from_numpy(self._layout.tiles).to(hot.device)
        self._stream = torch.cuda.Stream(hot.device)
        self._codec = nvcomp.Codec(
            algorithm="Zstd", bitstream_kind=nvcomp.BitstreamKind.RAW, cuda_stream=self._stream.cuda_stream
        )
        self._lock = threading.Lock()

    def warm_up(self) -> None:
        """Decode a block of zeros where nobody reads it, while slot 0 is nobody's. Raises StoreError.

        What nvCOMP and triton make at their first use took 1.2 seconds: the first request after a restart waited.
        """
        parts = zero_frames(self._layout)
        payload = torch.frombuffer(bytearray().join(parts), dtype=torch.uint8)
        self._slots[0, : payload.numel()] = payload
        coded = CodedBlock(tuple(len(part) for part in parts))
        try:
            self.promote([Move(0, self._hot.scratch_block)], [coded]).synchronize()
        except StoreError:
            raise
        except Exception as exc:  # without a compiler, or for a GPU it does not know, triton raises what it likes
            settle(self._mover.load_stream, self._stream)
            raise StoreError(f"this GPU cannot decode blocks: {exc}") from exc

    def promote(self, moves: Sequence[Move], coded: Sequence[CodedBlock], *, after: Ready | None = None) -> Ready:
        """Decode the payloads in slots into block ids; waits as `Mover.promote`. Raises StoreError."""
        with self._lock:
            try:
                if after is None:
                    self._stream.wait_stream(torch.cuda.current_stream(self._hot.device))
                with torch.cuda.stream(self._stream):
                    if after is not None:
                        after.wait()
                    wave = self._copy_up(moves, coded)
                    planes = self._decode(wave)
                    self._kernels.merge_frames(
                        planes, wave.payloads, wave.rests, self._tiles, wave.targets, self._hot.blocks
                    )
                    return _HeldReady([recorded(self._stream)], (wave, planes))
            except (RuntimeError, ValueError) as exc:
                settle(self._mover.load_stream, self._stream)
                raise StoreError(f"decoding {len(moves)} blocks on the GPU failed: {exc}") from exc

    def _copy_up(self, moves: Sequence[Move], coded: Sequence[CodedBlock]) -> _Wave:
        """Copy payloads and their tables; the stream then waits for the copies."""
        device = self._hot.device
        stride = -(-max(block.payload_bytes for block in coded) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        payloads = torch.empty((len(moves), stride), dtype=torch.uint8, device=device)
        self._mover.load_stream.wait_stream(self._stream)  # the memory may have been something else's until now
        with torch.cuda.stream(self._mover.load_stream):
            rows = enumerate(zip(moves, coded, strict=True))
            copy_pieces(payloads, self._slots, [Piece(row, m.source, c.payload_bytes) for row, (m, c) in rows])
            copied = recorded(self._mover.load_stream)
        parts = [self._layout.parts(block.frame_sizes) for block in coded]
        rests = np.stack([rests for _, _, rests in parts])
        frame_offsets = np.concatenate([row * stride + offsets for row, (offsets, _, _) in enumerate(parts)])
        wave = _Wave(
            payloads=payloads,
            rests=_on_device(torch.from_numpy(rests), device),
            targets=_on_device(torch.tensor([move.target for move in moves]), device),
            frame_offsets=frame_offsets.tolist(),
            frame_sizes=np.concatenate([sizes for _, sizes, _ in parts]).tolist(),
        )
        copied.wait()
        return wave

    def _decode(self, wave: _Wave) -> Tensor:
        """Return the exponent planes, [n, values] uint8."""
        count, values = wave.payloads.shape[0], self._hot.blocks.shape[1]
        planes = torch.empty((count, values), dtype=torch.uint8, device=self._hot.device)
        starts = (np.arange(count)[:, None] * values + self._layout.planes).ravel().tolist()
        lengths = np.tile(self._layout.plane_bytes, count).tolist()
        is_coded = [size != length for size, length in zip(wave.frame_sizes, lengths, strict=True)]
        flat, flat_planes = wave.payloads.view(-1), planes.view(-1)
        for i in (i for i, each in enumerate(is_coded) if not each):  # a plane that would not shrink is stored as it is
            offset = wave.frame_offsets[i]
            flat_planes[starts[i] : starts[i] + lengths[i]] = flat[offset : offset + lengths[i]]
        if any(is_coded):
            stream = self._stream.cuda_stream
            chosen = [i for i, each in enumerate(is_coded) if each]
            source = self._nvcomp.as_arrays(
                flat, [wave.frame_offsets[i] for i in chosen], [wave.frame_sizes[i] for i in chosen], stream
            )
            target = self._nvcomp.as_arrays(
                flat_planes, [starts[i] for i in chosen], [lengths[i] for i in chosen], stream
            )
            self._codec.decode(source, out=target)
        return planes


def _on_device(numbers: Tensor, device: torch.device) -> Tensor:
    return numbers.pin_memory().to(device, non_blocking=True)


def _find(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
