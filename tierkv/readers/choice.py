"""How many reader processes a cache has."""

from __future__ import annotations

import os

from tierkv.values.cores import available_cores

__all__ = ["MOST_READERS", "SMALLEST_RECORD_BYTES", "choose_num_readers", "num_readers_for"]

MOST_READERS = 16
SMALLEST_RECORD_BYTES = 1 << 20
"""Records below are decoded by the thread that found them: to hand them over costs more than it saves."""

_FEWEST_CORES = 4  # with fewer, two threads reach what two processes reach


def choose_num_readers(asked_for: int | None, *, block_bytes: int | None = None, ranks: int = 1) -> int:
    """Return how many reader processes to start: as many as asked for, or by the cores that this process may use.

    ranks: as many processes share these cores. block_bytes: None where it is not known yet. None are started for blocks
    that are so small that no record of them is handed over, and where the system has no memory to share.
    """
    if not hasattr(os, "memfd_create") or (block_bytes is not None and block_bytes < SMALLEST_RECORD_BYTES):
        return 0
    return num_readers_for(available_cores() // ranks) if asked_for is None else asked_for


def num_readers_for(cores: int) -> int:
    """Return how many reader processes so many cores are for: one each, at most 16, and none for fewer than 4."""
    return 0 if cores < _FEWEST_CORES else min(cores, MOST_READERS)
