"""RankSums: sums and gathers the tensors of all ranks, in few microseconds where few tokens decode.

A decode step of a split model adds two small tensors a layer over all ranks. On GPUs that reach each other's memory,
every rank reads the others' parts and adds them itself, in one kernel: torch's `one_shot_all_reduce` over symmetric
memory. NCCL sums all larger tensors, and all of them where that fails its check. Both can be captured in CUDA graphs.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["ONE_SHOT_BYTES", "RankSums", "can_capture"]

_log = logging.getLogger(__name__)
ONE_SHOT_BYTES = {2: 1 << 20, 3: 1 << 19, 4: 1 << 19, **dict.fromkeys(range(5, 9), 1 << 18)}
"""Sums of at most so many bytes are read in one shot, by ranks: every rank reads the parts of all others."""

# Torch has renamed it.
_gather: Any = getattr(distributed, "all_gather_single", None) or getattr(distributed, "all_gather_into_tensor", None)


class RankSums:
    """Collective operations over a process group; all ranks make the same calls in the same order, on one stream.

    Made by all ranks together. width: the length of the vectors that `linear` sums. has_one_shot: whether few vectors
    are summed without NCCL.
    """

    def __init__(self, group: Any, *, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.size: int = distributed.get_world_size(group)
        self._group = group
        self._buffer: Tensor | None = None
        self._max_rows = 0
        if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16, torch.float32):
            self._open_one_shot(width, dtype, device)

    @property
    def has_one_shot(self) -> bool:
        """Whether few vectors are summed by one kernel that reads the other ranks' memory."""
        return self._buffer is not None

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

    def _open_one_shot(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Take memory that all ranks can read, and use it if a sum in it is right on every rank."""
        buffer: Tensor | None = None
        try:
            buffer = self._shared_memory(width, dtype, device)
        except Exception as exc:  # noqa: BLE001 - an interface of torch that may change, and GPUs that may not be connected
            _log.info("ranks cannot read each other's memory, NCCL sums all tensors: %s", exc)
        is_good = torch.tensor([float(buffer is not None)], device=device)
        distributed.all_reduce(is_good, op=distributed.ReduceOp.MIN, group=self._group)
        if buffer is None or not is_good.item():
            return
        is_good.fill_(self._is_right(buffer))
        distributed.all_reduce(is_good, op=distributed.ReduceOp.MIN, group=self._group)
        if is_good.item():
            self._buffer, self._max_rows = buffer, buffer.shape[0]
        else:
            _log.warning("sums in memory that ranks share are wrong here: NCCL sums all tensors")

    def _shared_memory(self, width: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        max_bytes = ONE_SHOT_BYTES.get(self.size, 0)
        rows = max_bytes // (width * dtype.itemsize)
        if not rows or width * dtype.itemsize % 16:
            return None
        buffer: Tensor = symmetric_memory.empty(rows, width, dtype=dtype, device=device)
        symmetric_memory.rendezvous(buffer, self._group.group_name)
        return buffer

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

    def _sum_one_shot(self, part: Tensor) -> Tensor:
        """Return the sum of all ranks' parts of the shared memory, the same bits on every rank."""
        total: Tensor = torch.ops.symm_mem.one_shot_all_reduce(part, "sum", self._group.group_name)
        return total


def can_capture(group: Any = None) -> bool:
    """Return whether collective operations of a process group on GPUs can be captured in CUDA graphs: NCCL's can.

    group: None for the default group; False without one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return "nccl" in distributed.distributed_c10d.get_backend_config(group)
