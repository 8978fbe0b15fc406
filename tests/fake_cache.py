"""A cache that holds nothing: its counters are set, and its observers told, by the test."""

from __future__ import annotations

from typing import Any

from tierkv.config import CacheConfig
from tierkv.errors import ClosedError
from tierkv.values.block import Tier
from tierkv.values.events import BlockEvent, CacheObserver, EventKind, RequestEvent
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace
from tierkv.values.stats import CacheStats, TierStats

__all__ = ["BLOCK_BYTES", "FakeCache"]

LAYOUT = BlockLayout.uniform(num_layers=1, block_size=4, kv_heads=1, head_dim=2, dtype="float32")
BLOCK_BYTES = LAYOUT.block_bytes


class FakeCache:
    """Counters that a test sets, and observers that it tells."""

    def __init__(self, *, hot: int = 4, warm: int = 4) -> None:
        self.namespace = Namespace(weights="w", layout=LAYOUT, name="fake")
        self.config = CacheConfig(block_size=4)
        self.layout = LAYOUT
        self.observers: list[CacheObserver] = []
        self.hot, self.warm = hot, warm
        self.counters: dict[str, Any] = {}
        self.hits = dict.fromkeys(Tier, 0)
        self.is_closed = False

    def stats(self) -> CacheStats:
        self._require_open()
        sizes = {Tier.HOT: self.hot, Tier.WARM: self.warm, Tier.COLD: 100}
        tiers = {
            tier: TierStats(hits=self.hits[tier], capacity_bytes=blocks * BLOCK_BYTES) for tier, blocks in sizes.items()
        }
        return CacheStats(tiers=tiers, **self.counters)

    def add_observer(self, observer: CacheObserver) -> None:
        self.observers.append(observer)

    def remove_observer(self, observer: CacheObserver) -> None:
        self._require_open()
        self.observers.remove(observer)

    def _require_open(self) -> None:
        if self.is_closed:
            raise ClosedError("the cache is closed")

    def tell(self, kind: EventKind, tier: Tier, number: int, slot: int = 0) -> None:
        for observer in self.observers:
            observer.on_block(BlockEvent(kind, tier, bytes([number]), b"", 4, BLOCK_BYTES, slot))

    def request(self, *blocks: tuple[Tier | None, int]) -> None:
        events = tuple(
            BlockEvent(EventKind.HIT if tier else EventKind.MISS, tier, bytes([n]), b"", 4, BLOCK_BYTES, n, "absent")
            for tier, n in blocks
        )
        for observer in self.observers:
            observer.on_request(RequestEvent(4 * len(events), {}, events, tuple(each.block_hash for each in events)))
