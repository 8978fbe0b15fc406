"""The warm tier's bytes: one slab of CPU memory that a GPU can copy from at full speed.

The slab is an anonymous file (memfd) mapped shared, so that its descriptor can be handed to another process,
and several threads touch it at once: the first touch by a single thread costs 0.8 s a GiB.
Registering it with CUDA is the mover's work (torch's own pinned allocator rounds sizes up to a power of two
and cannot be shared).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from tierkv.errors import CapacityError, StoreError

__all__ = ["Slab", "WarmPool", "slot_stride"]

_PAGE_BYTES = 4096
_TOUCH_BYTES = 64 << 20
_SEALS = 0x0007  # Linux's F_SEAL_SEAL, F_SEAL_SHRINK and F_SEAL_GROW


def slot_stride(block_bytes: int) -> int:
    """Return how far apart slots of such blocks lie: whole pages."""
    return -(-block_bytes // _PAGE_BYTES) * _PAGE_BYTES


class Slab:
    """Shared memory of a fixed size: made here, or mapped from another process's descriptor.

    The size is sealed (a memfd seal), so that no process that gets the descriptor can cut the memory short: touching
    the missing part would end every process that has it mapped.
    """

    def __init__(self, size_bytes: int, *, num_threads: int = 4) -> None:
        self.size_bytes = size_bytes
        self.is_read_only: bool = False
        self.fd: int | None = _open_memory(size_bytes)
        try:
            self._map = mmap.mmap(-1 if self.fd is None else self.fd, size_bytes)
            _ask_for_huge_pages(self._map)
            self.bytes: npt.NDArray[np.uint8] = np.frombuffer(self._map, dtype=np.uint8)
            _touch(self.bytes, num_threads)
        except BaseException:
            if self.fd is not None:
                os.close(self.fd)
            raise

    @classmethod
    def attach(cls, fd: int, size_bytes: int, *, read_only: bool = False) -> Slab:
        """Map another process's slab; the descriptor is this object's from now on.

        read_only: the descriptor is for reading alone; a write through `bytes` ends this process.
        Raises StoreError for memory of another size, and for memory whose size is not sealed.
        """
        slab = cls.__new__(cls)
        slab.size_bytes, slab.fd, slab.is_read_only = size_bytes, fd, read_only
        try:
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise OSError("its size is not sealed")
            if os.fstat(fd).st_size != size_bytes:  # compared after the seals: it cannot change any more
                raise OSError(f"it has {os.fstat(fd).st_size} bytes, not {size_bytes}")
            # Never a private map: a copy of a page would not see what the daemon writes later.
            slab._map = mmap.mmap(fd, size_bytes, prot=mmap.PROT_READ | (0 if read_only else mmap.PROT_WRITE))
        except (OSError, ValueError, OverflowError) as exc:
            os.close(fd)
            raise StoreError(f"the shared slab cannot be mapped: {exc}") from exc
        _ask_for_huge_pages(slab._map)
        slab.bytes = _unguarded(slab._map) if read_only else np.frombuffer(slab._map, dtype=np.uint8)
        return slab

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return int(self.bytes.ctypes.data)

    def slots(self, block_bytes: int) -> npt.NDArray[np.uint8]:
        """Return the slab as places of one block each: [size // stride, block_bytes], a view."""
        stride = slot_stride(block_bytes)
        num_slots = self.size_bytes // stride
        return self.bytes[: num_slots * stride].reshape(num_slots, stride)[:, :block_bytes]

    def close(self) -> None:
        """Free the memory. May be called twice."""
        self.bytes = np.empty(0, dtype=np.uint8)
        try:
            self._map.close()
        except BufferError:
            pass  # a view is still alive: the memory is freed with the last view
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class WarmPool:
    """`num_slots` places of one block each. `slots` is [num_slots, block_bytes] uint8, page-aligned.

    A slot is `block_bytes` rounded up to whole pages apart. Views of `slots` must not outlive `close`.
    slab: memory to use instead of the pool's own; the pool closes it.
    """

    def __init__(self, block_bytes: int, num_slots: int, *, num_threads: int = 4, slab: Slab | None = None) -> None:
        if num_slots <= 0:
            raise CapacityError(
                f"the warm pool holds no block: one block takes {block_bytes} bytes", hint="raise warm_bytes"
            )
        self.num_slots = num_slots
        self.stride_bytes: int = slot_stride(block_bytes)
        self._slab = slab or Slab(self.stride_bytes * num_slots, num_threads=num_threads)
        self.slab_bytes: int = self._slab.size_bytes
        self.is_read_only: bool = self._slab.is_read_only
        self.slots: npt.NDArray[np.uint8] = self._slab.slots(block_bytes)[:num_slots]

    @property
    def fd(self) -> int | None:
        """Descriptor of the memory; None where the system has no anonymous files, and after `close`."""
        return self._slab.fd

    @property
    def address(self) -> int:
        """Address of the slab's first byte, for registering it with CUDA."""
        return int(self.slots.ctypes.data)

    def close(self) -> None:
        """Free the memory. May be called twice."""
        self.slots = np.empty((0, 0), dtype=np.uint8)
        self._slab.close()


def _unguarded(memory: mmap.mmap) -> npt.NDArray[np.uint8]:
    """Return the bytes of a map for reading as an array that calls itself writable: torch takes no other one."""
    view = np.frombuffer(memory, dtype=np.uint8)
    bare: Any = (ctypes.c_uint8 * len(view)).from_address(view.ctypes.data)
    bare.memory = view  # keeps the map for as long as an array of it lives
    found: npt.NDArray[np.uint8] = np.frombuffer(bare, dtype=np.uint8)
    return found


def _open_memory(size_bytes: int) -> int | None:
    """Return the descriptor of an anonymous file of that size, or None where the system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    fd = os.memfd_create("tierkv-warm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    """Let the system use large pages for shared memory where it is set up to; copies from small ones are slower."""
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)


def _touch(slab: npt.NDArray[np.uint8], num_threads: int) -> None:
    """Write one byte of each page, several ranges at once; numpy releases the GIL while it does.

    One thread is this one: an interpreter that ends starts no other.
    """

    def touch(start: int) -> None:
        slab[start : start + _TOUCH_BYTES : _PAGE_BYTES] = 0

    starts = range(0, len(slab), _TOUCH_BYTES)
    if num_threads == 1:
        for start in starts:
            touch(start)
        return
    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(touch, starts))
