"""How likely an idle block is to be used again, and how many hits a second of keeping it yields.

Idle times fall into buckets of half an octave. `hazards` estimates for each kind of block the chance of a use within a
bucket, if there was none before it. `hit_densities` computes hits per second from these.
"""

from __future__ import annotations

from math import frexp

import numpy as np
import numpy.typing as npt

__all__ = ["NUM_BUCKETS", "bucket_of", "buckets_of", "hazards", "hit_densities"]

Floats = npt.NDArray[np.float64]

NUM_BUCKETS = 48  # up to 6 days; the last bucket has all longer times
_SHORTEST_LOG2 = -4  # all times below 1/16 s are in the first bucket
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
    """Return for each bucket the chance that a block that reaches it is used in it, [kinds, NUM_BUCKETS].

    used: blocks that were used after an idle time in the bucket. unused: blocks whose idle time is known up to this
    bucket only; they count half in it (Kaplan and Meier's estimate). Both are [kinds, NUM_BUCKETS].
    The estimate of a kind is drawn to that of all kinds as by `weight` more blocks, and that of all kinds to `default`.
    """
    reached = (used + unused)[:, ::-1].cumsum(axis=1)[:, ::-1] - unused / 2
    overall = (used.sum(axis=0) + weight * default) / (reached.sum(axis=0) + weight)
    return np.asarray((used + weight * overall) / (reached + weight))


def hit_densities(chances: Floats) -> Floats:
    """Return the hits that a second of keeping an idle block yields, from each bucket's start, [kinds, NUM_BUCKETS].

    The cache may keep a block until any later bucket. The density is that of the best such end: hits divided by the
    seconds until a hit or the end. To keep the blocks of highest density is optimal if blocks are independent (Gittins'
    index). Hit density as a rank is LHD's (Beckmann, Chen and Cidon, NSDI 2018).
    """
    densities = np.empty_like(chances)
    for start in range(NUM_BUCKETS):
        later = chances[:, start:]
        survival = np.cumprod(1 - later, axis=1)
        before = np.concatenate([np.ones((len(later), 1)), survival[:, :-1]], axis=1)
        seconds = np.cumsum(before * (1 - later / 2) * _WIDTHS[start:], axis=1)
        densities[:, start] = ((1 - survival) / seconds).max(axis=1)
    densities[:, 0] = densities[:, :2].max(axis=1)  # the first bucket is wider: that must not lower it
    return densities
