"""The one place from which a cache's observers are called."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tierkv.index.index import Entry
from tierkv.storage.hot import HotPool
from tierkv.storage.outcomes import MissReason
from tierkv.storage.warm import WarmPool
from tierkv.transfer.lookup import Hit
from tierkv.values.block import TOKEN_BYTES, Tier
from tierkv.values.events import (
    BlockEvent,
    BlockName,
    CacheObserver,
    EventKind,
    MemoryRegion,
    NamedBlock,
    RequestEvent,
    Span,
)
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import Owned

__all__ = ["Observers", "pool_regions"]


class Observers:
    """The observers of one cache. Without any, each call returns at once and builds nothing.

    are_there: whether there are any, for callers in a hurry. The observers lie in a tuple that is replaced, never
    changed: a thread that notifies them goes on undisturbed.
    """

    def __init__(self, layout: BlockLayout, lock: Owned) -> None:
        self._lock = lock
        self._layout = layout
        self._observers: tuple[CacheObserver, ...] = ()
        self.are_there: bool = False

    def add(self, observer: CacheObserver) -> None:
        """Tell this one too from now on; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        self._observers = (*self._observers, observer)
        self.are_there = True

    def remove(self, observer: CacheObserver) -> None:
        """Tell it no more; the caller holds the cache's lock. No error if it was not there."""
        assert self._lock.is_owned()
        self._observers = tuple(each for each in self._observers if each is not observer)
        self.are_there = bool(self._observers)

    def memory(self, region: MemoryRegion) -> None:
        """Tell of memory that is held from now on; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        for observer in self._observers:
            observer.on_memory(region)

    def block(
        self,
        kind: EventKind,
        tier: Tier | None,
        block: NamedBlock,
        *,
        slot: int | None = None,
        reason: str = "",
        moved_from: int | None = None,
    ) -> None:
        """Tell what happened to a block; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        if not self._observers:
            return
        event = self.event(kind, tier, block, slot=slot, reason=reason, moved_from=moved_from)
        for observer in self._observers:
            observer.on_block(event)

    def event(
        self,
        kind: EventKind,
        tier: Tier | None,
        block: NamedBlock,
        *,
        slot: int | None = None,
        reason: str = "",
        moved_from: int | None = None,
    ) -> BlockEvent:
        """Return the event without telling anybody."""
        num_tokens = len(block.token_bytes) // TOKEN_BYTES
        return BlockEvent(
            kind,
            tier,
            block.block_hash,
            block.parent_hash,
            num_tokens,
            self._layout.packed_bytes(num_tokens),
            slot,
            reason,
            moved_from,
        )

    def request(
        self,
        num_tokens: int,
        hit_tokens: Mapping[Tier, int],
        hot: Iterable[Entry],
        hits: Iterable[Hit],
        missed: Iterable[tuple[BlockName, MissReason]],
        *,
        later: Sequence[Hit],
        hot_blocks: int,
    ) -> None:
        """Tell what a request found, hot and else, and what it missed; the caller holds the cache's lock.

        later: what lies between, and comes up behind the request.
        """
        assert self._lock.is_owned()
        found = [self.event(EventKind.HIT, Tier.HOT, entry, slot=entry.block_id) for entry in hot]
        found += (self.event(EventKind.HIT, hit.tier, hit, slot=_slot_of(hit)) for hit in hits)
        lost = self._misses(missed)
        asked = (*(each.block_hash for each in found), *(hit.block_hash for hit in later))
        asked += tuple(each.block_hash for each in lost)
        self._notify(RequestEvent(num_tokens, hit_tokens, (*found, *lost), asked, hot_blocks))

    def rest_of_request(
        self,
        hit_tokens: Mapping[Tier, int],
        hits: Iterable[Hit],
        missed: Iterable[tuple[BlockName, MissReason]],
        *,
        hot_blocks: int,
    ) -> None:
        """Tell what became of the blocks that came up behind a request; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        found = [self.event(EventKind.HIT, hit.tier, hit, slot=_slot_of(hit)) for hit in hits]
        self._notify(RequestEvent(0, hit_tokens, (*self._misses(missed), *found), (), hot_blocks))

    def _misses(self, missed: Iterable[tuple[BlockName, MissReason]]) -> list[BlockEvent]:
        """Return an event for each miss; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        return [self.event(EventKind.MISS, None, block, reason=reason.value) for block, reason in missed]

    def _notify(self, event: RequestEvent) -> None:
        """Tell of a request; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        for observer in self._observers:
            observer.on_request(event)

    def use(self, block_ids: Sequence[int]) -> None:
        """Tell that a step of a sequence read these hot blocks."""
        for observer in self._observers:
            observer.on_use(block_ids)

    @contextmanager
    def span(self, name: str) -> Iterator[dict[str, int | float | str]]:
        """Time the work inside, if anybody wants to know; the caller may add detail to what is yielded."""
        detail: dict[str, int | float | str] = {}
        if not self._observers:
            yield detail
            return
        started = time.monotonic()
        try:
            yield detail
        finally:
            span = Span(name, started, time.monotonic(), threading.current_thread().name, detail)
            for observer in self._observers:
                observer.on_span(span)


def pool_regions(
    hot: HotPool, warm: WarmPool, staging: WarmPool | None, *, reserved: Sequence[int]
) -> Iterator[MemoryRegion]:
    """Yield the memory that a cache holds, what contains others first.

    staging: raw blocks in work, where the warm tier is compressed. reserved: slots of that, or else of the warm pool,
    which belong to the write thread.
    """
    device, dtype = str(hot.device), hot.layout.dtype
    address, size = hot.blocks.data_ptr(), hot.layout.block_bytes
    yield MemoryRegion(
        purpose="hot pool",
        shape=tuple(hot.blocks.shape),
        dtype=dtype,
        num_bytes=hot.blocks.nbytes,
        address=address,
        device=device,
        tier=Tier.HOT,
        slot_bytes=size,
    )
    yield MemoryRegion(
        purpose="scratch block",
        shape=tuple(hot.blocks.shape[1:]),
        dtype=dtype,
        num_bytes=size,
        address=address + hot.scratch_block * size,
        device=device,
        part_of="hot pool",
    )
    yield _slab(warm, "warm pool", Tier.WARM)
    if staging:
        yield _slab(staging, "staging pool", None)
    slab, name = (staging, "staging pool") if staging else (warm, "warm pool")
    yield MemoryRegion(
        purpose="write thread's slots",
        shape=(len(reserved), slab.stride_bytes),
        dtype="uint8",
        num_bytes=len(reserved) * slab.stride_bytes,
        address=slab.address + min(reserved) * slab.stride_bytes,
        device="cpu",
        part_of=name,
    )


def _slab(pool: WarmPool, purpose: str, tier: Tier | None) -> MemoryRegion:
    return MemoryRegion(
        purpose=purpose,
        shape=(pool.num_slots, pool.stride_bytes),
        dtype="uint8",
        num_bytes=pool.slab_bytes,
        address=pool.address,
        device="cpu",
        tier=tier,
        slot_bytes=pool.stride_bytes,
    )


def _slot_of(hit: Hit) -> int | None:
    return hit.entry.place(hit.tier) if hit.entry and hit.tier is not Tier.COLD else None
