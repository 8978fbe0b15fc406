"""How many reader processes a cache has."""

from __future__ import annotations

import os

__all__ = ["MOST_READERS", "SMALLEST_RECORD_BYTES", "choose_num_readers", "count_cores"]

MOST_READERS = 16
SMALLEST_RECORD_BYTES = 1 << 20
"""Records below are decoded by the thread that found them: to hand them over costs more than it saves."""

_FEWEST_CORES = 4  # with fewer, two threads reach what two processes reach


def choose_num_readers(asked_for: int | None, *, block_bytes: int, ranks: int = 1) -> int:
    """Return how many reader processes to start: as many as asked for, or by the cores that this process may use.

    None: one for each core, at most 16, and none below 4 cores; `ranks` processes share the cores of this machine.
    Always none for blocks that are so small that no record of them is handed over.
    """
    if block_bytes < SMALLEST_RECORD_BYTES or not hasattr(os, "memfd_create"):
        return 0
    if asked_for is not None:
        return asked_for
    cores = count_cores() // ranks
    return 0 if cores < _FEWEST_CORES else min(cores, MOST_READERS)


def count_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
