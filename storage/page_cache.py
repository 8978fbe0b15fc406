"""Asks the system whether it has part of a file in memory, without reading it."""

from __future__ import annotations

import ctypes
import mmap
from functools import lru_cache
from typing import Any

import numpy as np

__all__ = ["is_in_memory"]


def is_in_memory(fd: int, offset: int) -> bool:
    """Tell whether the page around a byte of a file is in the page cache; True where the system does not tell.

    Maps the page and never touches it: a read that must not wait would tell as well, but starts to fetch it.
    """
    mincore = _mincore()
    if mincore is None:
        return True
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    try:
        mapped = mmap.mmap(fd, mmap.PAGESIZE, access=mmap.ACCESS_READ, offset=start)
    except (OSError, ValueError):  # behind the file's end, or in a file that cannot be mapped
        return True
    with mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        found = ctypes.c_ubyte(1)
        failed = mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(mmap.PAGESIZE), ctypes.byref(found))
        del view
    return bool(failed) or bool(found.value & 1)


@lru_cache(maxsize=1)
def _mincore() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "mincore", None)
    except (OSError, TypeError):  # a system without a C library to ask
        return None
