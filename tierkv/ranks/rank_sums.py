"""RankSums: sums and gathers the tensors of all ranks, in few microseconds where few tokens decode.

A decode step of a split model adds two small tensors a layer over all ranks. On GPUs that reach each other's memory,
every rank reads the others' parts and adds them itself. One kernel does that together with the add to the residual and
the norm (`kernels/rank_norm.py`), or torch's `one_shot_all_reduce` sums alone. NCCL sums all larger tensors, and all
of them where both fail their checks. All can be captured in CUDA graphs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from tierkv.kernels.rank_norm import SharedParts

__all__ = ["ONE_SHOT_BYTES", "RankSums", "can_capture"]

_log = logging.getLogger(__name__)
ONE_SHOT_BYTES = {2: 1 << 20, 3: 1 << 19, 4: 1 << 19, **dict.fromkeys(range(5, 9), 1 << 18)}
"""Sums of at most so many bytes are read in one shot, by ranks: every rank reads the parts of all others."""

# Torch has renamed it.
_gather: Any = getattr(distributed, "all_gather_single", None) or getattr(distributed, "all_gather_into_tensor", None)


class RankSums:
    """Collective operations over a process group; all ranks make the same calls in the same order, on one stream.

    Made by all ranks together. width: the length of the vectors that `linear` sums. with_norms: `linear_add_norm` will
    be called. has_one_shot: whether few vectors are summed without NCCL. max_norm_rows: how many vectors
    `linear_add_norm` takes, 0 where it must not be called.
    """

    def __init__(
        self, group: Any, *, width: int, dtype: torch.dtype, device: torch.device, with_norms: bool = False
    ) -> None:
        self.size: int = distributed.get_world_size(group)
        self._group = group
        self._buffer: Tensor | None = None
        self._max_rows = 0
        self._shared: SharedParts | None = None
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return
        rows = ONE_SHOT_BYTES.get(self.size, 0) // (width * dtype.itemsize)
        if not rows or width * dtype.itemsize % 16:
            return
        self._open_one_shot(rows, width, dtype, device)
        if with_norms and self.has_one_shot:
            self._open_norms(rows, width, dtype, device)

    @property
    def has_one_shot(self) -> bool:
        """Whether few vectors are summed by one kernel that reads the other ranks' memory."""
        return self._buffer is not None

    @property
    def max_norm_rows(self) -> int:
        """How many vectors `linear_add_norm` takes at most; 0 if it must not be called."""
        return 0 if self._shared is None else self._shared.rows

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return [T, width], the sum over all ranks of x @ weight.T.

        x: [T, part of inputs]; weight: [width, part of inputs], this rank's columns.
        """
        rows = x.shape[0]
        if self._buffer is not None and rows <= self._max_rows:
            part = self._buffer[:rows]
            torch.mm(x, weight.t(), out=part)
            return self._sum_one_shot(part)
        total = torch.nn.functional.linear(x, weight)
        distributed.all_reduce(total, group=self._group)
        return total

    def linear_add_norm(
        self, x: Tensor, weight: Tensor, residual: Tensor, norm_weight: Tensor, epsilon: float, *, buffer: int
    ) -> Tensor:
        """Add the sum over all ranks of x @ weight.T to the residual, in place, and return the RMSNorm of that.

        x: [T, part of inputs], T at most `max_norm_rows`; weight: [width, part of inputs], this rank's columns;
        residual: [T, width]; norm_weight: [width]. buffer: 0 and 1 in turn, over all calls that reach the device, so
        none of them may be left out: else a rank writes what another one still reads. See `SharedParts`.
        """
        assert self._shared is not None
        torch.mm(x, weight.t(), out=self._shared.buffers[buffer, : x.shape[0]])
        return _sum_add_norm(self._shared, buffer, residual, norm_weight, epsilon)

    def end_early(self) -> None:
        """Wait for the calls so far, after a pass that failed between two of them.

        The next pass may begin with the buffer of the last call. Ranks agree on the host before it: each has
        waited then, so none of them reads that buffer.
        """
        if self._shared is not None and not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self._shared.buffers.device).synchronize()

    def gather_columns(self, part: Tensor, out: Tensor | None = None) -> Tensor:
        """Return [T, size * n] of all ranks' parts [T, n], side by side in the order of ranks; in `out` if given."""
        rows, columns = part.shape
        gathered = part.new_empty(self.size * rows, columns)
        _gather(gathered, part.contiguous(), group=self._group)
        side_by_side = gathered.view(self.size, rows, columns).transpose(0, 1)
        if out is None:
            return side_by_side.reshape(rows, self.size * columns)
        out.view(rows, self.size, columns).copy_(side_by_side)
        return out

    def _open_one_shot(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take memory that all ranks can read, and use it if a sum in it is right on every rank."""
        buffer = self._on_every_rank(lambda: self._shared_memory((rows, width), dtype, device)[0], device)
        if buffer is not None and self._holds_everywhere(self._is_right(buffer), device):
            self._buffer, self._max_rows = buffer, rows

    def _open_norms(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take memory for sums with a norm, and use it if they are right on every rank."""
        shared = self._on_every_rank(lambda: self._shared_parts(rows, width, dtype, device), device)
        if shared is not None and self._holds_everywhere(self._are_norms_right(shared), device):
            self._shared = shared

    def _on_every_rank(self, make: Callable[[], Any], device: torch.device) -> Any:
        """Return what `make` returns; None if it fails on any rank."""
        made = None
        try:
            made = make()
        except Exception as exc:  # noqa: BLE001 - interfaces that may change, and GPUs that may not be connected
            _log.info("ranks cannot use each other's memory: %s", exc)
        return made if self._agree(made is not None, device) else None

    def _holds_everywhere(self, is_right: bool, device: torch.device) -> bool:
        if self._agree(is_right, device):
            return True
        _log.warning("sums in memory that ranks share are wrong here and are not used")
        return False

    def _agree(self, is_good: bool, device: torch.device) -> bool:
        """Return whether something is good on every rank."""
        votes = torch.tensor([float(is_good)], device=device)
        distributed.all_reduce(votes, op=distributed.ReduceOp.MIN, group=self._group)
        return bool(votes.item())

    def _shared_memory(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Any]:
        from torch.distributed import _symmetric_memory as symmetric_memory

        memory: Tensor = symmetric_memory.empty(*shape, dtype=dtype, device=device)
        return memory, symmetric_memory.rendezvous(memory, self._group.group_name)

    def _shared_parts(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> SharedParts:
        from tierkv.kernels.rank_norm import SharedParts

        size = SharedParts.num_bytes(rows, width, dtype, self.size)
        memory, handle = self._shared_memory((size,), torch.uint8, device)
        addresses, rank = [int(each) for each in handle.buffer_ptrs], distributed.get_rank(self._group)
        assert len(addresses) == self.size and addresses[rank] == memory.data_ptr(), "another layout of shared memory"
        memory.zero_()  # the vote after this comes after it on the stream, so no rank writes a flag before
        # A rank that cannot launch the kernel must not leave the others waiting: each runs it on memory of its own.
        alone = torch.zeros_like(memory)
        trial = SharedParts(alone, [alone.data_ptr()] * self.size, rank, rows=rows, width=width, dtype=dtype)
        trial.flags.fill_(1)
        trial.flags[:, rank] = 0
        zeros = torch.zeros(1, width, dtype=dtype, device=device)
        _sum_add_norm(trial, 0, zeros, zeros[0].clone(), 1e-6)
        torch.cuda.synchronize(device)
        return SharedParts(memory, addresses, rank, rows=rows, width=width, dtype=dtype)

    def _is_right(self, buffer: Tensor) -> bool:
        """Compare sums of several sizes with NCCL's."""
        rank = distributed.get_rank(self._group)
        numbers = torch.arange(buffer.numel(), device=buffer.device).view_as(buffer)
        for rows in sorted({1, min(3, len(buffer)), len(buffer)}):
            mine = ((numbers[:rows] * (rank + 3)) % 61 - 30).to(buffer.dtype)  # sums of whole numbers are exact
            buffer[:rows].copy_(mine)
            got = self._sum_one_shot(buffer[:rows])
            distributed.all_reduce(mine, group=self._group)
            if not torch.equal(got, mine):
                return False
        return True

    def _are_norms_right(self, shared: SharedParts) -> bool:
        """Compare sums of several sizes, added to a residual and normed, with NCCL's sum and the norm's own kernel."""
        from tierkv.kernels.decoder import add_rms_norm

        numbers = torch.arange(shared.buffers[0].numel(), device=shared.buffers.device).view(-1, shared.width)
        weight = (numbers[0] % 7 - 3).to(shared.buffers.dtype)
        is_right = True  # no rank stops before the others: they would wait for it
        for step in range(32):
            rows = (1, min(3, shared.rows), shared.rows)[step % 3]
            total = ((numbers[:rows] * (shared.rank + 3) + step) % 61 - 30).to(weight.dtype)  # whole: sums are exact
            got, want = (((numbers[:rows] + step) % 17).to(weight.dtype) for _ in range(2))
            shared.buffers[step % 2, :rows].copy_(total)
            normed = _sum_add_norm(shared, step % 2, got, weight, 1e-6)
            distributed.all_reduce(total, group=self._group)
            want_normed = torch.empty_like(want)
            add_rms_norm(total, want, weight, 1e-6, want_normed)
            is_right = is_right and torch.equal(got, want) and torch.allclose(normed, want_normed, rtol=1e-2, atol=1e-2)
        return is_right

    def _sum_one_shot(self, part: Tensor) -> Tensor:
        """Return the sum of all ranks' parts of the shared memory, the same bits on every rank."""
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self._group.group_name)
        return total


def _sum_add_norm(shared: SharedParts, buffer: int, residual: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    from tierkv.kernels.rank_norm import sum_add_rms_norm

    normed = torch.empty_like(residual)
    sum_add_rms_norm(shared, buffer, residual, weight, epsilon, normed)
    return normed


def can_capture(group: Any = None) -> bool:
    """Return whether collective operations of a process group on GPUs can be captured in CUDA graphs: NCCL's can.

    group: None for the default group; False without one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return "nccl" in distributed.distributed_c10d.get_backend_config(group)
