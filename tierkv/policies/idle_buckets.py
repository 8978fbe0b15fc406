"""Idle times fall into buckets of half an octave."""

from __future__ import annotations

from math import frexp

import numpy as np
import numpy.typing as npt

__all__ = ["BUCKET_EDGES", "NUM_BUCKETS", "Floats", "bucket_of", "buckets_of"]

Floats = npt.NDArray[np.float64]

NUM_BUCKETS = 48  # up to 6 days; the last bucket has all longer times
_SHORTEST_LOG2 = -4  # all times below 1/16 s are in the first bucket
_SQRT_HALF = 0.5**0.5
BUCKET_EDGES: Floats = np.concatenate([[0.0], 2.0 ** (_SHORTEST_LOG2 + np.arange(NUM_BUCKETS) / 2)])


def bucket_of(idle_s: float) -> int:
    """Return the bucket of an idle time in seconds."""
    fraction, exponent = frexp(idle_s)  # idle = fraction * 2**exponent, half <= fraction < 1
    bucket = 2 * (exponent - 1 - _SHORTEST_LOG2) + (fraction >= _SQRT_HALF) + 1
    if bucket <= 0 or idle_s <= 0:
        return 0
    return bucket if bucket < NUM_BUCKETS else NUM_BUCKETS - 1


def buckets_of(idle_s: Floats) -> npt.NDArray[np.int64]:
    """Return the buckets of many idle times."""
    return np.clip(np.searchsorted(BUCKET_EDGES, idle_s, side="right") - 1, 0, NUM_BUCKETS - 1)
