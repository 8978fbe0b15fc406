"""Moves the bytes of whole blocks between the hot and the warm tier; decides nothing.

On a GPU each direction has its own stream and one copy moves a whole block. So the copy engines reach the bus's speed
and the model keeps all multiprocessors. On a CPU the same calls copy at once.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from tierkv.errors import StoreError
from tierkv.movers.batch_copy import Piece, copy_pieces
from tierkv.movers.ready import DONE, AllReady, Done, Ready
from tierkv.storage.hot import HotPool
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout

__all__ = [
    "AllReady",
    "CudaReady",
    "Done",
    "Move",
    "Mover",
    "Ready",
    "layer_groups",
    "page_lock",
    "page_unlock",
    "record_event",
    "synchronize_streams",
    "wait_here",
]

_REGISTER_READ_ONLY = 8  # cudaHostRegisterReadOnly

_MIN_GROUP_BYTES = 2 << 20
_GROUP_SHARES = (1 / 2, 3 / 4, 7 / 8, 15 / 16)


@dataclass(frozen=True, slots=True)
class Move:
    """One block's source and target: block ids in the hot pool, slots in the warm pool."""

    source: int
    target: int


class CudaReady:
    """Copies on a GPU: one event per group of layers, in order of arrival. ends: the last layer + 1 of each group."""

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

    The warm slab is registered with CUDA for its lifetime. A failed copy raises StoreError and may have written part of
    the targets, which the caller must not use. No copy is in flight then: the caller may free sources and targets.
    """

    def __init__(self, hot: HotPool, warm: WarmPool) -> None:
        self._hot = hot.bytes_view
        self._offsets = hot.layout.layer_offsets
        self.layer_groups: list[int] = layer_groups(hot.layout)
        self.is_cuda: bool = hot.device.type == "cuda"
        self._device = hot.device
        if self.is_cuda:
            self.load_stream: torch.cuda.Stream = torch.cuda.Stream(hot.device)
            self.store_stream: torch.cuda.Stream = torch.cuda.Stream(hot.device)
        self.slots: torch.Tensor = self.register(warm)

    def register(self, pool: WarmPool) -> torch.Tensor:
        """Return the slots of a pool as a tensor that a GPU copies to and from at full speed. Raises StoreError."""
        return page_lock(pool, self._device)

    def unregister(self, slots: torch.Tensor) -> None:
        """Undo `register`, after all copies have ended."""
        if self.is_cuda and slots.numel():
            self.load_stream.synchronize()
            self.store_stream.synchronize()
        page_unlock(slots, self._device)

    def promote(self, moves: Sequence[Move], *, after: Ready | None = None) -> Ready:
        """Copy warm slots to block ids. Targets may be read after `wait`, sources reused after `is_done`.

        The first layers of all blocks arrive first, so that a model can begin while the rest is in flight. The targets
        are overwritten after the work already queued on the current stream; with `after`, only after that.
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
                    events.append(record_event(self.load_stream))
        except RuntimeError as exc:
            synchronize_streams(self.load_stream)
            raise StoreError(f"promoting {len(moves)} blocks failed: {exc}") from exc
        return CudaReady(events, self.layer_groups)

    def demote(self, moves: Sequence[Move], *, after: Ready) -> Ready:
        """Copy block ids to warm slots after `after`, which `mark` returned when the blocks were written."""
        return self._run(self.slots, self._hot, moves, after=after)

    def copy(self, moves: Sequence[Move]) -> Ready:
        """Copy block ids to other block ids on the current stream."""
        try:
            for move in moves:
                self._hot[move.target].copy_(self._hot[move.source])
            return self.mark()
        except RuntimeError as exc:
            if self.is_cuda:
                synchronize_streams(torch.cuda.current_stream(self._device))
            raise StoreError(f"copying {len(moves)} blocks failed: {exc}") from exc

    def is_same(self, move: Move) -> bool:
        """Return whether two hot blocks have equal bytes, after the work queued on the current stream."""
        return torch.equal(self._hot[move.target], self._hot[move.source])

    def drain(self) -> None:
        """Block until all work queued on the device has ended, on every stream."""
        if self.is_cuda:
            torch.cuda.synchronize(self._device)

    def mark(self) -> Ready:
        """Return the completion of the work queued on the current stream so far."""
        return CudaReady([record_event(torch.cuda.current_stream(self._device))]) if self.is_cuda else DONE

    def close(self) -> None:
        """Wait for all copies and unregister the warm slab. May be called twice."""
        self.unregister(self.slots)
        self.slots = torch.empty(0)
        self._hot = torch.empty(0)

    def _run(self, target: torch.Tensor, source: torch.Tensor, moves: Sequence[Move], *, after: Ready | None) -> Ready:
        try:
            if not self.is_cuda:
                for move in moves:
                    target[move.target].copy_(source[move.source])
                return DONE
            with torch.cuda.stream(self.store_stream):
                if after is not None:
                    after.wait()
                _copy(target, source, moves)
            return CudaReady([record_event(self.store_stream)])
        except RuntimeError as exc:
            if self.is_cuda:
                synchronize_streams(self.store_stream)
            raise StoreError(f"copying {len(moves)} blocks failed: {exc}") from exc


