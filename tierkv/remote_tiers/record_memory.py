"""RecordMemory: memory for values on their way in. It is used again once no array refers to it.

Fresh memory of the system costs 0.3 CPU seconds a GB, as much as to receive the bytes: each page is cleared and mapped
at its first write.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import weakref
from collections import deque
from typing import Any

import numpy as np

from tierkv.storage.codec import Bytes

__all__ = ["RecordMemory"]

_STEP_BYTES = 1 << 20
_MOST_IDLE = 8
_MOST_IDLE_BYTES = 32 << 20  # a longer piece is not kept


class RecordMemory:
    """Up to eight pieces that are kept while nothing uses them. Thread-safe."""

    def __init__(self) -> None:
        # A piece returns when its last array is collected, on any thread and at any moment: so there is no lock.
        self._idle: deque[mmap.mmap] = deque(maxlen=_MOST_IDLE)

    def take(self, size: int) -> Bytes:
        """Return an array of so many bytes of any content. Its memory is used again after its last view is gone."""
        if size < _STEP_BYTES // 4:
            return np.empty(size, dtype=np.uint8)
        needed = -(-size // _STEP_BYTES) * _STEP_BYTES
        piece = self._take_idle(needed) or _new_piece(needed)
        owner: Any = (ctypes.c_ubyte * len(piece)).from_buffer(piece)
        if len(piece) <= _MOST_IDLE_BYTES:
            weakref.finalize(owner, self._idle.append, piece).atexit = False
        memory: Bytes = np.frombuffer(owner, dtype=np.uint8)[:size]
        return memory

    def _take_idle(self, needed: int) -> mmap.mmap | None:
        """Return a kept piece that is long enough; drop those that are not."""
        for _ in range(_MOST_IDLE):
            try:
                piece = self._idle.popleft()
            except IndexError:
                return None
            if needed <= len(piece) <= 2 * needed:
                return piece
        return None


def _new_piece(size: int) -> mmap.mmap:
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    piece = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            piece.madvise(mmap.MADV_HUGEPAGE)
    return piece
