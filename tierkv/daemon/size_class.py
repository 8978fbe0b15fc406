"""SizeClass: the daemon's blocks of one stride, and the index of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from tierkv.daemon.lease_flags import LeaseFlags
from tierkv.index.chosen_eviction import ChosenEviction
from tierkv.index.index import Entry, Index
from tierkv.policies import EvictionPolicy
from tierkv.values.block import BlockHash, Tier

__all__ = ["Chooser", "Forgotten", "SizeClass", "SlabOwner"]

_SPARE_SHARE = 0.05  # evicted ahead of need, so that a writer seldom waits
_ROOT: BlockHash = bytes(16)

Forgotten = Callable[[int], None]
"""Called with each slot whose block was evicted."""

Chooser = Callable[[], Callable[[int], bool]]
"""Returns a new function that says whether the block in a slot may be evicted."""


class SlabOwner(Protocol):
    """The slab as a size class sees it; see SharedSlab."""

    may_lose: Callable[[SizeClass, Sequence[int]], bool]

    @property
    def has_unassigned(self) -> bool: ...
    def slots_of(self, stride_bytes: int) -> int: ...
    def grow(self, wanting: SizeClass) -> bool: ...


class SizeClass:
    """Slots of one stride and the index of the blocks in them.

    One index serves every namespace of that block size: a namespace has an entry without bytes under the root, which
    is the parent of its first blocks. So the eviction policy ranks all of them together.
    """

    def __init__(
        self,
        slab: SlabOwner,
        stride_bytes: int,
        *,
        policy: EvictionPolicy,
        clock: Callable[[], float],
        forgotten: Forgotten,
    ) -> None:
        self.slab = slab
        self.stride_bytes = stride_bytes
        self.num_slots: int = slab.slots_of(stride_bytes)
        self.index: Index = Index(root=_ROOT, num_hot=0, num_warm=self.num_slots, policy=policy, clock=clock)
        self.evictions: int = 0
        self.num_reserved = 0  # changed by `Reservations`
        self._forgotten = forgotten
        self._is_unusable = bytearray(b"\1" * self.num_slots)  # an extent of the slot is not of this class
        self.num_usable: int = 0
        self.index.warm.take(range(self.num_slots))
        self.chosen: ChosenEviction = ChosenEviction(
            self.index,
            (Tier.WARM,),
            lambda entries, _: self._evict_entries(entries),
            on_mark=self._renew,
            batch=self._ending,
        )
        self._ended: frozenset[int] = frozenset()  # slots that no client can lease by a flag until the loop's next turn
        self.flags: LeaseFlags | None = None
        self.flagged: set[int] = set()  # slots that a client has leased by its flag, pinned for that

    @property
    def free_count(self) -> int:
        """Slots that can be taken without evicting or growing."""
        return self.index.warm.free_count

    def root_of(self, root_hash: BlockHash) -> Entry:
        """Return the entry of a namespace, made if need be. Its first blocks are its children."""
        entry = self.index.insert(root_hash, _ROOT, root_hash)  # children of a parent differ in their token ids
        assert entry is not None, "a block has the hash of a namespace's root"
        return entry

    def take(self, count: int, chooser: Chooser | None = None) -> list[int]:
        """Return up to `count` slots, each pinned once: free ones, then new ones, then evicted ones.

        chooser: as for `evict_some`; None for any block.
        """
        pool = self.index.warm
        while pool.free_count < count and self.slab.grow(self):
            pass
        if pool.free_count < count:
            self.evict_some(count - pool.free_count, chooser)
        return pool.allocate(min(count, pool.free_count))

    def evict(self, count: int, is_chosen: Callable[[int], bool] | None = None) -> int:
        """Evict up to `count` blocks, only those whose slots are chosen; return how many were evicted."""
        count = min(count, self.num_slots)
        wanted = count if is_chosen is None else self.num_slots
        self.unpin_unflagged()
        num_evicted = 0
        while num_evicted < count:
            slots: dict[Entry, int] = {}
            for entry in self.index.select_evictions(Tier.WARM, wanted - num_evicted):
                slot = entry.warm_slot
                if slot is not None and len(slots) < count - num_evicted and (is_chosen is None or is_chosen(slot)):
                    slots[entry] = slot
            num_flagged = len(self.flagged)
            num_evicted += self._evict(slots)
            if len(self.flagged) == num_flagged:  # else other blocks may go in place of those that turned out leased
                break
        return num_evicted

    def evict_some(self, count: int, chooser: Chooser | None) -> int:
        """Evict up to `count` blocks, the first in the policy's order that are chosen; return how many were evicted.

        chooser: returns a function that is asked for slots in that order, and may remember what it chose.
        """
        if chooser is None:
            return self.evict(count)
        self.unpin_unflagged()
        wanted = left = count = min(count, self.num_slots)
        while True:
            is_chosen, slots = chooser(), dict[Entry, int]()
            entries = self.index.select_evictions(Tier.WARM, wanted)
            for entry in entries:
                slot = entry.warm_slot
                if slot is not None and len(slots) < left and is_chosen(slot):
                    slots[entry] = slot
            if len(slots) < left and len(entries) >= wanted and wanted < self.num_slots:
                wanted = min(4 * wanted, self.num_slots)
                continue
            num_flagged = len(self.flagged)
            left -= self._evict(slots)
            if not left or len(self.flagged) == num_flagged:  # else other blocks may go in place of the leased ones
                return count - left

    def trim(self, chooser: Chooser | None = None) -> int:
        """Keep a small share of the slots free where the slab is full; return how many blocks were evicted."""
        self.unpin_unflagged()
        wanted = int(self.num_usable * _SPARE_SHARE)
        if self.slab.has_unassigned or self.free_count >= wanted:
            return 0
        return self.evict_some(wanted - self.free_count, chooser)

    def add(self, slots: Iterable[int]) -> int:
        """Make slots usable; return how many of them were not."""
        added = 0
        for slot in slots:
            if self._is_unusable[slot]:
                self._is_unusable[slot] = 0
                self.index.warm.unpin(slot)
                added += 1
        self.num_usable += added
        return added

    def clear(self, slots: Iterable[int]) -> bool:
        """Make slots unusable; evict their blocks with all descendants. False, if one of them is in use."""
        self.unpin_unflagged()
        ours = [slot for slot in slots if not self._is_unusable[slot]]
        pool = self.index.warm
        if not all(owner is None or self._evict_subtree(owner) for owner in (pool.owners[slot] for slot in ours)):
            return False
        if any(pool.reference_count(slot) for slot in ours):
            return False
        pool.take(ours)
        for slot in ours:
            self._is_unusable[slot] = 1
        self.num_usable -= len(ours)
        return True

    def open_flags(self) -> LeaseFlags | None:
        """Return the lease flags of the slots, made at the first call; None where the system has no way to use them."""
        if self.flags is None:
            self.flags = LeaseFlags.open(self.num_slots)
        return self.flags

    def unpin_unflagged(self) -> None:
        """Unpin the slots whose flags the clients have cleared since an eviction found them."""
        if self.flags and self.flagged:
            ended = self.flagged - self.flags.flagged_of(list(self.flagged))
            self.flagged -= ended
            self.index.unpin_all(Tier.WARM, list(ended))

    def _renew(self, entry: Entry) -> None:
        """Keep clients from leasing a block by their flags that may not be found any more, and those that follow it."""
        pending = [entry]
        for each in pending:  # the list grows in the loop
            pending += each.children
        if self.flags:
            self.flags.renew([each.warm_slot for each in pending if each.warm_slot is not None])

    def is_usable(self, slot: int) -> bool:
        """Return whether a slot exists and is usable."""
        return 0 <= slot < self.num_slots and not self._is_unusable[slot]

    def _evict(self, slots: dict[Entry, int]) -> int:
        """Evict entries, children before parents. A parent stays with its child. Return how many were evicted.

        Blocks that a client has leased by its flag stay, and are pinned until it clears that.
        """
        if leased := self._end_flags(slot for slot in slots.values() if slot not in self._ended):
            slots = {entry: slot for entry, slot in slots.items() if slot not in leased}
        evicted = self.index.evict(slots, Tier.WARM)
        for entry in evicted:
            self._forgotten(slots[entry])
        self.evictions += len(evicted)
        return len(evicted)

    def _end_flags(self, slots: Iterable[int]) -> set[int]:
        """Keep clients from leasing slots by their flags. Return those that are leased so, each pinned."""
        leased = self.flags.try_end(slots) if self.flags else set()
        for slot in leased - self.flagged:
            self.index.warm.pin(slot)
        self.flagged |= leased
        return leased

    @contextlib.contextmanager
    def _ending(self, entries: Sequence[Entry]) -> Iterator[None]:
        """End the flags of blocks that are evicted one by one: a barrier for each takes longer than the rest."""
        pins = self.index.warm.pins
        slots = [slot for entry in entries if (slot := entry.warm_slot) is not None and not pins[slot]]
        self._ended = frozenset(slots) - self._end_flags(slots)
        try:
            yield
        finally:
            self._ended = frozenset()

    def _evict_entries(self, entries: Sequence[Entry]) -> Sequence[Entry]:
        slots = {entry: entry.warm_slot for entry in entries if entry.warm_slot is not None}
        return entries if self._evict(slots) else ()

    def _evict_subtree(self, entry: Entry) -> bool:
        pending, order = [entry], []
        while pending:
            each = pending.pop()
            order.append(each)
            pending += each.children
        slots = {each: each.warm_slot for each in reversed(order) if each.warm_slot is not None}
        if any(each.pinned or self.index.warm.reference_count(slot) for each, slot in slots.items()):
            return False
        if not self.slab.may_lose(self, list(slots.values())):
            return False
        self._evict(slots)
        return all(each.warm_slot is None for each in slots)  # a client may have leased one by its flag
