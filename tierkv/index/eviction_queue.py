"""The queue of the entries of one tier that may be evicted, in the order of a policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tierkv.index.eviction_heap import STAMP_MASK
from tierkv.index.eviction_policy import CacheBlock, ChainOrder, EvictionOrder, EvictionPolicy, OrderingPolicy
from tierkv.index.score_order import ScoreOrder
from tierkv.index.slots import SlotPool
from tierkv.index.tree import PINNED, Entry
from tierkv.values.block import Tier

__all__ = ["EvictionQueue"]

_MIN_PUSHED = 64
_SHORT_RUN, _LONGEST_RUN = 8, 128
"""Ancestors looked at in one call, first and later: a run is often short."""


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
        self._order: EvictionOrder[CacheBlock] = (
            policy.new_order() if isinstance(policy, OrderingPolicy) else ScoreOrder(policy)
        )
        takes_all = getattr(policy.select_evictions, "__func__", None)
        self._takes_first = takes_all is EvictionPolicy.select_evictions
        self._count_first, self._add_all = self._count_each, self._add_each
        if isinstance(self._order, ChainOrder):
            self._count_first, self._add_all = self._order.count_first, self._order.add_all
        self._taken: list[Entry] = []  # by the last selection
        for owner in self._pool.owners:
            if owner is not None:
                self._order.add(owner)
                if self.is_evictable(owner):
                    self._order.push(owner, owner.access_count & STAMP_MASK)
        self._most_pushed = 2 * len(self._order) + _MIN_PUSHED

    def is_evictable(self, entry: Entry) -> bool:
        """Return whether an entry is a leaf of the tier, not in use and not pinned."""
        if self._is_hot:
            slot, num_children = entry.block_id, entry.hot_children
        else:
            slot, num_children = entry.warm_slot, entry.warm_children
        return slot is not None and not num_children and not entry.flags & PINNED and not self._pool.pins[slot]

    def add(self, entry: Entry) -> None:
        """Add an entry whose bytes the tier now has."""
        self._order.add(entry)
        self.push(entry)

    def add_in_use(self, entries: Sequence[Entry]) -> None:
        """Add entries whose bytes the tier now has, and whose places are in use: none is evictable yet."""
        self._add_all(entries)

    def remove_all(self, entries: Sequence[Entry]) -> None:
        """Remove entries that left the tier."""
        self._order.remove_all(entries)

    def push(self, entry: Entry) -> None:
        """Push an entry, if it is evictable."""
        if self.is_evictable(entry):
            self._order.push(entry, entry.access_count & STAMP_MASK)
            if self.num_pushed > self._most_pushed:
                self._drop_outdated()

    def put_back(self) -> None:
        """Push again the entries that the last selection took and the caller did not evict."""
        if self._taken:
            taken, self._taken = self._taken, []
            for entry in taken:
                if self.is_evictable(entry):
                    self._order.push(entry, entry.access_count & STAMP_MASK)

    def select(self, count: int) -> list[Entry]:
        """Return up to `count` entries, children before parents, chosen by the policy. Nothing changes yet."""
        self.put_back()
        yielded: list[Entry] = []
        if self._takes_first:  # no call for each entry
            for run in self._iter_runs(yielded, count) if count > 0 else ():
                yielded += run
                if len(yielded) >= count:
                    break
            if self.num_pushed > self._most_pushed:
                self._drop_outdated()
            return yielded
        chosen = self._policy.select_evictions(count, self._iter_leaves(yielded, count))[:count]
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
        pushed: set[CacheBlock] = {entry for entry, stamp in self._order if stamp == entry.access_count & STAMP_MASK}
        pushed.update(self._taken)
        for entry in entries:
            assert not self.is_evictable(entry) or entry in pushed, "an evictable entry is not in the order"

    def _drop_outdated(self) -> None:
        """Drop outdated and repeated items, which may be half of all."""
        self.put_back()
        order = self._order
        kept = dict.fromkeys(e for e, stamp in order if isinstance(e, Entry) and stamp == e.access_count & STAMP_MASK)
        order.clear()
        for entry in kept:
            if self.is_evictable(entry):
                order.push(entry, entry.access_count & STAMP_MASK)
        self._most_pushed = 2 * len(order) + _MIN_PUSHED

    def _iter_leaves(self, yielded: list[Entry], count: int) -> Iterator[CacheBlock]:
        """Yield evictable entries in order, `count` or more, and note them in `yielded`; see `_iter_runs`."""
        for run in self._iter_runs(yielded, count):
            for entry in run:
                yielded.append(entry)
                yield entry

    def _iter_runs(self, yielded: list[Entry], count: int) -> Iterator[Sequence[Entry]]:
        """Yield evictable entries in order, `count` or more, as if each yielded entry were already evicted.

        yielded: all that were yielded so far, noted by the caller; a run has no more than are missing of `count`.
        Popped entries go to `_taken`. The caller will evict most of them, so only the next call puts the rest back.
        Parents that would be popped next follow a leaf in runs. A parent that becomes a leaf and would not be is pushed
        at once; the next selection skips it if its children stay.
        """
        order, is_hot, pins, taken = self._order, self._is_hot, self._pool.pins, self._taken
        gone: set[Entry] = set()
        freed: set[Entry] = set()
        gone_children: dict[Entry, int] = {}
        while item := order.pop():
            entry, stamp = item
            assert isinstance(entry, Entry), "an order returns what was pushed"
            if stamp != entry.access_count & STAMP_MASK or entry in gone:  # outdated, or pushed twice
                continue
            if entry not in freed:
                if not self.is_evictable(entry):
                    continue
                taken.append(entry)
            run: Sequence[Entry] = (entry,)
            is_behind, longest = False, _SHORT_RUN
            while True:
                gone.update(run)
                yield run
                parent = run[-1].parent
                num_children = parent.hot_children if is_hot else parent.warm_children
                if num_children > 1:
                    gone_children[parent] = num_gone = gone_children.get(parent, 0) + 1
                    if num_gone < num_children:
                        break
                slot = parent.block_id if is_hot else parent.warm_slot
                if slot is None or parent.flags & PINNED or pins[slot]:
                    break
                if is_behind or not order.goes_first(parent):
                    order.push(parent, parent.access_count & STAMP_MASK)
                    freed.add(parent)
                    break
                run, is_behind = self._run_from(parent, min(count - len(yielded), longest))
                longest = _LONGEST_RUN

    def _run_from(self, entry: Entry, count: int) -> tuple[list[Entry], bool]:
        """Return an entry that goes next, and up to `count` - 1 ancestors that follow it: each is its only child's.

        Also return whether the run ends because of what does not go next, although it may.
        """
        is_hot, pins = self._is_hot, self._pool.pins
        run = [entry]
        for _ in range(count - 1):
            entry = entry.parent
            if (entry.hot_children if is_hot else entry.warm_children) != 1:
                break
            slot = entry.block_id if is_hot else entry.warm_slot
            if slot is None or entry.flags & PINNED or pins[slot]:
                break
            run.append(entry)
        num_before = len(run)
        if num_before > 1:
            del run[1 + self._count_first(run[1:]) :]
        return run, len(run) < num_before

    def _add_each(self, blocks: Sequence[CacheBlock]) -> None:
        """Let the order learn of blocks one by one."""
        for block in blocks:
            self._order.add(block)

    def _count_each(self, blocks: Sequence[CacheBlock]) -> int:
        """Return how many leading blocks go first, one after the other."""
        for number, block in enumerate(blocks):
            if not self._order.goes_first(block):
                return number
        return len(blocks)
