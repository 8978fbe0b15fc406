"""Sum over ranks, add to the residual and RMSNorm in one kernel, in memory that the GPUs of all ranks can reach.

The program of a token sets a flag in the other ranks' memory: its part is there. It waits for their flags, then reads
all parts and adds them in the order of ranks, so every rank has the same bits. It rounds where the sum and
`decoder.add_rms_norm` round.
Source: the one-shot all-reduce of vLLM and of torch's symmetric memory, without its second barrier.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tierkv.errors import ShapeError
from tierkv.kernels.decoder import normalise
from tierkv.kernels.launch import require, require_contiguous

__all__ = ["SharedParts", "sum_add_rms_norm"]

_MAX_POLLS = 1 << 28
"""Looks at a flag before the kernel stops the process with a CUDA error: some minutes, as NCCL waits."""


class SharedParts:
    """Memory of each rank that all ranks read and write: two buffers for the parts of sums, and flags.

    memory: this rank's, uint8, `num_bytes` long, zeros before any rank's first sum. addresses: of every rank's memory,
    as this rank reaches it. rank: this rank's number. At most `rows` vectors of `width` numbers are summed at once.

    The buffers are used in turn, so no rank waits after it has read. A rank that writes into a buffer again has ended
    the sum in the other buffer. In that sum it saw that all ranks had begun it. A stream runs one kernel after the
    other, so they had ended the sum before: they no longer read the buffer that is written now.

    flags: [rows, ranks], the number of the last sum that each rank has begun in a row. The numbers only rise, so a
    CUDA graph may be replayed without a reset. The column of the own rank counts its own sums.
    """

    def __init__(
        self, memory: Tensor, addresses: Sequence[int], rank: int, *, rows: int, width: int, dtype: torch.dtype
    ) -> None:
        half = rows * width * dtype.itemsize
        size = len(addresses)
        require(memory.numel() == self.num_bytes(rows, width, dtype, size), f"{memory.numel()} bytes do not fit")
        require(width * dtype.itemsize % 16 == 0, f"vectors of {width} {dtype} are not aligned to 16 bytes")
        self.rank, self.size, self.rows, self.width = rank, size, rows, width
        self.addresses = tuple(addresses)
        self.buffers = memory[: 2 * half].view(dtype).view(2, rows, width)
        self.flags = memory[2 * half :].view(torch.int64).view(rows, size)

    @staticmethod
    def num_bytes(rows: int, width: int, dtype: torch.dtype, size: int) -> int:
        """Return how many bytes of memory each of `size` ranks has."""
        return rows * (2 * width * dtype.itemsize + 8 * size)


def sum_add_rms_norm(
    shared: SharedParts, buffer: int, residual: Tensor, weight: Tensor, epsilon: float, normed: Tensor
) -> None:
    """Add the sum of all ranks' parts to the residual, in place, and write the RMSNorm of that.

    shared.buffers[buffer, :T]: this rank's parts, written before on the current stream. buffer: 0 and 1 in turn, the
    same on every rank. residual, normed: [T, width]; weight: [width]; contiguous, of the dtype and device of the parts.
    Asynchronous on the current stream: all ranks launch it, in the same order. Raises ShapeError before a launch.
    """
    count, width = shape = residual.shape
    parts = shared.buffers
    if not (
        count <= shared.rows
        and width == shared.width
        and normed.shape == shape
        and weight.shape == shape[1:]
        and residual.dtype == normed.dtype == weight.dtype == parts.dtype
        and residual.device == normed.device == weight.device == parts.device
    ):
        raise ShapeError(
            f"a sum of {tuple(shape)} {residual.dtype} with weights {tuple(weight.shape)} {weight.dtype}, into "
            f"{tuple(normed.shape)} {normed.dtype}, does not fit buffers of {tuple(parts.shape[1:])} {parts.dtype}"
        )
    require_contiguous(residual=residual, weight=weight, normed=normed)
    if not count:
        return
    block = triton.next_power_of_2(width)
    _sum_add_rms_norm[(count,)](
        shared.addresses,
        residual,
        weight,
        normed,
        buffer * shared.rows * width,
        parts.nbytes // 8,
        width,
        epsilon,
        RANK=shared.rank,
        SIZE=shared.size,
        BLOCK=block,
        MAX_POLLS=_MAX_POLLS,
        num_warps=min(16, max(1, block // 512)),
    )


@triton.jit
def _sum_add_rms_norm(
    addresses,
    sums,
    weight,
    normed,
    part_start,
    flag_start,
    width,
    epsilon,
    RANK: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_POLLS: tl.constexpr,
):
    """One program per token. part_start: in numbers, flag_start: in words of 8 bytes, both from a rank's address."""
    row = tl.program_id(0).to(tl.int64)
    flag_row = flag_start + row * SIZE
    own_flags = addresses[RANK].to(tl.pointer_type(tl.int64)) + flag_row
    epoch = tl.atomic_add(own_flags + RANK, 1, sem="relaxed", scope="gpu") + 1
    # The parts were written by the kernel before: a release makes them visible with the flag. It comes before the
    # loads below, because it would wait for them.
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            flags = addresses[peer].to(tl.pointer_type(tl.int64)) + flag_row
            tl.atomic_xchg(flags + RANK, epoch, sem="release", scope="sys")

    start = row * width
    at = tl.arange(0, BLOCK)
    inside = at < width
    before = tl.load(sums + start + at, mask=inside, other=0.0)
    factors = tl.load(weight + at, mask=inside, other=0.0)
    part_type = tl.pointer_type(before.dtype)
    own = tl.load(tl.multiple_of(addresses[RANK].to(part_type), 16) + part_start + start + at, mask=inside, other=0.0)
    for peer in tl.static_range(SIZE):
        if peer != RANK:
            polls = 0
            while tl.atomic_add(own_flags + peer, 0, sem="acquire", scope="sys") < epoch:
                polls += 1
                if polls == MAX_POLLS:
                    tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()  # one thread has seen the flags, all read the parts

    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(SIZE):
        part = own
        if peer != RANK:
            parts = tl.multiple_of(addresses[peer].to(part_type), 16) + part_start + start
            part = tl.load(parts + at, mask=inside, other=0.0)
        total += part.to(tl.float32)
    numbers = (total.to(before.dtype).to(tl.float32) + before.to(tl.float32)).to(before.dtype)
    tl.store(sums + start + at, numbers, mask=inside)
    tl.store(normed + start + at, normalise(numbers, factors, width, epsilon), mask=inside)
