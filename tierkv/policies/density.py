"""The default policy: keeps what has lately been worth keeping, and learns what that is while it runs."""

from __future__ import annotations

import numpy as np

from tierkv.index.eviction import CacheBlock
from tierkv.policies.hazard import NUM_BUCKETS, bucket_of, buckets_of, hazards, hit_densities
from tierkv.policies.lanes import LanePolicy

__all__ = ["HitDensityPolicy"]

_NUM_LANES = 42
_DEPTH_CLASSES = bytes(min(4, ((blocks + 1).bit_length() - 1) // 2) for blocks in range(255))
"""Which of five ranges a number of blocks lies in: up to 2, 14, 62, 254, or above."""


class HitDensityPolicy(LanePolicy):
    """Evicts the block with the fewest hits to be expected from a second of keeping it; LRU until it knows better.

    For each lane it counts after how long blocks are used again, whether they were still cached or not, and how
    many never are. Lanes tell apart what has been seen to matter in serving: new blocks by what they follow (no
    cached prefix, a first block, a longer shared prefix) and how far, used ones by how often and how deep they
    lie, and the partial blocks of prompts. Nothing is trained before, nothing depends on the size of the cache, and
    what it learned halves in weight with every `half_life` uses of blocks of the sample, an eighth of all.

    Sources: LHD (Beckmann, Chen and Cidon, NSDI 2018) for density as the rank, learned online by class and age.
    Theirs samples victims and sees evicted blocks no more; here a lane's oldest block stands for the lane, and
    the history of evicted blocks gives unbiased counts and lets a block that comes back keep its standing.

    num_rows: blocks remembered; a power of two. weight and prior: see `hazards`; the same prior chance for each
    half octave of idle time makes density fall with it, which is LRU.
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
        super().__init__(num_lanes=_NUM_LANES, num_rows=num_rows, sample_mask=sample_mask)
        self._weight = weight
        self._prior = prior
        self._half_life = half_life
        self._used = [[0.0] * NUM_BUCKETS for _ in range(_NUM_LANES)]
        self._lost = [[0.0] * NUM_BUCKETS for _ in range(_NUM_LANES)]
        self._num_uses = 0
        self._learned_at = 0
        self._learn()

    def choose_lane(self, block: CacheBlock, count: int, away_s: float, fork: int) -> int:
        """Return 0 to 14 for a new block, 15 to 39 for a used one, 40 or 41 for the partial block of a prompt."""
        if block.num_tokens < self.block_tokens:
            return 40 + (count > 1)
        if count <= 1:
            ahead = block.depth - fork
            return (5 * fork if fork < 2 else 10) + (_DEPTH_CLASSES[ahead] if ahead < 255 else 4)
        depth = block.depth
        often = min(count - 2 if count < 4 else count.bit_length() - 1, 4)
        return 15 + 5 * often + (_DEPTH_CLASSES[depth] if depth < 255 else 4)

    def interval_ended(self, lane: int, idle_s: float) -> None:
        """Count a use after an idle time."""
        self._used[lane][bucket_of(idle_s)] += 1

    def interval_lost(self, lane: int, idle_s: float) -> None:
        """Count a block that was not used for an idle time, and then forgotten."""
        self._lost[lane][bucket_of(idle_s)] += 1

    def interval_begun(self) -> None:
        """Learn after 32 uses, after as many again until 512 are reached, then after every 512."""
        self._num_uses += 1
        if self._num_uses - self._learned_at >= min(512, max(32, self._learned_at)):
            self._learn()

    def _learn(self) -> None:
        """Bring the densities up to date: a few milliseconds, in which blocks still idle are counted as well."""
        used, lost = np.array(self._used), np.array(self._lost)
        chances = hazards(used, lost + self._count_idle(), weight=self._weight, default=self._prior)
        self.densities = hit_densities(chances).tolist()
        self.revision += 1
        fading = 0.5 ** ((self._num_uses - self._learned_at) / self._half_life)
        self._used, self._lost = (used * fading).tolist(), (lost * fading).tolist()
        self._learned_at = self._num_uses

    def _count_idle(self) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
        """Count the blocks of the sample that are waiting for their next use, [lanes, NUM_BUCKETS]."""
        tags = np.asarray(self.history.tags)
        rows = np.flatnonzero((tags != 0) & (tags & np.uint64(self.sample_mask) == 0))
        if not len(rows):
            return np.zeros((_NUM_LANES, NUM_BUCKETS))
        idle_s = self.now - np.asarray(self.history.times)[rows]
        lanes = np.asarray(self.history.lanes)[rows].astype(np.int64)
        counts = np.bincount(lanes * NUM_BUCKETS + buckets_of(idle_s), minlength=_NUM_LANES * NUM_BUCKETS)
        return counts.astype(np.float64).reshape(_NUM_LANES, NUM_BUCKETS)
