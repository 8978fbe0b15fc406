"""The one place from which a cache's observers are called."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tierkv.index.index import Entry
from tierkv.storage.outcomes import MissReason
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

__all__ = ["Observers"]


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

    def add(self, observer: CacheObserver, regions: Iterable[MemoryRegion], entries: Iterable[Entry]) -> None:
        """Notify an observer of the memory and the blocks that are there, and from now on of all that happens.

        The caller holds the cache's lock.
        """
        assert self._lock.is_owned()
        for region in regions:
            observer.on_memory(region)
        for entry in sorted(entries, key=lambda each: each.depth):  # parents first
            for tier in (Tier.HOT, Tier.WARM):
                if (slot := entry.place(tier)) is not None:
                    observer.on_block(self.event(EventKind.REGISTER, tier, entry, slot=slot))
        self._observers = (*self._observers, observer)
        self.are_there = True

    def remove(self, observer: CacheObserver) -> None:
        """Notify an observer no more; the caller holds the cache's lock. No error if it was not there."""
        assert self._lock.is_owned()
        self._observers = tuple(each for each in self._observers if each is not observer)
        self.are_there = bool(self._observers)

    def memory(self, region: MemoryRegion) -> None:
        """Notify of memory that is held from now on; the caller holds the cache's lock."""
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
        """Notify of what happened to a block; the caller holds the cache's lock."""
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
        """Return the event of a block; notifies no observer."""
        num_tokens = len(block.token_bytes) // TOKEN_BYTES
        num_bytes = self._layout.token_bytes * num_tokens
        named = block.block_hash, block.parent_hash
        return BlockEvent(kind, tier, *named, num_tokens, num_bytes, slot, reason, moved_from)

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
        """Notify of a request: what it found, in the hot tier and in others, and what it missed.

        later: cold blocks between the two, which load in the background. The caller holds the cache's lock.
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
        """Notify of what became of a request's cold blocks that loaded in the background.

        The caller holds the cache's lock.
        """
        assert self._lock.is_owned()
        found = [self.event(EventKind.HIT, hit.tier, hit, slot=_slot_of(hit)) for hit in hits]
        self._notify(RequestEvent(0, hit_tokens, (*self._misses(missed), *found), (), hot_blocks))

    def _misses(self, missed: Iterable[tuple[BlockName, MissReason]]) -> list[BlockEvent]:
        """Return an event for each miss; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        return [self.event(EventKind.MISS, None, block, reason=reason.value) for block, reason in missed]

    def _notify(self, event: RequestEvent) -> None:
        """Notify of a request; the caller holds the cache's lock."""
        assert self._lock.is_owned()
        for observer in self._observers:
            observer.on_request(event)

    def use(self, block_ids: Sequence[int]) -> None:
        """Notify that a step of a sequence read these hot blocks."""
        for observer in self._observers:
            observer.on_use(block_ids)

    @contextmanager
    def span(self, name: str) -> Iterator[dict[str, int | float | str]]:
        """Time the work inside; the caller may add detail to what is yielded."""
        detail: dict[str, int | float | str] = {}
        started = time.monotonic()
        try:
            yield detail
        finally:
            span = Span(name, started, time.monotonic(), threading.current_thread().name, detail)
            for observer in self._observers:
                observer.on_span(span)


def _slot_of(hit: Hit) -> int | None:
    return hit.entry.place(hit.tier) if hit.entry and hit.tier is not Tier.COLD else None
