"""The queue of one direction of transfers: the most urgent one first, in pieces, a few of them in flight.

One thread takes the pieces and queues each on a stream of the copy engine. When no more pieces may be in flight, it
waits for the oldest; it holds no lock then. A staging buffer is reused only after the copy that used it.
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
from tierkv.movers.mover import CudaReady, Done, Ready, synchronize_streams

__all__ = ["CopyEngine", "Direction", "Part", "Run", "TransferHandle", "TransferQueue", "open_copy_engine"]

_MAX_WAITING = 65_536


class Direction(Enum):
    """The direction of a transfer; without a GPU, both are copies in the CPU's memory."""

    TO_GPU = "to_gpu"
    TO_CPU = "to_cpu"


class TransferHandle(Handle[Tensor]):
    """One transfer. `result()` returns the complete target, which any stream may use then.

    It raises StoreError if a copy failed, TransferCancelledError if the transfer was cancelled in time. The target must
    not be used then, and no copy writes it any more.
    """


class CopyEngine(Protocol):
    """The copy engine of one direction; it copies in the order of the calls."""

    def copy(self, target: Tensor, source: Tensor, *, after: Ready) -> Ready:
        """Start to copy bytes after `after`."""

    def needs_staging(self, host: Tensor) -> bool:
        """Return whether this CPU memory can only be copied through page-locked memory."""

    def drain(self) -> None:
        """Block until all copies have ended."""


@dataclass(slots=True, eq=False)
class Part:
    """One transfer's bytes [start, end) of a run. num_left: bytes that are not yet copied, dropped or failed."""

    handle: TransferHandle
    target: Tensor
    start: int
    end: int
    num_left: int
    failure: Exception | None = None
    is_dropped: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether the rest of it must still be copied."""
        return self.failure is None and not self.handle.is_cancelled


class Run:
    """Transfers whose sources are adjacent in memory, and their targets too: copied as one.

    source, target: [n] uint8, contiguous. after: the source may be read, and the target written, after it.
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
        """Length of the source and of the target."""
        return self.source.numel()

    def within(self, start: int, end: int) -> Sequence[Part]:
        """Return the transfers with bytes in a range."""
        first = bisect_right(self.parts, start, key=lambda part: part.start) - 1
        last = bisect_right(self.parts, end - 1, key=lambda part: part.start)
        return self.parts[first:last]

    def complete(self, start: int, end: int, *, failure: Exception | None = None, is_dropped: bool = False) -> None:
        """Record the outcome of a range, and complete the handles of transfers that end with it."""
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
    """A piece in flight. slot: its staging buffer."""

    ready: Ready
    run: Run
    start: int
    end: int
    slot: Tensor | None


class TransferQueue:
    """Copies runs in one direction, by a thread of its own.

    staging: [buffers, piece_bytes] uint8, page-locked, used by this queue only. At most so many pieces are in flight.
    max_waiting_bytes: of each priority; beyond it `put` waits.
    """

    def __init__(self, direction: Direction, engine: CopyEngine, staging: Tensor, *, max_waiting_bytes: int) -> None:
        self._direction = direction
        self._engine = engine
        self._max_in_flight, self._piece_bytes = staging.shape
        self._free = deque(staging)
        self._in_flight: deque[_Flight] = deque()
        self._queue: WorkQueue[Run] = WorkQueue(
            max_entries=_MAX_WAITING, max_bytes=max_waiting_bytes, patience=PATIENCE
        )
        self._thread = threading.Thread(target=self._work, name=f"tierkv-{direction.value}", daemon=True)
        self._thread.start()

    def needs_staging(self, host: Tensor) -> bool:
        """Return whether this CPU memory is copied through a staging buffer."""
        return self._engine.needs_staging(host)

    def put(self, run: Run, priority: Priority, *, timeout_s: float | None = None) -> None:
        """Queue a run. Waits for room and raises CapacityError and ClosedError as `WorkQueue.put` does."""
        entry = self._queue.put(run, priority, num_bytes=run.num_bytes, timeout_s=timeout_s)
        for part in run.parts:
            part.handle.on_cancel(lambda: self._drop(entry))
        if any(part.handle.is_cancelled for part in run.parts):  # cancelled before `on_cancel`
            self._drop(entry)

    def close(self) -> None:
        """Copy the queued runs, then end the thread. May be called twice."""
        self._queue.close()
        self._thread.join()
        self._free.clear()

    def _drop(self, entry: QueueEntry[Run]) -> None:
        """Drop a run that is not begun if all its transfers are cancelled; the thread drops the rest of begun ones."""
        run = entry.item
        if not any(part.is_wanted for part in run.parts) and self._queue.cancel(entry):
            run.complete(0, run.num_bytes, is_dropped=True)

    @torch.inference_mode()  # a target may be an inference tensor, which nothing else may write
    def _work(self) -> None:
        while True:
            entry = self._queue.try_take() if self._in_flight else self._queue.take()
            if entry:
                self._begin_piece(entry.item)
                if entry.item.at < entry.item.num_bytes:
                    self._queue.put_back(entry)  # a more urgent run goes first
            elif self._in_flight:
                self._end_oldest()
            else:
                return
            del entry  # frees its tensors while the queue is empty

    def _begin_piece(self, run: Run) -> None:
        start, end = run.at, min(run.at + self._piece_bytes, run.num_bytes)
        run.at = end
        while len(self._in_flight) >= self._max_in_flight:
            self._end_oldest()
        if not any(part.is_wanted for part in run.within(start, end)):
            run.complete(start, end, is_dropped=True)
            return
        slot = self._free.popleft() if run.is_staged else None
        try:
            ready = self._copy(run, start, end, slot)
        except Exception as exc:  # noqa: BLE001 - the outermost loop of its thread; the handle raises it
            self._engine.drain()
            self._end(_Flight(Done(), run, start, end, slot), exc)
        else:
            self._in_flight.append(_Flight(ready, run, start, end, slot))

    def _copy(self, run: Run, start: int, end: int, slot: Tensor | None) -> Ready:
        source, target = run.source[start:end], run.target[start:end]
        if slot is None:
            return self._engine.copy(target, source, after=run.after)
        staged = slot[: end - start]
        if self._direction is Direction.TO_CPU:
            return self._engine.copy(staged, source, after=run.after)
        staged.copy_(source)
        return self._engine.copy(target, staged, after=run.after)

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
        flight.run.complete(flight.start, flight.end, failure=failure)


class _CpuCopies:
    """Copies in the CPU's memory, synchronously."""

    def copy(self, target: Tensor, source: Tensor, *, after: Ready) -> Ready:
        target.copy_(source)
        return Done()

    def needs_staging(self, host: Tensor) -> bool:
        return False

    def drain(self) -> None:
        """No copy is ever in flight."""


class _CudaCopyEngine:
    """A GPU's copy engine, through a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor, *, after: Ready) -> Ready:
        with torch.cuda.stream(self._stream):
            after.wait()
            target.copy_(source, non_blocking=True)
            event = torch.cuda.Event(blocking=True)  # the thread sleeps while it waits: no request needs this copy soon
            event.record(self._stream)
        return CudaReady([event])

    def needs_staging(self, host: Tensor) -> bool:
        return not host.is_pinned()

    def drain(self) -> None:
        synchronize_streams(self._stream)


def open_copy_engine(device: torch.device) -> CopyEngine:
    """Return a copy engine between the CPU's memory and a device, for one direction."""
    return _CudaCopyEngine(device) if device.type == "cuda" else _CpuCopies()
