"""A fixed set of numbered places for blocks: the block ids of the hot pool, the slots of the warm pool."""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from tierkv.errors import CapacityError
from tierkv.values.untracked import untrack

__all__ = ["SlotPool"]

Owner = TypeVar("Owner")


class SlotPool(Generic[Owner]):
    """Free list, reference counts and owners of `capacity` places; it holds no bytes.

    A place is free, in use (its reference count is above zero), or cached (count zero, and an owner: it may be
    evicted). The lowest free places are allocated first, so that blocks of one request tend to lie side by side and
    their copies coalesce. Places from `_unused` on were never used: they are counted, not listed.

    numbers: ints to name the places by, at least `capacity`; two pools can share them to save memory.
    owners, pins: owner and reference count by place. Only the pool changes them.
    limit: how many places may be in use or cached; `set_limit` changes it. peak_count: the most that ever were.
    """

    def __init__(self, capacity: int, numbers: Sequence[int] | None = None) -> None:
        self.capacity = capacity
        self._numbers = range(capacity) if numbers is None else numbers
        self.limit: int = capacity
        self.peak_count: int = 0
        self.owners: list[Owner | None] = [None] * capacity
        self.pins: array[int] = array("i", bytes(4 * capacity))
        self._freed: list[int] = []
        untrack(self.owners)
        untrack(self._freed)
        self._unused = 0
        self._referenced = 0

    @property
    def free_count(self) -> int:
        """Places that can be allocated without an eviction; 0 above the limit."""
        return max(0, self.limit - self.used_count)

    @property
    def excess_count(self) -> int:
        """Places above the limit, to be evicted."""
        return max(0, self.used_count - self.limit)

    @property
    def idle_count(self) -> int:
        """Places that are cached and not in use."""
        return self.used_count - self.referenced_count

    @property
    def used_count(self) -> int:
        """Places that are in use or cached."""
        return self._unused - len(self._freed)

    @property
    def referenced_count(self) -> int:
        """Places with a live user."""
        return self._referenced

    def set_limit(self, limit: int) -> None:
        """Change the limit. Places above it stay until they are evicted or freed."""
        assert 0 <= limit <= self.capacity, f"a limit of {limit} in a pool of {self.capacity}"
        self.limit = limit

    def allocate(self, count: int) -> list[int]:
        """Return `count` places, each with a reference count of one. Raises CapacityError, taking none."""
        if count > self.free_count:
            raise CapacityError(f"{count} blocks requested, {self.free_count} of {self.limit} are free")
        freed = self._freed
        if count < len(freed) // 8:
            slots = [heapq.heappop(freed) for _ in range(count)]
        else:  # cheaper for many at once; a sorted list is a heap
            freed.sort()
            slots = freed[:count]
            del freed[:count]
        missing = count - len(slots)
        slots.extend(self._numbers[self._unused : self._unused + missing])
        self._unused += missing
        self.peak_count = max(self.peak_count, self.used_count)
        pins = self.pins
        for slot in slots:
            pins[slot] = 1
        self._referenced += count
        return slots

    def take(self, slots: Iterable[int]) -> None:
        """Allocate these places, which must be free; linear in the number of free places."""
        chosen = set(slots)
        assert all(self._is_free(slot) for slot in chosen), "only free places can be taken"
        end = max(self._unused, max(chosen, default=-1) + 1)
        self._freed[:] = [slot for slot in (*self._freed, *range(self._unused, end)) if slot not in chosen]
        heapq.heapify(self._freed)
        self._unused = end
        self.peak_count = max(self.peak_count, self.used_count)
        for slot in chosen:
            self.pins[slot] = 1
        self._referenced += len(chosen)

    def rearrange(self, places: Mapping[int, int]) -> None:
        """Move owners and reference counts: old place -> new. Each new place is free or moves too.

        Linear in the number of places.
        """
        taken = [(new, self.owners[old], self.pins[old]) for old, new in places.items()]
        for old in places:
            self.owners[old] = None
            self.pins[old] = 0
        for new, owner, count in taken:
            assert self._is_free(new), f"two blocks in slot {new}"
            self.owners[new] = owner
            self.pins[new] = count
        self._unused = self.capacity
        used = self.used()
        self._unused = used[-1] + 1 if used else 0
        self._freed[:] = sorted(set(range(self._unused)).difference(used))  # a sorted list is a heap

    def pin(self, slot: int) -> None:
        """Raise the reference count of a place."""
        self.pin_all((slot,))

    def pin_all(self, slots: Iterable[int]) -> None:
        """Raise the reference count of several places."""
        pins, owners = self.pins, self.owners
        for slot in slots:
            count = pins[slot]
            if not count:
                assert owners[slot] is not None, f"slot {slot} is free"
                self._referenced += 1
            pins[slot] = count + 1

    def unpin(self, slot: int) -> bool:
        """Lower the reference count, as `unpin_all` does. Return whether it reached zero."""
        return self.unpin_all((slot,)) == 1

    def unpin_all(self, slots: Sequence[int], idle: list[Owner] | None = None) -> int:
        """Lower the reference count of several places. Return how many reached zero.

        A place without owner is freed at zero. idle: filled with the owners of the others that reached zero.
        """
        pins, owners = self.pins, self.owners
        num_idle = 0
        for slot in slots:
            left = pins[slot] - 1
            assert left >= 0, f"slot {slot} is not pinned"
            pins[slot] = left
            if left:
                continue
            num_idle += 1
            owner = owners[slot]
            if owner is None:
                heapq.heappush(self._freed, slot)
            elif idle is not None:
                idle.append(owner)
        self._referenced -= num_idle
        return num_idle

    def reference_count(self, slot: int) -> int:
        """Return the number of live users."""
        return self.pins[slot]

    def own(self, slot: int, owner: Owner) -> None:
        """Set the owner of a place in use; with an owner it stays cached at a reference count of zero."""
        assert self.pins[slot] and self.owners[slot] is None, f"slot {slot} cannot be owned"
        self.owners[slot] = owner

    def own_all(self, slots: Sequence[int], owners: Sequence[Owner]) -> None:
        """Set the owners of several places; see `own`."""
        pins, own = self.pins, self.owners
        for slot, owner in zip(slots, owners, strict=True):
            assert pins[slot] and own[slot] is None, f"slot {slot} cannot be owned"
            own[slot] = owner

    def disown_all(self, slots: Iterable[int | None]) -> None:
        """Forget the owners of places, none of them None. A place in use is freed when its last user unpins it."""
        owners, pins = self.owners, self.pins
        freed: list[int] = []
        for slot in slots:
            assert slot is not None and owners[slot] is not None, f"slot {slot} has no owner"
            owners[slot] = None
            if not pins[slot]:
                freed.append(slot)
        if len(freed) > len(self._freed) // 8:
            self._freed += freed
            self._freed.sort()  # cheaper for many at once; a sorted list is a heap
        else:
            for slot in freed:
                heapq.heappush(self._freed, slot)

    def free_runs(self) -> list[int]:
        """Return the lengths of the runs of neighbouring free places, in order."""
        runs: list[int] = []
        expected = -1
        for slot in sorted(self._freed):
            if slot == expected:
                runs[-1] += 1
            else:
                runs.append(1)
            expected = slot + 1
        unused = self.capacity - self._unused
        if unused and runs and expected == self._unused:
            runs[-1] += unused
        elif unused:
            runs.append(unused)
        return runs

    def fragmentation(self) -> float:
        """Return 0 if the free places are one run, and up to 1 the more they are scattered."""
        runs = self.free_runs()
        return 1 - max(runs) / sum(runs) if runs else 0.0

    def used(self) -> list[int]:
        """Return the places that are in use or cached, in order."""
        return [slot for slot in range(self._unused) if not self._is_free(slot)]

    def check(self) -> None:
        """Raise AssertionError unless every place is either free, in use or cached."""
        free = [*sorted(self._freed), *range(self._unused, self.capacity)]
        assert free == [slot for slot in range(self.capacity) if self._is_free(slot)], "a slot is leaked or used twice"
        assert all(count >= 0 for count in self.pins)
        assert 0 <= self.limit <= self.capacity

    def _is_free(self, slot: int) -> bool:
        return self.pins[slot] == 0 and self.owners[slot] is None
