"""A fixed set of numbered places for blocks: the hot pool's block ids, the warm pool's slots."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from tierkv.errors import CapacityError

__all__ = ["SlotPool"]

Owner = TypeVar("Owner")


class SlotPool(Generic[Owner]):
    """Free list and reference counts of `capacity` places; knows nothing of bytes.

    A place is free, or in use with a reference count above zero, or cached: count zero and owned by an
    index entry, so that it may be evicted. The lowest free ids go first, so that what is allocated together
    tends to lie together and copies of neighbours coalesce.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.owners: list[Owner | None] = [None] * capacity
        self._pins = [0] * capacity
        self._is_free = [True] * capacity
        self._free = list(range(capacity))

    @property
    def free_count(self) -> int:
        """Places that can be allocated without evicting."""
        return len(self._free)

    @property
    def used_count(self) -> int:
        """Places that are in use or cached."""
        return self.capacity - len(self._free)

    @property
    def referenced_count(self) -> int:
        """Places with a live user; linear in the number of places."""
        return self.capacity - self._pins.count(0)

    def allocate(self, count: int) -> list[int]:
        """Return `count` places, each with a reference count of one. Raises CapacityError, taking none."""
        if count > len(self._free):
            raise CapacityError(f"{count} blocks asked for, {len(self._free)} of {self.capacity} are free")
        slots = [heapq.heappop(self._free) for _ in range(count)]
        for slot in slots:
            self._is_free[slot] = False
            self._pins[slot] = 1
        return slots

    def pin(self, slot: int) -> None:
        """Raise the reference count: one more live user."""
        assert not self._is_free[slot], f"slot {slot} is free"
        self._pins[slot] += 1

    def unpin(self, slot: int) -> bool:
        """Lower the reference count; a place without owner is freed at zero. Return whether it reached zero."""
        assert self._pins[slot] > 0, f"slot {slot} is not pinned"
        self._pins[slot] -= 1
        if self._pins[slot]:
            return False
        if self.owners[slot] is None:
            self._release(slot)
        return True

    def reference_count(self, slot: int) -> int:
        """Return the number of live users."""
        return self._pins[slot]

    def own(self, slot: int, owner: Owner) -> None:
        """Say whose cached bytes lie there; the place survives a reference count of zero."""
        assert not self._is_free[slot] and self.owners[slot] is None, f"slot {slot} cannot be owned"
        self.owners[slot] = owner

    def disown(self, slot: int) -> None:
        """Forget the owner; the place is freed now, or when its last user unpins it."""
        assert self.owners[slot] is not None, f"slot {slot} has no owner"
        self.owners[slot] = None
        if self._pins[slot] == 0:
            self._release(slot)

    def free_runs(self) -> list[int]:
        """Return the lengths of the runs of neighbouring free places, in order of position."""
        runs: list[int] = []
        length = 0
        for is_free in self._is_free:
            if is_free:
                length += 1
            elif length:
                runs.append(length)
                length = 0
        return [*runs, length] if length else runs

    def check(self) -> None:
        """Raise AssertionError unless every place is exactly one of free, in use, cached."""
        assert sorted(self._free) == [slot for slot in range(self.capacity) if self._is_free[slot]]
        for slot in range(self.capacity):
            held = self._pins[slot] > 0 or self.owners[slot] is not None
            assert self._is_free[slot] != held, f"slot {slot} is leaked or used twice"
            assert self._pins[slot] >= 0

    def _release(self, slot: int) -> None:
        self._is_free[slot] = True
        heapq.heappush(self._free, slot)
