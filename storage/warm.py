"""The warm tier's bytes: one slab of CPU memory that a GPU can copy from at full speed.

The slab is an anonymous file (memfd) mapped shared, so that its descriptor can be handed to another process,
and it is touched by several threads at once: the first touch by one thread costs 0.8 s a GiB.
Registering it with CUDA is the mover's work (torch's own pinned allocator rounds sizes up to a power of two
and cannot be shared).
"""

from __future__ import annotations

import mmap
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from tierkv.errors import CapacityError

__all__ = ["WarmPool"]

_PAGE_BYTES = 4096
_TOUCH_BYTES = 64 << 20


class WarmPool:
    """`num_slots` places of one block each. `slots` is [num_slots, block_bytes] uint8, page-aligned.

    A slot is `block_bytes` rounded up to whole pages apart. Views of `slots` must not outlive `close`.
    """

    def __init__(self, block_bytes: int, num_slots: int, *, num_threads: int = 4) -> None:
        if num_slots <= 0:
            raise CapacityError(
                f"the warm pool holds no block: one block takes {block_bytes} bytes", hint="raise warm_bytes"
            )
        self.num_slots = num_slots
        self.stride_bytes = -(-block_bytes // _PAGE_BYTES) * _PAGE_BYTES
        self.slab_bytes = self.stride_bytes * num_slots
        self.fd: int | None = _open_memory(self.slab_bytes)
        self._map = mmap.mmap(-1 if self.fd is None else self.fd, self.slab_bytes)
        slab = np.frombuffer(self._map, dtype=np.uint8)
        _touch(slab, num_threads)
        self.slots: npt.NDArray[np.uint8] = slab.reshape(num_slots, self.stride_bytes)[:, :block_bytes]

    @property
    def address(self) -> int:
        """Address of the slab's first byte, for registering it with CUDA."""
        return int(self.slots.ctypes.data)

    def close(self) -> None:
        """Give the memory back. May be called twice."""
        self.slots = np.empty((0, 0), dtype=np.uint8)
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still alive somewhere: the memory goes with the last one
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


def _open_memory(size_bytes: int) -> int | None:
    """Return the descriptor of an anonymous file of that size, or None where the system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    fd = os.memfd_create("tierkv-warm", os.MFD_CLOEXEC)
    os.ftruncate(fd, size_bytes)
    return fd


def _touch(slab: npt.NDArray[np.uint8], num_threads: int) -> None:
    """Write one byte of each page, several ranges at once; numpy releases the GIL while it does."""

    def touch(start: int) -> None:
        slab[start : start + _TOUCH_BYTES : _PAGE_BYTES] = 0

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(touch, range(0, len(slab), _TOUCH_BYTES)))
