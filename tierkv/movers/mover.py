"""Moves the bytes of whole blocks between the hot and the warm tier; decides nothing.

On a GPU each direction has a stream of its own and one copy moves a whole block, so the copy engines work at
the link's speed and no multiprocessor is taken from the model. On a CPU the same calls copy at once.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tierkv.errors import StoreError
from tierkv.movers.batch_copy import Piece, copy_pieces
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout

__all__ = ["AllReady", "CudaReady", "Done", "Move", "Mover", "Ready", "layer_groups", "recorded", "settle", "wait_here"]

_MIN_GROUP_BYTES = 2 << 20
_GROUP_SHARES = (1 / 2, 3 / 4, 7 / 8, 15 / 16)


@dataclass(frozen=True, slots=True)
class Move:
    """One block from a place to a place: block ids in the hot pool, slots in the warm pool."""

    source: int
    target: int


class Ready(Protocol):
    """When the bytes of a batch of moves are where they belong."""

    def wait(self, layer: int | None = None) -> None:
        """Make the current stream wait for one layer's bytes, or for all; returns at once."""

    def synchronize(self) -> None:
        """Block this thread until they are."""

    def is_done(self) -> bool:
        """Tell whether they are, without waiting."""


class Done:
    """Ready at once: copies on a CPU have ended when the call returns."""

    def wait(self, layer: int | None = None) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def is_done(self) -> bool:
        """Return True."""
        return True


class AllReady:
    """Ready when all of several are."""

    def __init__(self, parts: Sequence[Ready]) -> None:
        self._parts = parts

    def wait(self, layer: int | None = None) -> None:
        """Make the current stream wait for each."""
        for part in self._parts:
            part.wait(layer)

    def synchronize(self) -> None:
        """Block this thread until all are there."""
        for part in self._parts:
            part.synchronize()

    def is_done(self) -> bool:
        """Tell whether all are."""
        return all(part.is_done() for part in self._parts)


class CudaReady:
    """Copies on a GPU: one event for each group of layers, in order of arrival; `ends` are their last layers + 1."""

    def __init__(self, events: list[torch.cuda.Event], ends: Sequence[int] = ()) -> None:
        self._events = events
        self._ends = ends

    def wait(self, layer: int | None = None) -> None:
        at = -1 if layer is None or len(self._events) == 1 else bisect_right(self._ends, layer)
        wait_here(self._events[at])

    def synchronize(self) -> None:
        self._events[-1].synchronize()

    def is_done(self) -> bool:
        return bool(self._events[-1].query())


class Mover:
    """Copies between one hot pool and one warm pool. Close it before the warm pool is closed.

    The warm slab is registered with CUDA for its lifetime. A failed copy raises StoreError and may have
    written part of the targets: the caller must not use them. Nothing of it is under way any more, so that he may give
    sources and targets back.
    """

    def __init__(self, hot: HotPool, warm: WarmPool) -> None:
        self._hot = hot.bytes_view
        self._offsets = _layer_offsets(hot.layout)
        self.layer_groups = layer_groups(hot.layout)
        self.is_cuda = hot.device.type == "cuda"
        if self.is_cuda:
            self._device = hot.device
            self.load_stream = torch.cuda.Stream(hot.device)
            self.store_stream = torch.cuda.Stream(hot.device)
        self.slots = self.register(warm)

    def register(self, pool: WarmPool) -> torch.Tensor:
        """Return the slots of a pool as a tensor that a GPU copies to and from at full speed. Raises StoreError."""
        if self.is_cuda:
            try:
                _check_cuda(torch.cuda.cudart().cudaHostRegister(pool.address, pool.slab_bytes, 0))
            except StoreError:
                with contextlib.suppress(RuntimeError):  # who asks next is told of it, whatever he has done himself
                    torch.zeros(1, device=self._device)
                raise
        return torch.from_numpy(pool.slots)

    def unregister(self, slots: torch.Tensor) -> None:
        """Take `register` back, once nothing is copied any more."""
        if self.is_cuda and slots.numel():
            self.load_stream.synchronize()
            self.store_stream.synchronize()
            _check_cuda(torch.cuda.cudart().cudaHostUnregister(slots.data_ptr()))

    def promote(self, moves: Sequence[Move], *, after: Ready | None = None) -> Ready:
        """Copy warm slots to block ids. The targets may be read after `wait`, the sources reused when done.

        The first layers of all blocks arrive first, so that a model can begin while the rest is on its way.
        Work already queued on the current stream ends before the targets are overwritten; or, where `after` is given,
        only what that stands for.
        """
        if not self.is_cuda:
            return self._run(self._hot, self.slots, moves, after=None)
        if after is None:
            self.load_stream.wait_stream(torch.cuda.current_stream(self._device))
        events: list[torch.cuda.Event] = []
        try:
            with torch.cuda.stream(self.load_stream):
                if after is not None:
                    after.wait()
                for first, last in zip([0, *self.layer_groups], self.layer_groups, strict=False):
                    start, length = self._offsets[first], self._offsets[last] - self._offsets[first]
                    pieces = [Piece(move.target, move.source, length, start, start) for move in moves]
                    copy_pieces(self._hot, self.slots, pieces)
                    events.append(recorded(self.load_stream))
        except RuntimeError as exc:
            settle(self.load_stream)
            raise StoreError(f"promoting {len(moves)} blocks failed: {exc}") from exc
        return CudaReady(events, self.layer_groups)

    def demote(self, moves: Sequence[Move], *, after: Ready) -> Ready:
        """Copy block ids to warm slots once `after` has passed: what `mark` returned when they were written."""
        return self._run(self.slots, self._hot, moves, after=after)

    def copy(self, moves: Sequence[Move]) -> Ready:
        """Copy block ids to other block ids on the current stream."""
        try:
            for move in moves:
                self._hot[move.target].copy_(self._hot[move.source])
            return self.mark()
        except RuntimeError as exc:
            if self.is_cuda:
                settle(torch.cuda.current_stream(self._device))
            raise StoreError(f"copying {len(moves)} blocks failed: {exc}") from exc

    def is_same(self, move: Move) -> bool:
        """Tell whether two hot blocks have the same bytes, once what is queued on the current stream has ended."""
        return torch.equal(self._hot[move.target], self._hot[move.source])

    def drain(self) -> None:
        """Block until everything that was queued on the device, on whatever stream, has ended."""
        if self.is_cuda:
            torch.cuda.synchronize(self._device)

    def mark(self) -> Ready:
        """Return when everything queued on the current stream so far has passed."""
        return CudaReady([recorded(torch.cuda.current_stream(self._device))]) if self.is_cuda else Done()

    def close(self) -> None:
        """Wait for all copies and unregister the warm slab. May be called twice."""
        self.unregister(self.slots)
        self.slots = torch.empty(0)

    def _run(self, target: torch.Tensor, source: torch.Tensor, moves: Sequence[Move], *, after: Ready | None) -> Ready:
        try:
            if not self.is_cuda:
                _copy(target, source, moves)
                return Done()
            with torch.cuda.stream(self.store_stream):
                if after is not None:
                    after.wait()
                _copy(target, source, moves)
            return CudaReady([recorded(self.store_stream)])
        except RuntimeError as exc:
            if self.is_cuda:
                settle(self.store_stream)
            raise StoreError(f"copying {len(moves)} blocks failed: {exc}") from exc


