"""The processor cores that this process may use, and how many threads of each kind share them."""

from __future__ import annotations

import os

__all__ = ["available_cores", "default_io_threads"]

_MOST_IO_THREADS = 8


def available_cores() -> int:
    """Return how many cores this process may run on: a container or taskset may allow fewer than there are."""
    try:
        return len(os.sched_getaffinity(0)) or 1
    except OSError:
        return os.cpu_count() or 1


def default_io_threads(num_processes: int = 1, *, cores: int | None = None) -> int:
    """Return how many threads of a process read, decode and encode blocks, if so many processes share its cores.

    One for each core, at most 8: more gain nothing, neither from the page cache nor from a disk (measured). Each
    process has at least one. cores: None asks the system.
    """
    share = (available_cores() if cores is None else cores) // max(1, num_processes)
    return max(1, min(_MOST_IO_THREADS, share))
