"""The eviction queue of one tier: which entries may be evicted, and which of them the policy wants to go first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tierkv.index.entry import PINNED, Entry
from tierkv.index.eviction import CacheBlock, EvictionOrder, EvictionPolicy, new_order
from tierkv.index.slots import SlotPool
from tierkv.values.block import Tier

__all__ = ["EvictionQueue"]

_MIN_PUSHED = 64


class EvictionQueue:
    """The evictable entries of a tier, in the order of a policy.

    A use or a pin takes nothing out of the order. An item is outdated if its entry was used since the push, and is
    skipped while the entry is not evictable. The index pushes each entry that becomes evictable.
    """

    def __init__(self, tier: Tier, pool: SlotPool[Entry], policy: EvictionPolicy) -> None:
        self._tier = tier
        self._is_hot = tier is Tier.HOT
        self._pool = pool
        self.set_policy(policy)

    @property
    def num_pushed(self) -> int:
        """Items in the order, outdated ones included: at most twice the evictable entries and 64."""
        return len(self._order) + len(self._taken)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Order all evictable entries by another policy."""
        self._policy = policy
        self._order: EvictionOrder[CacheBlock] = new_order(policy)
        self._taken: list[Entry] = []  # by the last selection
        for owner in self._pool.owners:
            if owner is not None:
                self._order.add(owner)
                if self.is_evictable(owner):
                    self._order.push(owner, owner.access_count)
        self._most_pushed = 2 * len(self._order) + _MIN_PUSHED

    def is_evictable(self, entry: Entry) -> bool:
        """Return whether an entry is a leaf of the tier, not in use and not pinned."""
        if self._is_hot:
            slot, num_children = entry.block_id, entry.hot_children
        else:
            slot, num_children = entry.warm_slot, entry.warm_children
        return slot is not None and not num_children and not entry.pinned and not self._pool.pins[slot]

    def add(self, entry: Entry) -> None:
        """Add an entry whose bytes the tier now has."""
        self._order.add(entry)
        self.push(entry)

    def remove_all(self, entries: Sequence[Entry]) -> None:
        """Remove entries that left the tier."""
        self._order.remove_all(entries)

    def push(self, entry: Entry) -> None:
        """Push an entry, if it is evictable."""
        if self.is_evictable(entry):
            self._order.push(entry, entry.access_count)
            if self.num_pushed > self._most_pushed:
                self._drop_outdated()

    def put_back(self) -> None:
        """Push again the entries that the last selection took and the caller did not evict."""
        if self._taken:
            taken, self._taken = self._taken, []
            for entry in taken:
                if self.is_evictable(entry):
                    self._order.push(entry, entry.access_count)

    def select(self, count: int) -> list[Entry]:
        """Return up to `count` entries, children before parents, chosen by the policy. Nothing changes yet."""
        self.put_back()
        yielded: list[Entry] = []
        chosen = self._policy.select_evictions(count, self._iter_leaves(yielded))[:count]
        if self.num_pushed > self._most_pushed:
            self._drop_outdated()
        if chosen == yielded:  # the policy took all leaves in order, so each child comes before its parent
            return yielded
        selected: list[Entry] = []
        chosen_children: dict[Entry, int] = {}
        for block in chosen:
            assert isinstance(block, Entry), "a policy returns blocks that it was given"
            if block.tier_children(self._tier) == chosen_children.get(block, 0):
                selected.append(block)
                chosen_children[block.parent] = chosen_children.get(block.parent, 0) + 1
        return selected

    def check(self, entries: Iterable[Entry]) -> None:
        """Raise AssertionError unless every evictable entry is in the order and outdated items are few."""
        assert self.num_pushed <= self._most_pushed, "outdated items pile up"
        pushed: set[CacheBlock] = {entry for entry, stamp in self._order if stamp == entry.access_count}
        pushed.update(self._taken)
        for entry in entries:
            assert not self.is_evictable(entry) or entry in pushed, "an evictable entry is not in the order"

    def _drop_outdated(self) -> None:
        """Drop outdated and repeated items, which may be half of all."""
        self.put_back()
        order = self._order
        kept = dict.fromkeys(e for e, stamp in order if isinstance(e, Entry) and stamp == e.access_count)
        order.clear()
        for entry in kept:
            if self.is_evictable(entry):
                order.push(entry, entry.access_count)
        self._most_pushed = 2 * len(order) + _MIN_PUSHED

    def _iter_leaves(self, yielded: list[Entry]) -> Iterator[CacheBlock]:
        """Yield evictable entries in order, as if each yielded entry were already evicted.

        Popped entries go to `_taken`. The caller will evict most of them, so only the next call puts the rest back.
        A parent that becomes a leaf is pushed at once; `_is_leaf` skips it later if its children stay.
        """
        order, is_hot, pins = self._order, self._is_hot, self._pool.pins
        gone: set[Entry] = set()
        freed: set[Entry] = set()
        gone_children: dict[Entry, int] = {}
        while item := order.pop():
            entry, stamp = item
            assert isinstance(entry, Entry), "an order returns what was pushed"
            if not self._is_leaf(entry, stamp, gone, freed):
                continue
            while True:  # up the chain, as long as the parent would be popped next
                gone.add(entry)
                yielded.append(entry)
                yield entry
                parent = entry.parent
                num_children = parent.hot_children if is_hot else parent.warm_children
                if num_children > 1:
                    gone_children[parent] = num_gone = gone_children.get(parent, 0) + 1
                    if num_gone < num_children:
                        break
                slot = parent.block_id if is_hot else parent.warm_slot
                if slot is None or parent.flags & PINNED or pins[slot]:
                    break
                if not order.goes_first(parent):
                    order.push(parent, parent.access_count)
                    freed.add(parent)
                    break
                entry = parent

    def _is_leaf(self, entry: Entry, stamp: int, gone: set[Entry], freed: set[Entry]) -> bool:
        """Return whether a popped item is up to date and a leaf; add a leaf of the tier to `_taken`."""
        if stamp != entry.access_count or entry in gone:
            return False
        if entry in freed:
            return True
        if not self.is_evictable(entry):
            return False
        self._taken.append(entry)
        return True