def layer_groups(layout: BlockLayout) -> list[int]:
    """Return the ends of the groups of layers that come up together, each about half as large as the one before.

    A model computes a layer in about half the time that a link needs to bring it. So it is through with a group when
    the next one arrives, and little is left to compute behind the last. Pieces of less than some MiB do not copy at
    the link's speed, not even in a batch (2 MiB: 0.985 of it, 4: 0.994).
    """
    offsets = _layer_offsets(layout)
    ends: list[int] = []
    start = 0
    for share in _GROUP_SHARES:
        layer = next(i for i, offset in enumerate(offsets) if offset >= share * offsets[-1])
        if min(offsets[layer] - offsets[start], offsets[-1] - offsets[layer]) >= _MIN_GROUP_BYTES:
            ends.append(layer)
            start = layer
    return [*ends, len(offsets) - 1]


def _layer_offsets(layout: BlockLayout) -> list[int]:
    return [run.offset_bytes for run in layout.runs[::2]] + [layout.block_bytes]


def wait_here(event: torch.cuda.Event) -> None:
    """Let the current stream of the event's own device wait: a model may run on another than the current device."""
    event.wait(torch.cuda.current_stream(event.device))


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event behind what is queued on the stream so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


def settle(*streams: torch.cuda.Stream) -> None:
    """Block until what is queued on streams has ended, or can no longer begin because the device has failed.

    For whoever gives up a batch halfway: what he had queued still reads its sources and writes its targets.
    """
    for stream in streams:
        with contextlib.suppress(RuntimeError):
            stream.synchronize()


def _copy(target: torch.Tensor, source: torch.Tensor, moves: Sequence[Move]) -> None:
    """Copy whole places, neighbours in one go where places touch.

    Across the link torch hands only what is contiguous on both sides to the copy engine. Anything strided goes by way
    of contiguous temporaries, of unpinned memory on the CPU's side, and kernels (`copy_requires_temporaries` in its
    Copy.cu): that would cost far more than a copy for each place.
    """
    if not (target.is_contiguous() and source.is_contiguous()):
        copy_pieces(target, source, [Piece(move.target, move.source, target.shape[1]) for move in moves])
        return
    for first, length in _runs(moves):
        move = moves[first]
        target[move.target : move.target + length].copy_(source[move.source : move.source + length], non_blocking=True)


def _runs(moves: Sequence[Move]) -> Iterator[tuple[int, int]]:
    """Yield (first move, count) of runs whose sources and targets are both neighbours."""
    first = 0
    for i in range(1, len(moves) + 1):
        is_neighbour = (
            i < len(moves) and moves[i].source == moves[i - 1].source + 1 and moves[i].target == moves[i - 1].target + 1
        )
        if not is_neighbour:
            yield first, i - first
            first = i


def _check_cuda(status: object) -> None:
    """Raise StoreError unless a CUDA runtime call returned success (an enum or an int, by torch's version)."""
    code = int(getattr(status, "value", status))  # type: ignore[call-overload]
    if code:
        raise StoreError(f"CUDA could not register the warm pool: error {code}")
