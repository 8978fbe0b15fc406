"""The default policy: it learns online which blocks are worth keeping.

`hazards` estimates for each class the chance of a use within a bucket of idle time, if there was none before it.
`hit_densities` computes hits a second of keeping a block from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import frexp

import numpy as np

from tierkv.index.eviction_policy import CacheBlock
from tierkv.policies.block_classes import SAMPLED_BLOCKS, BlockClassPolicy
from tierkv.policies.idle_buckets import BUCKET_EDGES, NUM_BUCKETS, Floats, bucket_of, buckets_of

__all__ = ["HitDensityPolicy", "hazards", "hit_densities"]

_WIDTHS = np.diff(BUCKET_EDGES)

_NUM_NEW, _NUM_GAPS, _NUM_OFTEN = 15, 10, 3
_PARTIAL = _NUM_NEW + _NUM_GAPS * _NUM_OFTEN
_NUM_CLASSES = _PARTIAL + 2
_USED_BELIEF = np.outer(2.0 ** (_NUM_GAPS / 8 - np.arange(_NUM_GAPS) / 4), [1.0, 2.0, 5.0])
_BELIEF: Floats = np.concatenate([[0.3] * _NUM_NEW, _USED_BELIEF.ravel(), [0.15, 1.0]])[:, None]
"""How much more often than others a class is used again, before anything is known: used blocks more than new ones, and
the more the more often and the sooner they were used."""

_HIGHEST_CHANCE = 0.999
_MOST_COUNTED = 1 << 14
_MOST_BETWEEN = 1 << 11
_DEPTH_CLASSES = bytes(min(4, ((blocks + 1).bit_length() - 1) // 2) for blocks in range(255))
"""The range of a number of blocks: up to 2, 14, 62, 254, or above."""


class HitDensityPolicy(BlockClassPolicy):
    """Evicts the block with the fewest expected hits a second of keeping it.

    For each class it counts after which idle times blocks are used again, cached or evicted, and how many never are.
    New blocks are classified by the prefix they follow (none, a first block, a longer shared one) and the distance
    from it. Used blocks are classified by the average time between uses and by their number, earlier stays in the cache
    included. Partial blocks have classes of their own. What was learned halves in weight with every `half_life` uses of
    sampled blocks.

    Source: LHD (Beckmann, Chen and Cidon, NSDI 2018) for density as a rank, learned online by class and age. LHD
    samples the blocks to evict; here the oldest block of each class is compared. A history of evicted blocks keeps the
    counts unbiased, and gives a block that comes back its uses.

    num_rows: blocks remembered; a power of two. weight, prior: see `hazards`. An equal prior chance for each half
    octave of idle time makes density fall with idle time. Until it has learned, a class is LRU, and used blocks are
    believed to be worth more than new ones.
    """

    def __init__(
        self,
        *,
        num_rows: int = 1 << 17,
        weight: float = 30.0,
        prior: float = 0.04,
        half_life: int = 1 << 14,
        sampled_blocks: int = SAMPLED_BLOCKS,
    ) -> None:
        super().__init__(num_classes=_NUM_CLASSES, num_rows=num_rows, sampled_blocks=sampled_blocks)
        self._weight = weight
        self._prior = prior
        self._half_life = half_life
        self._used = [[0.0] * NUM_BUCKETS for _ in range(_NUM_CLASSES)]
        self._lost = [[0.0] * NUM_BUCKETS for _ in range(_NUM_CLASSES)]
        self._num_uses = 0
        self._learned_at = 0
        self._learn()

    def classify(self, block: CacheBlock, count: int, gap_s: float, fork: int) -> int:
        """Return 0 to 14 for a new block, 15 to 44 for a used one, 45 or 46 for the partial block of a prompt."""
        if block.num_tokens < self.block_tokens:
            return _PARTIAL + (count > 1)
        if count <= 1:
            ahead = block.depth - fork
            return (5 * fork if fork < 2 else 10) + (_DEPTH_CLASSES[ahead] if ahead < 255 else 4)
        gap = (frexp(gap_s)[1] + 1) // 2  # a factor of four each, from half a second to 18 hours
        often = 0 if count == 2 else 1 if count < 6 else 2
        return _NUM_NEW + _NUM_OFTEN * (0 if gap < 0 else gap if gap < _NUM_GAPS else _NUM_GAPS - 1) + often

    def classes_of_new(self, blocks: Sequence[CacheBlock], fork: int) -> list[int]:
        """Return the classes of the new blocks of a chain, which differ in their depths only."""
        if type(self).classify is not HitDensityPolicy.classify or blocks[0].num_tokens < self.block_tokens:
            return super().classes_of_new(blocks, fork)
        first = blocks[0].depth - fork
        kinds = _DEPTH_CLASSES[first : first + len(blocks)]
        base = 5 * fork if fork < 2 else 10
        return [base + kind for kind in kinds] + [base + 4] * (len(blocks) - len(kinds))

    def interval_ended(self, block_class: int, idle_s: float) -> None:
        """Count a use after an idle time."""
        self._used[block_class][bucket_of(idle_s)] += 1

    def interval_lost(self, block_class: int, idle_s: float) -> None:
        """Count a block that was not used for an idle time, and then forgotten."""
        self._lost[block_class][bucket_of(idle_s)] += 1

    def interval_begun(self) -> None:
        """Learn after 32 uses, whenever their number has grown by half, and after every 2,048 at the latest."""
        self._num_uses += 1
        if self._num_uses >= self._learn_at:
            self._learn()

    def uses_to_next_change(self) -> int:
        """Return the uses until it learns."""
        return self._learn_at - self._num_uses

    def _learn(self) -> None:
        """Compute the densities anew, blocks that are still idle included: a few milliseconds."""
        used, lost = np.array(self._used), np.array(self._lost)
        chances = hazards(used, lost + self._count_idle(), weight=self._weight, default=self._prior, belief=_BELIEF)
        self.densities: list[list[float]] = hit_densities(chances).tolist()
        self.revision += 1
        decay = 0.5 ** ((self._num_uses - self._learned_at) / self._half_life)
        if self.halve_sample():
            decay /= 2  # the counts of before are those of twice as many blocks
        self._used, self._lost = (used * decay).tolist(), (lost * decay).tolist()
        self._learned_at = self._num_uses
        self._learn_at = self._num_uses + min(_MOST_BETWEEN, max(32, self._num_uses // 2))

    def _count_idle(self) -> Floats:
        """Count the blocks of the sample by class and idle time, [classes, NUM_BUCKETS]."""
        tags = np.asarray(self.history.tags)
        rows = np.flatnonzero((tags != 0) & (tags & np.uint64(self.sample_mask) == 0))
        step = max(1, len(rows) // _MOST_COUNTED)
        rows = rows[self._num_uses % step :: step]
        idle_s = self.now - np.asarray(self.history.times)[rows]
        classes = np.asarray(self.history.classes)[rows].astype(np.int64)
        counts = np.bincount(classes * NUM_BUCKETS + buckets_of(idle_s), minlength=_NUM_CLASSES * NUM_BUCKETS)
        return step * counts.astype(np.float64).reshape(_NUM_CLASSES, NUM_BUCKETS)


def hazards(used: Floats, unused: Floats, *, weight: float, default: float, belief: Floats | float = 1.0) -> Floats:
    """Return for each bucket the chance that a block that reaches it is used in it, [kinds, NUM_BUCKETS].

    used: blocks that were used after an idle time in the bucket. unused: blocks whose idle time is known up to this
    bucket only; they count half in it (Kaplan and Meier's estimate). Both are [kinds, NUM_BUCKETS].
    The estimate of a kind is drawn to that of all kinds as by `weight` more blocks, and that of all kinds to `default`.
    belief: how much larger a kind's chances are than others' if nothing is known, [kinds, 1].
    """
    reached = (used + unused)[:, ::-1].cumsum(axis=1)[:, ::-1] - unused / 2
    overall = (used.sum(axis=0) + weight * default) / ((belief * reached).sum(axis=0) + weight)
    return np.asarray(np.minimum((used + weight * belief * overall) / (reached + weight), _HIGHEST_CHANCE))


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
