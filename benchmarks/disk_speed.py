"""The disk's own speed: a file read around the page cache."""

from __future__ import annotations

import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["read_direct_gb_s"]

_CHUNK_BYTES = 4 << 20


def read_direct_gb_s(path: Path, *, num_threads: int) -> float:
    """Return GB/s of reading a file with as many threads, each a part, not through the page cache.

    Raises OSError where the file system has no such reads.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    chunks = os.fstat(fd).st_size // _CHUNK_BYTES

    def read_part(first: int) -> None:
        with mmap.mmap(-1, _CHUNK_BYTES) as buffer:
            for chunk in range(first, chunks, num_threads):
                os.preadv(fd, [buffer], chunk * _CHUNK_BYTES)

    try:
        with ThreadPoolExecutor(num_threads) as threads:
            started = time.perf_counter()
            list(threads.map(read_part, range(num_threads)))
            return chunks * _CHUNK_BYTES / (time.perf_counter() - started) / 1e9
    finally:
        os.close(fd)
