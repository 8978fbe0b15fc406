"""SharedSlab: how blocks of different sizes share the daemon's one slab.

The slab is cut into extents. Blocks of one stride form a size class. Its slots are a grid over the whole slab: slot k
is bytes [k * stride, (k + 1) * stride). A slot is usable while every extent that it touches belongs to its class. So a
slot's number gives its place, for every class, and a client maps the slab once.

An extent is given to the class that needs it. When all are given, it is taken from another class that has more than its
share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.size_class import SizeClass
from tierkv.errors import CapacityError
from tierkv.policies import EvictionPolicy

__all__ = ["EXTENT_BYTES", "SharedSlab"]

EXTENT_BYTES = 64 << 20
_MIN_EXTENTS = 16
_PAGE_BYTES = 4096


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
