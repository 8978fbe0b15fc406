"""Occupancy: how full each tier of a cache is."""

from __future__ import annotations

from tierkv.storage.cold_stats import ColdStats
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import Tier
from tierkv.values.stats import TierStats

__all__ = ["occupancy"]


def occupancy(tiers: Tiers, cold: ColdStats | None) -> dict[Tier, TierStats]:
    """Return the sizes of the tiers, counters left at 0; the caller holds the lock.

    cold: what the store says of itself, asked without the lock.
    """
    assert tiers.changed.is_owned()
    block_bytes = tiers.layout.block_bytes
    sizes = {
        tier: TierStats(
            blocks=pool.used_count,
            used_bytes=pool.used_count * block_bytes,
            stored_bytes=pool.used_count * slot_bytes,
            capacity_bytes=pool.capacity * block_bytes,
        )
        for tier, pool, slot_bytes in (
            (Tier.HOT, tiers.index.hot, block_bytes),
            (Tier.WARM, tiers.index.warm, tiers.warm.stride_bytes),
        )
    }
    if cold:
        sizes[Tier.COLD] = TierStats(
            blocks=cold.blocks,
            used_bytes=cold.raw_bytes,
            stored_bytes=cold.live_bytes,
            capacity_bytes=cold.quota_bytes,
            evictions=cold.evicted_blocks,
        )
    return sizes
