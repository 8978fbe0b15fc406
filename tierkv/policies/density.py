"""The default policy: it learns online which blocks are worth keeping.

`hazards` estimates for each class the chance of a use within a bucket of idle time, if there was none before it.
`hit_densities` computes hits a second of keeping a block from these.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tierkv.index.eviction_policy import CacheBlock
from tierkv.policies.block_classes import (
    BUCKET_EDGES,
    NUM_BUCKETS,
    BlockClassPolicy,
    Floats,
    bucket_of,
    buckets_of,
)

__all__ = ["HitDensityPolicy", "hazards", "hit_densities"]

_WIDTHS = np.diff(BUCKET_EDGES)

_NUM_CLASSES = 42
_DEPTH_CLASSES = bytes(min(4, ((blocks + 1).bit_length() - 1) // 2) for blocks in range(255))
"""The range of a number of blocks: up to 2, 14, 62, 254, or above."""


class HitDensityPolicy(BlockClassPolicy):
    """Evicts the block with the fewest expected hits a second of keeping it; LRU until it has learned.

    For each class it counts after which idle times blocks are used again, cached or evicted, and how many never are.
    New blocks are classified by the prefix they follow (none, a first block, a longer shared one) and the distance
    from it. Used blocks are classified by uses and depth; partial blocks have classes of their own. What was learned
    halves in weight with every `half_life` uses of sampled blocks.

    Source: LHD (Beckmann, Chen and Cidon, NSDI 2018) for density as a rank, learned online by class and age. LHD
    samples the blocks to evict; here the oldest block of each class is compared. A history of evicted blocks keeps the
    counts unbiased, and gives a block that comes back its uses.

    num_rows: blocks remembered; a power of two. weight, prior: see `hazards`. An equal prior chance for each half
    octave of idle time makes density fall with idle time, which is LRU.
    """

    def __init__(
        self,
        *,
        num_rows: int = 1 << 17,
        weight: float = 12.0,
        prior: float = 0.04,
        half_life: int = 1 << 14,
        sample_mask: int = 7,
    ) -> None:
        super().__init__(num_classes=_NUM_CLASSES, num_rows=num_rows, sample_mask=sample_mask)
        self._weight = weight
        self._prior = prior
        self._half_life = half_life
        self._used = [[0.0] * NUM_BUCKETS for _ in range(_NUM_CLASSES)]
        self._lost = [[0.0] * NUM_BUCKETS for _ in range(_NUM_CLASSES)]
        self._num_uses = 0
        self._learned_at = 0
        self._learn()

    def classify(self, block: CacheBlock, count: int, away_s: float, fork: int) -> int:
        """Return 0 to 14 for a new block, 15 to 39 for a used one, 40 or 41 for the partial block of a prompt."""
        if block.num_tokens < self.block_tokens:
            return 40 + (count > 1)
        if count <= 1:
            ahead = block.depth - fork
            return (5 * fork if fork < 2 else 10) + (_DEPTH_CLASSES[ahead] if ahead < 255 else 4)
        depth = block.depth
        often = min(count - 2 if count < 4 else count.bit_length() - 1, 4)
        return 15 + 5 * often + (_DEPTH_CLASSES[depth] if depth < 255 else 4)

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
        """Learn after 32 uses, whenever their number has doubled up to 512, then after every 512."""
        self._num_uses += 1
        if self._num_uses - self._learned_at >= min(512, max(32, self._learned_at)):
            self._learn()

    def _learn(self) -> None:
        """Compute the densities anew, blocks that are still idle included: a few milliseconds."""
        used, lost = np.array(self._used), np.array(self._lost)
        chances = hazards(used, lost + self._count_idle(), weight=self._weight, default=self._prior)
        self.densities: list[list[float]] = hit_densities(chances).tolist()
        self.revision += 1
        decay = 0.5 ** ((self._num_uses - self._learned_at) / self._half_life)
        self._used, self._lost = (used * decay).tolist(), (lost * decay).tolist()
        self._learned_at = self._num_uses

    def _count_idle(self) -> Floats:
        """Count the blocks of the sample by class and idle time, [classes, NUM_BUCKETS]."""
        tags = np.asarray(self.history.tags)
        rows = np.flatnonzero((tags != 0) & (tags & np.uint64(self.sample_mask) == 0))
        if not len(rows):
            return np.zeros((_NUM_CLASSES, NUM_BUCKETS))
        idle_s = self.now - np.asarray(self.history.times)[rows]
        classes = np.asarray(self.history.classes)[rows].astype(np.int64)
        counts = np.bincount(classes * NUM_BUCKETS + buckets_of(idle_s), minlength=_NUM_CLASSES * NUM_BUCKETS)
        return counts.astype(np.float64).reshape(_NUM_CLASSES, NUM_BUCKETS)


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
