"""How likely a block is to be used again, by how long it has been idle, and what that is worth.

Idle times fall into buckets of half an octave. For each kind of block the chance to be used within a bucket, given
that it was not before, is counted (`hazards`), and from these follows how much a second of keeping it yields
(`hit_densities`).
"""

from __future__ import annotations

from math import frexp

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_BUCKETS", "bucket_of", "buckets_of", "hazards", "hit_densities"]

Floats = npt.NDArray[np.float64]

NUM_BUCKETS = 48  # up to 6 days; the last has what is longer
_SHORTEST_LOG2 = -4  # below 1/16 s everything is one bucket
_SQRT_HALF = 0.5**0.5
_EDGES = np.concatenate([[0.0], 2.0 ** (_SHORTEST_LOG2 + np.arange(NUM_BUCKETS) / 2)])
_WIDTHS = np.diff(_EDGES)


def bucket_of(idle_s: float) -> int:
    """Return the bucket of an idle time in seconds."""
    fraction, exponent = frexp(idle_s)  # idle = fraction * 2**exponent, half <= fraction < 1
    bucket = 2 * (exponent - 1 - _SHORTEST_LOG2) + (fraction >= _SQRT_HALF) + 1
    if bucket <= 0 or idle_s <= 0:
        return 0
    return bucket if bucket < NUM_BUCKETS else NUM_BUCKETS - 1


def buckets_of(idle_s: Floats) -> npt.NDArray[np.int64]:
    """Return the buckets of many idle times."""
    return np.clip(np.searchsorted(_EDGES, idle_s, side="right") - 1, 0, NUM_BUCKETS - 1)


def hazards(used: Floats, unused: Floats, *, weight: float, default: float) -> Floats:
    """Return the chance to be used within each bucket of those that reach it, [kinds, NUM_BUCKETS].

    used: how many were used again after an idle time in the bucket. unused: how many were last seen idle for so
    long, or are still idle: for them nothing is known of later buckets, and half is known of this one (Kaplan
    and Meier's estimate). Both [kinds, NUM_BUCKETS]. A kind with little evidence is drawn to all kinds together,
    and these to `default`, each as though by `weight` more blocks.
    """
    reached = (used + unused)[:, ::-1].cumsum(axis=1)[:, ::-1] - unused / 2
    overall = (used.sum(axis=0) + weight * default) / (reached.sum(axis=0) + weight)
    return np.asarray((used + weight * overall) / (reached + weight))


def hit_densities(chances: Floats) -> Floats:
    """Return the hits that a second of keeping a block yields, [kinds, NUM_BUCKETS], idle since each bucket's start.

    Whoever keeps a block may stop at any later bucket: of all stops the best counts, hits divided by the seconds
    spent until a hit or the stop. Keeping what has the highest density is optimal where blocks are independent
    (Gittins' index); hit density as a rank is LHD's (Beckmann, Chen and Cidon, NSDI 2018).
    """
    densities = np.empty_like(chances)
    for start in range(NUM_BUCKETS):
        tail = chances[:, start:]
        survival = np.cumprod(1 - tail, axis=1)
        before = np.concatenate([np.ones((len(tail), 1)), survival[:, :-1]], axis=1)
        seconds = np.cumsum(before * (1 - tail / 2) * _WIDTHS[start:], axis=1)
        densities[:, start] = ((1 - survival) / seconds).max(axis=1)
    densities[:, 0] = densities[:, :2].max(axis=1)  # it is wider than the next, which says nothing against it
    return densities
