"""The eviction order of one tier: which entries may go, and which of them the policy wants to go first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tierkv.index.entry import PINNED, Entry
from tierkv.index.eviction import CacheBlock, EvictionPolicy, VictimQueue, new_queue
from tierkv.index.slots import SlotPool
from tierkv.values.block import Tier

__all__ = ["Victims"]

_MIN_OFFERS = 64


class Victims:
    """The entries of a tier that may be evicted, offered to a policy's queue.

    Nothing is taken out of the queue when an entry is used or pinned: an offer is void once the entry's count of
    uses has changed, or while it is not evictable. What comes to be evictable has to be offered.
    """

    def __init__(self, tier: Tier, pool: SlotPool[Entry], policy: EvictionPolicy) -> None:
        self._tier = tier
        self._is_hot = tier is Tier.HOT
        self._pool = pool
        self.set_policy(policy)

    @property
    def num_offers(self) -> int:
        """Offers made, void ones included: no more than twice the evictable entries and some."""
        return len(self._queue) + len(self._taken)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Rank everything evictable by another policy from now on."""
        self._policy = policy
        self._queue: VictimQueue[CacheBlock] = new_queue(policy)
        self._taken: list[Entry] = []  # by the last selection
        for owner in self._pool.owners:
            if owner is not None:
                self._queue.add(owner)
                if self.is_evictable(owner):
                    self._queue.push(owner, owner.access_count)
        self._most_offers = 2 * len(self._queue) + _MIN_OFFERS

    def is_evictable(self, entry: Entry) -> bool:
        """True for a leaf of the tier that nobody uses and nobody pinned."""
        if self._is_hot:
            slot, num_children = entry.block_id, entry.hot_children
        else:
            slot, num_children = entry.warm_slot, entry.warm_children
        return slot is not None and not num_children and not entry.pinned and not self._pool.pins[slot]

    def add(self, entry: Entry) -> None:
        """Note an entry whose bytes the tier has from now on."""
        self._queue.add(entry)
        self.offer(entry)

    def remove_all(self, entries: Sequence[Entry]) -> None:
        """Note entries that the tier has forgotten."""
        self._queue.remove_all(entries)

    def offer(self, entry: Entry) -> None:
        """Put an entry into the order, if it is evictable."""
        if self.is_evictable(entry):
            self._queue.push(entry, entry.access_count)
            if self.num_offers > self._most_offers:
                self._drop_void()

    def put_back(self) -> None:
        """Offer again what the last selection took and nobody detached or pinned."""
        if self._taken:
            taken, self._taken = self._taken, []
            for entry in taken:
                if self.is_evictable(entry):
                    self._queue.push(entry, entry.access_count)

    def select(self, count: int) -> list[Entry]:
        """Return up to `count` entries, children before parents, chosen by the policy. Nothing changes yet."""
        self.put_back()
        yielded: list[Entry] = []
        chosen = self._policy.select_victims(count, self._iter_leaves(yielded))[:count]
        if self.num_offers > self._most_offers:
            self._drop_void()
        if chosen == yielded:  # everything that was offered, in order: nothing can have been left out below
            return yielded
        victims: list[Entry] = []
        chosen_children: dict[Entry, int] = {}
        for block in chosen:
            assert isinstance(block, Entry), "a policy returns the blocks that it was offered"
            if block.tier_children(self._tier) == chosen_children.get(block, 0):
                victims.append(block)
                chosen_children[block.parent] = chosen_children.get(block.parent, 0) + 1
        return victims

    def check(self, known: Iterable[Entry]) -> None:
        """Raise AssertionError unless every evictable entry of those known is offered, and not too often."""
        assert self.num_offers <= self._most_offers, "void offers pile up"
        offered: set[CacheBlock] = {entry for entry, stamp in self._queue if stamp == entry.access_count}
        offered.update(self._taken)
        for entry in known:
            assert not self.is_evictable(entry) or entry in offered, "an evictable entry is not offered"

    def _drop_void(self) -> None:
        """Drop void offers and repeated ones, which may be half of all."""
        self.put_back()
        queue = self._queue
        kept = dict.fromkeys(e for e, stamp in queue if isinstance(e, Entry) and stamp == e.access_count)
        queue.clear()
        for entry in kept:
            if self.is_evictable(entry):
                queue.push(entry, entry.access_count)
        self._most_offers = 2 * len(queue) + _MIN_OFFERS

    def _iter_leaves(self, yielded: list[Entry]) -> Iterator[CacheBlock]:
        """Yield evictable entries, best victim first, as if each one yielded were already gone.

        What it takes from the queue goes to `_taken`: most of it will be detached, so it is put back only when
        that is known. Parents that would become leaves are offered at once: void again, if their children stay.
        """
        queue, is_hot, pins = self._queue, self._is_hot, self._pool.pins
        gone: set[Entry] = set()
        freed: set[Entry] = set()
        gone_children: dict[Entry, int] = {}
        while offer := queue.pop():
            entry, stamp = offer
            assert isinstance(entry, Entry), "a queue returns what was pushed"
            if not self._is_leaf(entry, stamp, gone, freed):
                continue
            while True:  # up the chain, as long as what this frees is also what goes next
                gone.add(entry)
                yielded.append(entry)
                yield entry
                above = entry.parent
                num_children = above.hot_children if is_hot else above.warm_children
                if num_children > 1:
                    gone_children[above] = num_gone = gone_children.get(above, 0) + 1
                    if num_gone < num_children:
                        break
                slot = above.block_id if is_hot else above.warm_slot
                if slot is None or above.flags & PINNED or pins[slot]:
                    break
                if not queue.goes_first(above):
                    queue.push(above, above.access_count)
                    freed.add(above)
                    break
                entry = above

    def _is_leaf(self, entry: Entry, stamp: int, gone: set[Entry], freed: set[Entry]) -> bool:
        """Tell whether an offer is good, and take note of one whose entry really is a leaf."""
        if stamp != entry.access_count or entry in gone:
            return False
        if entry in freed:
            return True
        if not self.is_evictable(entry):
            return False
        self._taken.append(entry)
        return True
