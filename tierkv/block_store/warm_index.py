"""Which blocks lie in which warm slots, least recently used first. It holds no bytes."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from tierkv.block_store.keys import BlockKey
from tierkv.index.slots import SlotPool
from tierkv.movers.ready import Ready
from tierkv.values.block import BlockHash
from tierkv.values.locks import Owned

__all__ = ["WarmEntry", "WarmIndex"]


class WarmEntry:
    """One block in a warm slot. written: when its bytes are there. pinned_until: by the clock; it stays until then."""

    __slots__ = ("key", "pinned_until", "slot", "written")

    def __init__(self, key: BlockKey, slot: int, written: Ready) -> None:
        self.key: BlockKey = key
        self.slot: int = slot
        self.written: Ready = written
        self.pinned_until: float = -math.inf


class WarmIndex:
    """The blocks of the warm memory. The caller of every method holds the lock.

    A chain is touched from its end, so its last block is the least recently used, and goes first. Unlike the tree of a
    TierCache it needs no parents: an engine saves and loads the end of a chain alone.
    num_evicted: blocks that made room for others, so far.
    """

    def __init__(self, num_slots: int, clock: Callable[[], float], lock: Owned) -> None:
        self.slots: SlotPool[WarmEntry] = SlotPool(num_slots)
        self.num_evicted: int = 0
        self._lock = lock
        self._clock = clock
        self._entries: OrderedDict[BlockHash, WarmEntry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: BlockKey) -> WarmEntry | None:
        """Return the entry of exactly this block; None if it is unknown, and on a hash collision."""
        assert self._lock.is_owned()
        entry = self._entries.get(key.block_hash)
        return entry if entry is not None and entry.key == key else None

    def collides(self, key: BlockKey) -> bool:
        """Return whether another block has this block's hash."""
        assert self._lock.is_owned()
        entry = self._entries.get(key.block_hash)
        return entry is not None and entry.key != key

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Record a use of a chain's blocks."""
        assert self._lock.is_owned()
        entries = self._entries
        for key in reversed(keys):
            if key.block_hash in entries:
                entries.move_to_end(key.block_hash)

    def take(self, count: int) -> list[int]:
        """Return up to `count` slots, each pinned once, evicting if need be; perhaps none."""
        assert self._lock.is_owned()
        pool = self.slots
        if pool.free_count < count:
            self._evict(count - pool.free_count)
        return pool.allocate(min(count, pool.free_count))

    def add(self, key: BlockKey, slot: int, written: Ready) -> WarmEntry:
        """Record that a slot, which the caller has pinned, holds a block that is not known yet."""
        assert self._lock.is_owned()
        assert key.block_hash not in self._entries, "a block has one slot"
        entry = self._entries[key.block_hash] = WarmEntry(key, slot, written)
        self.slots.own(slot, entry)
        return entry

    def withdraw(self, entry: WarmEntry) -> None:
        """Forget a block whose slot the caller has pinned, and keep the slot: it has no owner any more."""
        assert self._lock.is_owned()
        del self._entries[entry.key.block_hash]
        self.slots.disown_all([entry.slot])

    def unpin(self, slots: Iterable[int]) -> None:
        """Lower the reference counts of slots; one without a block is free then."""
        assert self._lock.is_owned()
        self.slots.unpin_all(list(slots))

    def set_pinned(self, keys: Iterable[BlockKey], until: float) -> int:
        """Keep blocks until a time of the clock, or let them be evicted again. Return how many are here."""
        assert self._lock.is_owned()
        found = [entry for entry in map(self.get, keys) if entry]
        for entry in found:
            entry.pinned_until = until
        return len(found)

    def clear(self) -> int:
        """Forget all blocks, those in use with their last user. Return how many those were."""
        assert self._lock.is_owned()
        count = len(self._entries)
        self.slots.disown_all([entry.slot for entry in self._entries.values()])
        self._entries.clear()
        return count

    def _evict(self, count: int) -> None:
        now, pool = self._clock(), self.slots
        chosen: list[WarmEntry] = []
        for entry in self._entries.values():  # the least recently used first
            if len(chosen) >= count:
                break
            if not pool.reference_count(entry.slot) and entry.pinned_until <= now:
                chosen.append(entry)
        pool.disown_all([entry.slot for entry in chosen])
        for entry in chosen:
            del self._entries[entry.key.block_hash]
        self.num_evicted += len(chosen)
