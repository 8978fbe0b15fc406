"""ZstdBatch: decodes many zstd frames at once on a GPU, by the C functions of nvCOMP (wheel nvidia-libnvcomp-cu13).

nvCOMP's Python package makes two objects for each frame and waits for the GPU in every call: 17 ms for the 2,048 frames
of 16 blocks (H200). A call of `ctypes` takes pointers to tables and releases the interpreter's lock, so that threads
read the next blocks meanwhile.
Source: nvcomp/zstd.h of nvCOMP 6.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tierkv.errors import StoreError

__all__ = ["Decoding", "ZstdBatch", "has_nvcomp"]

_PACKAGE = "nvidia.libnvcomp"
_TEMP_ALIGNMENT = 512  # torch allocates GPU memory so; nvCOMP wants 8


class _Options(ctypes.Structure):
    """`nvcompBatchedZstdDecompressOpts_t`; all zero is its default."""

    _fields_: ClassVar = [("backend", ctypes.c_int), ("reserved", ctypes.c_char * 60)]


@dataclass(frozen=True, slots=True)
class Decoding:
    """Queued decoding. held: GPU memory that it uses. num_wrong: one int64 on the host, once the stream got there."""

    num_wrong: Tensor
    held: tuple[Tensor, ...]

    def check(self) -> None:
        """Raise StoreError for frames that did not decode to their length; call it when the stream has got there."""
        if wrong := int(self.num_wrong):
            raise StoreError(f"{wrong} frames did not decode")


class ZstdBatch:
    """Decodes batches of frames on one device, asynchronously. Raises StoreError without the library.

    library: the C functions; None loads those of the wheel. keeps_memory: between batches, which then all have one
    stream.
    """

    def __init__(self, device: torch.device, *, library: Any = None, keeps_memory: bool = False) -> None:
        self._device = device
        self._keeps_memory = keeps_memory
        self._kept: Tensor | None = None
        library = library or _load()
        try:
            self._temp_size: Callable[..., int] = library.nvcompBatchedZstdDecompressGetTempSize
            self._decompress: Callable[..., int] = library.nvcompBatchedZstdDecompressAsync
        except AttributeError as exc:
            raise StoreError(f"this nvCOMP is another one: {exc}") from exc
        size, pointer = ctypes.c_size_t, ctypes.c_void_p
        self._temp_size.argtypes = [size, size, _Options, ctypes.POINTER(size), size, pointer]
        self._decompress.argtypes = [
            pointer, pointer, pointer, pointer, size, pointer, size, pointer, _Options, pointer, pointer
        ]  # fmt: skip
        self._temp_size.restype = self._decompress.restype = ctypes.c_int

    def decode(
        self,
        sources: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
        targets: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        *,
        stream: torch.cuda.Stream,
    ) -> Decoding:
        """Queue the decoding of frames at GPU addresses; `stream` is the current one.

        sources, sizes: [n] where each frame lies, and its bytes. targets, lengths: [n] where it goes, and the bytes
        that it must have. No alignment is needed. Each frame was checked to claim its length. Raises StoreError.
        """
        count = sizes.size
        table = (
            torch.from_numpy(np.stack([sources, sizes, targets, lengths]))
            .pin_memory()
            .to(self._device, non_blocking=True)
        )
        found = torch.empty(count, dtype=torch.int64, device=self._device)
        statuses = torch.empty(count, dtype=torch.int32, device=self._device)
        longest, total = int(lengths.max()), int(lengths.sum())
        temp = self._temp(self._temp_bytes(count, longest, total, stream))
        rows = [row.data_ptr() for row in table]
        self._require(
            self._decompress(
                rows[0],
                rows[1],
                rows[3],
                found.data_ptr(),
                count,
                temp.data_ptr(),
                temp.numel(),
                rows[2],
                _Options(),
                statuses.data_ptr(),
                stream.cuda_stream,
            )
        )
        wrong = torch.empty(1, dtype=torch.int64, pin_memory=True)
        wrong.copy_(((statuses != 0) | (found != table[3])).sum(), non_blocking=True)
        return Decoding(wrong, (table, found, statuses, temp))

    def _temp(self, size: int) -> Tensor:
        """Return so many bytes on the GPU."""
        if self._kept is not None and self._kept.numel() >= size:
            return self._kept[:size]
        temp = torch.empty(size, dtype=torch.uint8, device=self._device)
        if self._keeps_memory:
            self._kept = temp
        return temp

    def _temp_bytes(self, count: int, longest: int, total: int, stream: torch.cuda.Stream) -> int:
        """Return how much GPU memory a batch needs while it is decoded."""
        needed = ctypes.c_size_t()
        self._require(self._temp_size(count, longest, _Options(), ctypes.byref(needed), total, stream.cuda_stream))
        return max(_TEMP_ALIGNMENT, needed.value)

    def _require(self, status: int) -> None:
        if status:
            raise StoreError(f"nvCOMP refuses to decode, with its status {status}")


def has_nvcomp() -> bool:
    """Return whether nvCOMP's library is installed."""
    try:
        return importlib.util.find_spec(_PACKAGE) is not None
    except ModuleNotFoundError:
        return False


def _load() -> Any:
    try:
        library: Any = importlib.import_module(_PACKAGE).load_library()
    except ImportError as exc:
        raise StoreError(f"nvCOMP cannot be loaded: {exc}") from exc
    if library is None:
        raise StoreError("nvCOMP cannot be loaded: its library is not there")
    return library
