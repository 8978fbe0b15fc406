"""MemoryTransferManager: background copies of tensors between CPU and GPU, by priority.

The cache's own promotions do not use it: a request's thread queues its copy itself, because another thread would add 50
to 100 us. Transfers that can wait get priorities, cancelling, bounded queues, and memory that need not be page-locked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from tierkv.background.active_calls import ActiveCalls
from tierkv.background.work_queue import Priority
from tierkv.errors import CapacityError, ClosedError, ConfigError, ShapeError
from tierkv.movers.mover import CudaReady, Done, Ready, record_event
from tierkv.movers.transfer_queue import Direction, Part, Run, TransferHandle, TransferQueue, open_copy_engine
from tierkv.values.checks import check_count, check_seconds

__all__ = ["Direction", "MemoryTransferManager", "TransferHandle", "TransferOp"]

_PIECE_BYTES = 16 << 20
_PIECES_IN_FLIGHT = 4
_POOL_BYTES = 2 * _PIECES_IN_FLIGHT * _PIECE_BYTES

_Planned: TypeAlias = "tuple[TransferOp, Tensor, Tensor, TransferHandle]"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TransferOp:
    """Copy `source` to the GPU or to the CPU: into `target`, or into a new tensor if None.

    A target has the source's shape and dtype and is contiguous. Page-locked CPU memory is copied directly. Until the
    transfer has ended, source and target must not be written, nor the target read. Raises ShapeError, and ConfigError
    for an unknown priority.

    >>> TransferOp.to_cpu(torch.ones(3), priority=Priority.PREFETCH).source.shape
    torch.Size([3])
    """

    source: Tensor
    direction: Direction
    target: Tensor | None = None
    priority: Priority | int = Priority.REQUEST

    def __post_init__(self) -> None:
        object.__setattr__(self, "priority", _priority_of(self.priority))
        target = self.target
        if target is None:
            return
        if (target.shape, target.dtype) != (self.source.shape, self.source.dtype):
            raise ShapeError(
                f"a target of {tuple(target.shape)} {target.dtype} for {tuple(self.source.shape)} {self.source.dtype}"
            )
        if not target.is_contiguous():
            raise ShapeError("the target of a transfer must be contiguous")
        if target.is_conj() or target.is_neg():
            raise ShapeError("the target of a transfer must be plain memory, not a view that conjugates or negates it")

    @classmethod
    def to_cpu(
        cls, source: Tensor, target: Tensor | None = None, *, priority: Priority | int = Priority.REQUEST
    ) -> TransferOp:
        """Return the operation that copies a tensor of the GPU to the CPU."""
        return cls(source=source, direction=Direction.TO_CPU, target=target, priority=priority)

    @classmethod
    def to_gpu(
        cls, source: Tensor, target: Tensor | None = None, *, priority: Priority | int = Priority.REQUEST
    ) -> TransferOp:
        """Return the operation that copies a tensor of the CPU to the GPU."""
        return cls(source=source, direction=Direction.TO_GPU, target=target, priority=priority)


class MemoryTransferManager:
    """Copies between CPU and one GPU in the background. Context manager; `close` may be called twice.

    Each direction has a thread and a stream of its own. Transfers go in pieces of at most 16 MiB, four in flight, by
    priority: requests before prefetches before demotions; more urgent pieces overtake. One piece in 32 is of a lower
    priority, so that demotions progress beside endless requests. A transfer waits for the work on the caller's current
    stream at the time of the call, and so do later transfers in its direction.

    device: the GPU, by default the current one; without a GPU, or with "cpu", the same calls copy in the CPU's memory.
    pinned_memory_pool_size: bytes of page-locked memory, allocated once, half for each direction. Pageable memory is
    copied through it; transfers wait while it is full. A larger pool than the default changes nothing.
    max_waiting_bytes: of each direction and priority; a call that would exceed it waits for room.

    >>> with MemoryTransferManager("cpu") as manager:
    ...     (handle,) = manager.bulk_transfer([TransferOp.to_cpu(torch.ones(3))])
    ...     handle.result()
    tensor([1., 1., 1.])
    """

    def __init__(
        self,
        device: torch.device | str | None = None,
        *,
        pinned_memory_pool_size: int = _POOL_BYTES,
        max_waiting_bytes: int = 4 << 30,
    ) -> None:
        self.device: torch.device = _device_of(device)
        self._calls = ActiveCalls("the transfer manager")
        pinned_memory_pool_size = check_count("pinned_memory_pool_size", pinned_memory_pool_size)
        max_waiting_bytes = check_count("max_waiting_bytes", max_waiting_bytes, least=1)
        piece_bytes = min(_PIECE_BYTES, pinned_memory_pool_size // (2 * _PIECES_IN_FLIGHT))
        if piece_bytes < 1:
            raise ConfigError(f"pinned_memory_pool_size must be at least {2 * _PIECES_IN_FLIGHT} bytes")
        shape = (2, _PIECES_IN_FLIGHT, piece_bytes)
        is_cuda = self.device.type == "cuda"
        self._staging = torch.empty(shape, dtype=torch.uint8, pin_memory=is_cuda)
        self._queues = {
            each: TransferQueue(each, open_copy_engine(self.device), staging, max_waiting_bytes=max_waiting_bytes)
            for each, staging in zip(Direction, self._staging, strict=True)
        }
        self._waiting: dict[tuple[Direction, Priority], ThreadPoolExecutor] = {
            (way, priority): ThreadPoolExecutor(1, thread_name_prefix="tierkv-transfer-wait")
            for way in Direction
            for priority in Priority
        }

    def __enter__(self) -> MemoryTransferManager:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def async_to_cpu(self, tensor: Tensor, priority: Priority | int = Priority.REQUEST) -> TransferHandle:
        """Start to copy a tensor of the GPU into new CPU memory; await the handle for the tensor.

        Awaits room in the queue without blocking the event loop. Raises ShapeError for a tensor on another device.
        """
        return await self._hand_over(TransferOp.to_cpu(tensor, priority=priority))

    async def async_to_gpu(
        self,
        cpu_tensor: Tensor,
        device: torch.device | str | None = None,
        priority: Priority | int = Priority.REQUEST,
    ) -> TransferHandle:
        """Start to copy a tensor of the CPU to the GPU, as `async_to_cpu`. Raises ConfigError for another `device`."""
        if device is not None and _device_of(device) != self.device:
            raise ConfigError(f"this manager's device is {self.device}, not {device}")
        return await self._hand_over(TransferOp.to_gpu(cpu_tensor, priority=priority))

    def bulk_transfer(
        self, operations: Sequence[TransferOp], *, timeout_s: float | None = None
    ) -> list[TransferHandle]:
        """Start many transfers; return their handles, in order.

        Successive operations with adjacent sources and adjacent targets in memory are copied as one; they still end and
        fail separately, by pieces. Waits for room in the queues, at most `timeout_s` seconds for each copy; then raises
        CapacityError and cancels transfers that have not begun. Raises ShapeError before anything begins.
        """
        self._calls.require_own_process()
        if timeout_s is not None:
            timeout_s = check_seconds("timeout_s", timeout_s)
        planned = [self._plan(op) for op in operations]
        handles = [handle for _, _, _, handle in planned]
        after = self._mark()
        try:
            for run in _neighbours(planned):
                self._put(run, after, timeout_s)
        except (CapacityError, ClosedError):
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def close(self) -> None:
        """Finish all transfers, then end the threads and free the memory. Does nothing in a forked process."""
        if self._calls.is_forked:
            return
        for queue in self._queues.values():
            queue.close()
        for executor in self._waiting.values():
            executor.shutdown()
        self._staging = torch.empty(0)

    async def _hand_over(self, op: TransferOp) -> TransferHandle:
        self._calls.require_own_process()
        planned, after = self._plan(op), self._mark()
        handle = planned[3]
        try:
            self._put([planned], after, 0)
        except CapacityError:
            loop, executor = asyncio.get_running_loop(), self._waiting[op.direction, Priority(op.priority)]
            try:
                await loop.run_in_executor(executor, self._put, [planned], after, None)
            except asyncio.CancelledError:
                handle.cancel()
                raise
        return handle

    def _plan(self, op: TransferOp) -> _Planned:
        """Return source and target as bytes, [n] uint8. Raises ShapeError."""
        is_up = op.direction is Direction.TO_GPU
        here, there = (torch.device("cpu"), self.device) if is_up else (self.device, torch.device("cpu"))
        target = torch.empty(op.source.shape, dtype=op.source.dtype, device=there) if op.target is None else op.target
        for name, tensor, device in (("source", op.source, here), ("target", target, there)):
            if tensor.device != device:
                raise ShapeError(f"the {name} of a transfer {op.direction.value} lies on {tensor.device}, not {device}")
        return op, _bytes_of(op.source), target, TransferHandle()

    def _put(self, planned: Sequence[_Planned], after: Ready, timeout_s: float | None) -> None:
        """Queue adjacent transfers as one run; transfers without bytes succeed at once."""
        parts: list[Part] = []
        end = 0
        for _, source, target, handle in planned:
            start, end = end, end + source.numel()
            parts.append(Part(handle, target, start, end, source.numel()))
        if not end:
            for part in parts:
                part.handle.succeed(part.target)
            return
        op, first, target, _ = planned[0]
        queue = self._queues[op.direction]
        source, target = _stretched(first, end), _stretched(_bytes_of(target), end)
        is_staged = queue.needs_staging(source if op.direction is Direction.TO_GPU else target)
        run = Run(parts, source, target, after=after, is_staged=is_staged)
        queue.put(run, Priority(op.priority), timeout_s=timeout_s)

    def _mark(self) -> Ready:
        """Return the completion of the work on the current stream, which may still use newly allocated memory."""
        if self.device.type != "cuda":
            return Done()
        return CudaReady([record_event(torch.cuda.current_stream(self.device))])


def _device_of(device: torch.device | str | None) -> torch.device:
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as exc:
        raise ConfigError(f"there is no device {device!r}: {str(exc).splitlines()[0]}") from exc
    has_index: bool = found.type != "cuda" or found.index is not None
    return found if has_index else torch.device("cuda", torch.cuda.current_device())


def _priority_of(priority: Priority | int) -> Priority:
    try:
        return Priority(priority)
    except ValueError:
        raise ConfigError(f"there is no priority {priority}: {', '.join(f'{each:d}' for each in Priority)}") from None


def _bytes_of(tensor: Tensor) -> Tensor:
    """Return a tensor as [n] uint8: a view if it is contiguous."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _stretched(first: Tensor, num_bytes: int) -> Tensor:
    """Return `num_bytes` bytes from a tensor's first one on, past its end into adjacent tensors."""
    return first.as_strided((num_bytes,), (1,))


def _neighbours(planned: Sequence[_Planned]) -> Iterator[Sequence[_Planned]]:
    """Yield runs of transfers of one direction and priority with adjacent sources and adjacent targets."""
    first = 0
    for i in range(1, len(planned) + 1):
        if i == len(planned) or not _follows(planned[i - 1], planned[i]):
            yield planned[first:i]
            first = i


def _follows(before: _Planned, after: _Planned) -> bool:
    (op, source, target, _), (next_op, next_source, next_target, _) = before, after
    is_same_way = (op.direction, op.priority) == (next_op.direction, next_op.priority)
    return is_same_way and _touch(source, next_source) and _touch(target, next_target)


def _touch(left: Tensor, right: Tensor) -> bool:
    is_same_memory = left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()
    return is_same_memory and left.nbytes > 0 < right.nbytes and left.data_ptr() + left.nbytes == right.data_ptr()
