"""SharedSlab: how blocks of different sizes share the daemon's one slab.

The slab is cut into extents. Blocks of one stride form a size class. Its slots are a grid over the whole slab: slot k
is bytes [k * stride, (k + 1) * stride). A slot is usable while every extent that it touches belongs to its class. So a
slot's number gives its place, for every class, and a client maps the slab once.

An extent is given to the class that needs it. When all are given, it is taken from another class that has more than its
share.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

from tierkv.daemon.lease_flags import LeaseFlags
from tierkv.daemon.limits import Limits
from tierkv.errors import CapacityError
from tierkv.index.chosen_eviction import ChosenEviction
from tierkv.index.index import Entry, Index
from tierkv.policies import EvictionPolicy
from tierkv.values.block import BlockHash, Tier

__all__ = ["EXTENT_BYTES", "Chooser", "Forgotten", "SharedSlab", "SizeClass"]

EXTENT_BYTES = 64 << 20
_MIN_EXTENTS = 16
_PAGE_BYTES = 4096
_SPARE_SHARE = 0.05  # evicted ahead of need, so that a writer seldom waits
_ROOT: BlockHash = bytes(16)

Forgotten = Callable[[int], None]
"""Called with each slot whose block was evicted."""


Chooser = Callable[[], Callable[[int], bool]]
"""Returns a new function that says whether the block in a slot may be evicted."""


class SizeClass:
    """Slots of one stride and the index of the blocks in them.

    One index serves every namespace of that block size: a namespace has an entry without bytes under the root, which
    is the parent of its first blocks. So the eviction policy ranks all of them together.
    """

    def __init__(
        self,
        slab: SharedSlab,
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


class SharedSlab:
    """Assigns the extents of a slab of `size_bytes` to size classes.

    may_lose: returns whether a class may lose the blocks in these slots to another class.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        make_policy: Callable[[], EvictionPolicy],
        clock: Callable[[], float],
        forgotten: Callable[[SizeClass, int], None],
        extent_bytes: int | None = None,
        limits: Limits,
    ) -> None:
        self.size_bytes = size_bytes
        self._limits = limits
        self._dropped_evictions = 0
        small = max(_PAGE_BYTES, size_bytes // _MIN_EXTENTS // _PAGE_BYTES * _PAGE_BYTES)
        self.extent_bytes: int = extent_bytes or min(EXTENT_BYTES, small)
        self.owners: list[SizeClass | None] = [None] * (size_bytes // self.extent_bytes)
        self.classes: dict[int, SizeClass] = {}
        self._make_policy = make_policy
        self._clock = clock
        self._forgotten = forgotten
        self.may_lose: Callable[[SizeClass, Sequence[int]], bool] = lambda size_class, slots: True

    @property
    def has_unassigned(self) -> bool:
        """Whether some extent belongs to no class yet."""
        return None in self.owners

    @property
    def free_bytes(self) -> int:
        """Bytes without a block: extents without a class, and free slots."""
        unassigned = self.owners.count(None) * self.extent_bytes
        return unassigned + sum(each.free_count * each.stride_bytes for each in self.classes.values())

    def class_of(self, stride_bytes: int) -> SizeClass:
        """Return the class of blocks of that stride, made if need be. Raises CapacityError if that is not possible."""
        if stride_bytes > len(self.owners) * self.extent_bytes:
            raise CapacityError(
                f"a block of {stride_bytes} bytes does not fit the daemon's slab of {self.size_bytes}",
                hint="start the daemon with a larger --warm",
            )
        found = self.classes.get(stride_bytes)
        if found is None:
            if not self.has_room_for_class(stride_bytes):
                raise CapacityError(
                    f"the daemon serves {len(self.classes)} sizes of blocks already, all of them in use",
                    hint="close clients that use another block size",
                )
            found = SizeClass(
                self,
                stride_bytes,
                policy=self._make_policy(),
                clock=self._clock,
                forgotten=lambda slot: self._forgotten(self.classes[stride_bytes], slot),
            )
            self.classes[stride_bytes] = found
        return found

    def has_room_for_class(self, stride_bytes: int) -> bool:
        """Return whether blocks of that stride have a class, or may get one."""
        if stride_bytes in self.classes:
            return True
        num_slots = self.num_slots + self.slots_of(stride_bytes)
        return len(self.classes) < self._limits.block_sizes and num_slots <= self._limits.slots

    @property
    def evictions(self) -> int:
        """Blocks that were evicted so far, those of classes that were dropped too."""
        return self._dropped_evictions + sum(each.evictions for each in self.classes.values())

    @property
    def num_slots(self) -> int:
        """Slots of all classes, usable or not: each takes memory in an index."""
        return sum(each.num_slots for each in self.classes.values())

    def slots_of(self, stride_bytes: int) -> int:
        """Return how many slots a class of that stride has."""
        return min(self.size_bytes // stride_bytes, self._limits.slots_of_block_size)

    def drop_class(self, size_class: SizeClass) -> None:
        """Remove an unused class without blocks. Its extents belong to no class again."""
        pool = size_class.index.warm
        assert not any(pool.owners) and pool.used_count == size_class.num_slots - size_class.num_usable
        del self.classes[size_class.stride_bytes]
        self._dropped_evictions += size_class.evictions
        if size_class.flags:
            size_class.flags.close()
            size_class.flags = None
        self.owners = [None if owner is size_class else owner for owner in self.owners]

    def grow(self, wanting: SizeClass) -> bool:
        """Give a class at least one more slot, of free extents or those of a class with too many. False if none."""
        return self._assign(wanting) or (self._reclaim(wanting) and self._assign(wanting))

    def _assign(self, wanting: SizeClass) -> bool:
        for extent, owner in enumerate(self.owners):
            if owner is not None:
                continue
            for slot in self._slots_touching(wanting, extent):
                touched = self._extents_of(wanting, slot)
                if touched and all(self.owners[each] in (None, wanting) for each in touched):
                    fresh = [each for each in touched if self.owners[each] is None]
                    for each in fresh:
                        self.owners[each] = wanting
                    return wanting.add(self._usable_in(wanting, fresh)) > 0
        return False

    def _reclaim(self, wanting: SizeClass) -> bool:
        """Free the extents of one slot, of larger classes, for a class that has less than its share."""
        share = len(self.owners) // len(self.classes)
        mine = self.owners.count(wanting)
        for extent in range(len(self.owners) - 1, -1, -1):
            touching = self._slots_touching(wanting, extent)
            for slot in {*touching[:2], *touching[-1:]}:  # one that straddles a border, one that does not
                span = self._extents_of(wanting, slot)
                losers = {self.owners[each] for each in span} - {None, wanting}
                num_more = sum(self.owners[each] is not wanting for each in span)
                is_fair = mine + num_more <= max(share, len(span))
                if losers and is_fair and all(loser is not None and self._clear(loser, span) for loser in losers):
                    return True
        return False

    def _clear(self, loser: SizeClass, span: range) -> bool:
        ours = [each for each in span if self.owners[each] is loser]
        slots = sorted({slot for each in ours for slot in self._slots_touching(loser, each)})
        if not loser.clear(slots):
            return False
        for each in ours:
            self.owners[each] = None
        return True

    def _slots_touching(self, size_class: SizeClass, extent: int) -> range:
        start, end = extent * self.extent_bytes, (extent + 1) * self.extent_bytes
        first, last = start // size_class.stride_bytes, (end - 1) // size_class.stride_bytes
        return range(first, min(last + 1, size_class.num_slots))

    def _extents_of(self, size_class: SizeClass, slot: int) -> range:
        start = slot * size_class.stride_bytes
        last = (start + size_class.stride_bytes - 1) // self.extent_bytes
        return range(start // self.extent_bytes, last + 1) if last < len(self.owners) else range(0)

    def _usable_in(self, size_class: SizeClass, extents: Iterable[int]) -> list[int]:
        """Return the slots that touch these extents, and touch only extents of the class."""
        slots = {slot for extent in extents for slot in self._slots_touching(size_class, extent)}
        return [
            slot
            for slot in sorted(slots)
            if (touched := self._extents_of(size_class, slot))
            and all(self.owners[each] is size_class for each in touched)
        ]
