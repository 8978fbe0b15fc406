"""One direction of transfers: the most urgent one first, in pieces, a few of them in flight.

One thread takes the pieces, queues each on the lane's stream, and waits for the oldest where no more may be in flight.
It holds no lock while it waits, and a staging place is used again only behind the event of the copy that used it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from tierkv.background.handle import Handle
from tierkv.background.work_queue import PATIENCE, Priority, QueueEntry, WorkQueue
from tierkv.errors import StoreError, TransferCancelledError
from tierkv.movers.mover import CudaReady, Done, Ready, settle

__all__ = ["Direction", "Lane", "Link", "Part", "Run", "TransferHandle", "open_link"]

_MAX_WAITING = 65_536


class Direction(Enum):
    """Which way the bytes go; on a CPU both are copies in its memory."""

    TO_GPU = "to_gpu"
    TO_CPU = "to_cpu"


class TransferHandle(Handle[Tensor]):
    """One transfer. `result()` is the target, every byte of it there; any stream may use it then.

    Raises StoreError if a copy failed, TransferCancelledError if it was cancelled in time: then the target must not be
    used, and nothing writes it any more.
    """


class Link(Protocol):
    """What copies in one direction, in the order of the calls."""

    def copy(self, target: Tensor, source: Tensor, *, after: Ready) -> Ready:
        """Begin to copy bytes once `after` has passed."""

    def needs_staging(self, host: Tensor) -> bool:
        """Tell whether this memory of the CPU can only be reached by way of page-locked memory."""

    def drain(self) -> None:
        """Block until nothing is being copied any more."""


@dataclass(slots=True, eq=False)
class Part:
    """One transfer's bytes [start, end) of a run. num_left: bytes not yet copied, dropped or failed."""

    handle: TransferHandle
    target: Tensor
    start: int
    end: int
    num_left: int
    failure: Exception | None = None
    is_dropped: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether it is of use to copy more of it."""
        return self.failure is None and not self.handle.is_cancelled


class Run:
    """Transfers whose sources are neighbours in memory, and their targets too: copied as one.

    source, target: [n] uint8, contiguous. after: when the source may be read and the target written.
    """

    def __init__(self, parts: Sequence[Part], source: Tensor, target: Tensor, *, after: Ready, is_staged: bool) -> None:
        self.parts = parts
        self.source = source
        self.target = target
        self.after = after
        self.is_staged = is_staged
        self.at = 0

    @property
    def num_bytes(self) -> int:
        """Length of the whole."""
        return self.source.numel()

    def within(self, start: int, end: int) -> Sequence[Part]:
        """Return the transfers that have bytes in a range."""
        first = bisect_right(self.parts, start, key=lambda part: part.start) - 1
        last = bisect_right(self.parts, end - 1, key=lambda part: part.start)
        return self.parts[first:last]

    def settle(self, start: int, end: int, *, failure: Exception | None = None, is_dropped: bool = False) -> None:
        """Note what became of a range, and tell of transfers that have ended by it."""
        for part in self.within(start, end):
            part.num_left -= min(end, part.end) - max(start, part.start)
            part.failure = part.failure or failure
            part.is_dropped |= is_dropped
            if part.num_left:
                continue
            if part.failure:
                error = StoreError(f"a transfer of {part.end - part.start} bytes failed: {part.failure}")
                error.__cause__ = part.failure
                part.handle.fail(error)
            elif part.is_dropped:
                part.handle.fail(TransferCancelledError("the transfer was cancelled"))
            else:
                part.handle.succeed(part.target)


class _Flight(NamedTuple):
    """A piece on its way. slot: the staging place that it goes by."""

    ready: Ready
    run: Run
    start: int
    end: int
    slot: Tensor | None


class Lane:
    """Carries runs in one direction. staging: [places, piece_bytes] uint8, page-locked, this lane's alone.

    As many pieces are in flight as there are places. max_waiting_bytes: of each priority, beyond which `put` waits.
    """

    def __init__(self, direction: Direction, link: Link, staging: Tensor, *, max_waiting_bytes: int) -> None:
        self._direction = direction
        self._link = link
        self._max_in_flight, self._piece_bytes = staging.shape
        self._free = deque(staging)
        self._in_flight: deque[_Flight] = deque()
        self._queue: WorkQueue[Run] = WorkQueue(
            max_entries=_MAX_WAITING, max_bytes=max_waiting_bytes, patience=PATIENCE
        )
        self._thread = threading.Thread(target=self._work, name=f"tierkv-{direction.value}", daemon=True)
        self._thread.start()

    def needs_staging(self, host: Tensor) -> bool:
        """Tell whether this memory of the CPU is reached by way of a staging place."""
        return self._link.needs_staging(host)

    def put(self, run: Run, priority: Priority, *, timeout_s: float | None = None) -> None:
        """Queue a run, waiting for room as `WorkQueue.put` does. Raises CapacityError and ClosedError as that does."""
        entry = self._queue.put(run, priority, num_bytes=run.num_bytes, timeout_s=timeout_s)
        for part in run.parts:
            part.handle.on_cancel(lambda: self._drop(entry))
        if any(part.handle.is_cancelled for part in run.parts):  # before there was somebody to tell
            self._drop(entry)

    def close(self) -> None:
        """Carry out what is queued, then end the thread and give the staging places up. May be called twice."""
        self._queue.close()
        self._thread.join()
        self._free.clear()

    def _drop(self, entry: QueueEntry[Run]) -> None:
        """Drop a run of which nothing is wanted and nothing has begun; the thread drops the others' rest."""
        run = entry.item
        if not any(part.is_wanted for part in run.parts) and self._queue.cancel(entry):
            run.settle(0, run.num_bytes, is_dropped=True)

    @torch.inference_mode()  # a target may have been made in it, and could be written nowhere else
    def _work(self) -> None:
        while True:
            entry = self._queue.try_take() if self._in_flight else self._queue.take()
            if entry:
                self._begin_piece(entry.item)
                if entry.item.at < entry.item.num_bytes:
                    self._queue.put_back(entry)  # whatever is more urgent by now goes first
            elif self._in_flight:
                self._end_oldest()
            else:
                return
            del entry  # its tensors, while nothing else comes

    def _begin_piece(self, run: Run) -> None:
        start, end = run.at, min(run.at + self._piece_bytes, run.num_bytes)
        run.at = end
        while len(self._in_flight) >= self._max_in_flight:
            self._end_oldest()
        if not any(part.is_wanted for part in run.within(start, end)):
            run.settle(start, end, is_dropped=True)
            return
        slot = self._free.popleft() if run.is_staged else None
        try:
            ready = self._copy(run, start, end, slot)
        except Exception as exc:  # noqa: BLE001 - the outermost loop of its thread; the handle tells
            self._link.drain()
            self._end(_Flight(Done(), run, start, end, slot), exc)
        else:
            self._in_flight.append(_Flight(ready, run, start, end, slot))

    def _copy(self, run: Run, start: int, end: int, slot: Tensor | None) -> Ready:
        source, target = run.source[start:end], run.target[start:end]
        if slot is None:
            return self._link.copy(target, source, after=run.after)
        staged = slot[: end - start]
        if self._direction is Direction.TO_CPU:
            return self._link.copy(staged, source, after=run.after)
        staged.copy_(source)
        return self._link.copy(target, staged, after=run.after)

    def _end_oldest(self) -> None:
        flight = self._in_flight.popleft()
        failure: Exception | None = None
        try:
            flight.ready.synchronize()
            if flight.slot is not None and self._direction is Direction.TO_CPU:
                flight.run.target[flight.start : flight.end].copy_(flight.slot[: flight.end - flight.start])
        except Exception as exc:  # noqa: BLE001 - as above
            failure = exc
        self._end(flight, failure)

    def _end(self, flight: _Flight, failure: Exception | None) -> None:
        if flight.slot is not None:
            self._free.append(flight.slot)
        flight.run.settle(flight.start, flight.end, failure=failure)


class _CpuLink:
    """Copies in the CPU's memory, at once."""

    def copy(self, target: Tensor, source: Tensor, *, after: Ready) -> Ready:
        target.copy_(source)
        return Done()

    def needs_staging(self, host: Tensor) -> bool:
        return False

    def drain(self) -> None:
        """Nothing is ever on its way."""


class _CudaLink:
    """The copy engine of one direction, on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, *, after: Ready) -> Ready:
        with torch.cuda.stream(self._stream):
            after.wait()
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # the thread sleeps while it waits: nobody's token hangs on it
            event.record(self._stream)
        return CudaReady([event])

    def needs_staging(self, host: Tensor) -> bool:
        return not host.is_pinned()

    def drain(self) -> None:
        settle(self._stream)


def open_link(device: torch.device) -> Link:
    """Return what copies between the CPU's memory and a device, in one direction."""
    return _CudaLink(device) if device.type == "cuda" else _CpuLink()