def page_lock(pool: WarmPool, device: torch.device) -> torch.Tensor:
    """Return the slots of a pool as a tensor that a GPU copies to and from at full speed. Raises StoreError."""
    if device.type == "cuda":
        flags = _REGISTER_READ_ONLY if pool.is_read_only else 0
        try:
            _check_cuda(torch.cuda.cudart().cudaHostRegister(pool.address, pool.slab_bytes, flags))
        except StoreError:
            with contextlib.suppress(RuntimeError):  # clears CUDA's error, which the next call would raise
                torch.zeros(1, device=device)
            raise
    return torch.from_numpy(pool.slots)


def page_unlock(slots: torch.Tensor, device: torch.device) -> None:
    """Undo `page_lock`, after all copies have ended. Does nothing for slots that were undone before."""
    if device.type == "cuda" and slots.numel():
        _check_cuda(torch.cuda.cudart().cudaHostUnregister(slots.data_ptr()))


def layer_groups(layout: BlockLayout) -> list[int]:
    """Return the ends of the groups of layers that are loaded together, each about half as large as the one before.

    A model computes a layer in about half the time of its copy. So it finishes a group when the next one arrives, and
    little is left to compute after the last. Pieces below some MiB do not reach the bus's speed, even in a batch
    (2 MiB: 0.985 of it, 4: 0.994).
    """
    offsets = layout.layer_offsets
    ends: list[int] = []
    start = 0
    for share in _GROUP_SHARES:
        layer = next(i for i, offset in enumerate(offsets) if offset >= share * offsets[-1])
        if min(offsets[layer] - offsets[start], offsets[-1] - offsets[layer]) >= _MIN_GROUP_BYTES:
            ends.append(layer)
            start = layer
    return [*ends, len(offsets) - 1]


def wait_here(event: torch.cuda.Event) -> None:
    """Make the current stream of the event's device wait; that device need not be the current one."""
    event.wait(torch.cuda.current_stream(event.device))


def record_event(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Return an event behind the work queued on the stream so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


def synchronize_streams(*streams: torch.cuda.Stream) -> None:
    """Block until the work queued on streams has ended, or cannot begin any more because the device has failed.

    For a batch that fails halfway: its queued copies still read their sources and write their targets.
    """
    for stream in streams:
        with contextlib.suppress(RuntimeError):
            stream.synchronize()


def _copy(target: torch.Tensor, source: torch.Tensor, moves: Sequence[Move]) -> None:
    """Copy whole slots, and neighbours in one copy if source and target are contiguous.

    Torch gives the copy engine only copies that are contiguous on both sides. For strided ones it makes contiguous
    temporaries, unpinned on the CPU, and runs kernels (`copy_requires_temporaries` in its Copy.cu): far slower than one
    copy per slot.
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
