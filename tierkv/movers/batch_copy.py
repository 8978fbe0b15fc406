"""Many copies between page-locked and GPU memory in one call.

A single copy costs the copy engine 3 us and Python 7. Pieces of 2 MiB reach 51.2 GB/s one by one and 54.7 GB/s in a
batch, on a bus of 55.5. Batches need CUDA 12.8 and cuda-bindings, which torch's CUDA builds install. Without them, and
on a CPU, one copy follows another.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Piece", "copy_addresses", "copy_pieces"]

_FIRST_VERSION = 12080
_DEFAULT_STREAM = 0  # does not support batches


class Piece(NamedTuple):
    """A run of bytes in one row of the source, and its place in a row of the target."""

    target_row: int
    source_row: int
    length: int
    target_start: int = 0
    source_start: int = 0


def copy_pieces(target: Tensor, source: Tensor, pieces: Sequence[Piece]) -> None:
    """Copy pieces of rows, in no order, on the current stream; asynchronous if a GPU takes part.

    target, source: [rows, bytes] uint8, each row contiguous; CPU memory is page-locked if the other is on a GPU. No two
    pieces overlap in the target. Raises RuntimeError; some pieces may then have been copied, or be in flight.
    """
    device = target.device if target.is_cuda else source.device
    if device.type == "cuda" and len(pieces) > 1 and _copy_batch(target, source, pieces, device):
        return
    for row, other, length, start, other_start in pieces:
        target[row, start : start + length].copy_(source[other, other_start : other_start + length], non_blocking=True)


def _copy_batch(target: Tensor, source: Tensor, pieces: Sequence[Piece], device: torch.device) -> bool:
    """Queue all copies in one call. Return False if CUDA refuses the batch; nothing is queued then."""
    stream = torch.cuda.current_stream(device).cuda_stream
    if _batches() is None or stream == _DEFAULT_STREAM:
        return False
    for piece in pieces:  # CUDA does not check addresses
        assert 0 <= piece.target_row < target.shape[0] and 0 <= piece.source_row < source.shape[0]
        assert piece.target_start + piece.length <= target.shape[1]
        assert piece.source_start + piece.length <= source.shape[1]
    to, to_row = target.data_ptr(), target.stride(0)
    of, of_row = source.data_ptr(), source.stride(0)
    return copy_addresses(
        [to + piece.target_row * to_row + piece.target_start for piece in pieces],
        [of + piece.source_row * of_row + piece.source_start for piece in pieces],
        [piece.length for piece in pieces],
        stream,
    )


def copy_addresses(to: list[int], of: list[int], sizes: list[int], stream: int) -> bool:
    """Copy runs of bytes between addresses of a GPU and of page-locked memory, in no order, in one call on a stream.

    The caller makes sure that the addresses exist: CUDA does not check them. Return False where batches are not
    supported, or refused; nothing is queued then.
    """
    runtime = _batches()
    if runtime is None or stream == _DEFAULT_STREAM:
        return False
    attributes = runtime.cudaMemcpyAttributes()
    attributes.srcAccessOrder = runtime.cudaMemcpySrcAccessOrder.cudaMemcpySrcAccessOrderStream
    status, *_ = runtime.cudaMemcpyBatchAsync(to, of, sizes, len(sizes), [attributes], [0], 1, stream)
    if int(status):
        runtime.cudaGetLastError()  # else torch would raise it at its next call
    return not int(status)


@lru_cache(maxsize=1)
def _batches() -> Any:
    """Return the CUDA runtime's functions if they support batches, else None."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    status, version = runtime.cudaDriverGetVersion()
    is_there = not int(status) and version >= _FIRST_VERSION and hasattr(runtime, "cudaMemcpyBatchAsync")
    return runtime if is_there else None
