"""Which blocks this process holds, where, and who uses them: the control plane's one table.

It moves no bytes and knows no torch. The facade calls `attach` after bytes arrived and `detach` before a place
is used again; the cold tier's own table is the LMDB store, of which `in_cold` is only a reminder.

There may be a million entries, and a request uses hundreds. So an entry is one object without a dictionary, an only
child needs no collection, and what a request does to all of its blocks has a method that does it in one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from tierkv.index.children import Siblings
from tierkv.index.entry import Entry
from tierkv.index.eviction import EvictionPolicy, ObservingPolicy
from tierkv.index.eviction_queue import Victims
from tierkv.index.index_check import check_places, check_tree
from tierkv.index.slots import SlotPool
from tierkv.index.tree import BlockTree
from tierkv.values.block import BlockHash, Tier
from tierkv.values.locks import NO_LOCK, Owned

__all__ = ["Entry", "Index"]


class Index(BlockTree):
    """Entries of the hot and the warm tier, their places, and the eviction order of both.

    root: the namespace digest, parent of every first block.
    lock: guards the index where threads share it. The caller of every method holds the lock.
    """

    def __init__(
        self,
        *,
        root: BlockHash,
        num_hot: int,
        num_warm: int,
        policy: EvictionPolicy,
        clock: Callable[[], float],
        lock: Owned = NO_LOCK,
    ) -> None:
        super().__init__(root, clock, lock)
        numbers = list(range(max(num_hot, num_warm)))  # an int of its own for each place of each entry takes more
        self.hot: SlotPool[Entry] = SlotPool(num_hot, numbers)
        self.warm: SlotPool[Entry] = SlotPool(num_warm, numbers)
        self._victims = {tier: Victims(tier, self.pool(tier), policy) for tier in (Tier.HOT, Tier.WARM)}
        self._watch_insertions(policy)

    def pool(self, tier: Tier) -> SlotPool[Entry]:
        """Return the places of the hot or the warm tier; needs no lock."""
        return self.hot if tier is Tier.HOT else self.warm

    def attach(self, entry: Entry, tier: Tier, slot: int) -> None:
        """Record that `slot` holds the entry's bytes from now on. The entry must not have a place there."""
        assert self._lock.is_owned()
        assert entry.place(tier) is None, "an entry has one place in a tier"
        if tier is Tier.HOT:
            self.hot.own(slot, entry)
            entry.block_id = slot
            entry.parent.hot_children += 1
        else:
            self.warm.own(slot, entry)
            entry.warm_slot = slot
            if isinstance(family := entry.parent.family, Siblings):
                family.num_warm += 1
        self._victims[tier].add(entry)

    def detach(self, entry: Entry, tier: Tier) -> None:
        """Record that the tier forgot the entry; an entry without place and children leaves the index."""
        assert self._lock.is_owned()
        self._detach_all((entry,), tier is Tier.HOT, only_leaves=False)
        self._victims[tier].offer(entry.parent)

    def rearrange_hot(self, places: Mapping[int, int]) -> None:
        """Record that the bytes of block ids, whoever uses them, now lie in others: old -> new."""
        assert self._lock.is_owned()
        self.hot.rearrange(places)
        for block_id in places.values():
            entry = self.hot.owners[block_id]
            if entry:
                entry.block_id = block_id

    def evict(self, victims: Iterable[Entry], tier: Tier) -> list[Entry]:
        """Detach several entries, children before parents, and return them; one that has children there stays."""
        assert self._lock.is_owned()
        is_hot = tier is Tier.HOT
        evicted = self._detach_all(victims, is_hot, only_leaves=True)
        order = self._victims[tier]
        if is_hot:  # most parents went too
            parents = {parent: None for entry in evicted if (parent := entry.parent).block_id is not None}
        else:
            parents = {parent: None for entry in evicted if (parent := entry.parent).warm_slot is not None}
        for parent in parents:
            order.offer(parent)
        order.put_back()
        return evicted

    def forget(self, entry: Entry) -> None:
        """Drop an entry's places and the entry itself unless children still hang on it."""
        assert self._lock.is_owned()
        for tier in (Tier.HOT, Tier.WARM):
            if entry.place(tier) is not None:
                self.detach(entry, tier)
        self._prune(entry)

    def pin(self, entry: Entry, tier: Tier) -> None:
        """Raise the reference count of the entry's place in that tier."""
        assert self._lock.is_owned()
        slot = entry.place(tier)
        assert slot is not None, "only bytes that are there can be pinned"
        self.pool(tier).pin(slot)

    def unpin(self, tier: Tier, slot: int) -> None:
        """Lower the reference count of a place; its owner, if any, may be evictable again."""
        assert self._lock.is_owned()
        self.unpin_all(tier, (slot,))

    def unpin_all(self, tier: Tier, slots: Sequence[int]) -> None:
        """Lower the reference counts of several places."""
        assert self._lock.is_owned()
        idle: list[Entry] = []
        self.pool(tier).unpin_all(slots, idle)
        if tier is Tier.HOT:  # of a whole chain only the last may be evicted: say so without a call for each
            idle = [entry for entry in idle if not entry.hot_children]
        order = self._victims[tier]
        for entry in idle:
            order.offer(entry)

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """Keep the entry in whichever tiers hold it until it is unpinned again."""
        assert self._lock.is_owned()
        entry.pinned = pinned
        for order in self._victims.values():
            order.offer(entry)

    def touch(self, entry: Entry) -> None:
        """Record a use of the entry now."""
        assert self._lock.is_owned()
        self.touch_all((entry,))

    def touch_all(self, entries: Iterable[Entry]) -> None:
        """Record a use of several entries, all at the same time."""
        assert self._lock.is_owned()
        now = self._time()
        learn = self.policy.update_on_access
        hot, warm = self._victims[Tier.HOT], self._victims[Tier.WARM]
        for entry in entries:
            entry.last_access = now
            entry.access_count += 1
            learn(entry)
            if not entry.hot_children and entry.block_id is not None:
                hot.offer(entry)
            if entry.warm_slot is not None and not entry.warm_children:
                warm.offer(entry)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Rank everything evictable by another policy from now on."""
        assert self._lock.is_owned()
        self._watch_insertions(policy)
        for order in self._victims.values():
            order.set_policy(policy)

    def is_evictable(self, entry: Entry, tier: Tier) -> bool:
        """True for a leaf of that tier that nobody uses and nobody pinned."""
        assert self._lock.is_owned()
        return self._victims[tier].is_evictable(entry)

    def select_victims(self, tier: Tier, count: int) -> list[Entry]:
        """Return up to `count` entries to evict from a tier, children before parents, chosen by the policy.

        Nothing changes yet: the caller detaches each, in this order.
        """
        assert self._lock.is_owned()
        return self._victims[tier].select(count)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds; linear in the number of entries."""
        assert self._lock.is_owned()
        for tier, order in self._victims.items():
            check_places(tier, self.pool(tier), self._entries)
            order.check(self)
        check_tree(self._trunk, self._entries)
        self._content_digests.check()

    def _watch_insertions(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self._observe = policy.update_on_insert if isinstance(policy, ObservingPolicy) else None
        if self._observe:
            for entry in self:  # parents came before their children
                self._observe(entry, None if entry.parent is self._trunk else entry.parent)

    def _detach_all(self, entries: Iterable[Entry], is_hot: bool, *, only_leaves: bool) -> list[Entry]:
        """Record that a tier forgot entries, and return them. only_leaves: but for those with children there."""
        detached: list[Entry] = []
        slots: list[int | None] = []
        bare: list[Entry] = []
        for entry in entries:
            if is_hot:
                if only_leaves and entry.hot_children:
                    continue
                slots.append(entry.block_id)
                entry.block_id = None
                entry.parent.hot_children -= 1
            else:
                if only_leaves and entry.warm_children:
                    continue
                slots.append(entry.warm_slot)
                entry.warm_slot = None
                if isinstance(family := entry.parent.family, Siblings):
                    family.num_warm -= 1
            detached.append(entry)
            if entry.family is None:
                bare.append(entry)
        (self.hot if is_hot else self.warm).disown_all(slots)
        self._victims[Tier.HOT if is_hot else Tier.WARM].remove_all(detached)
        for entry in bare:
            self._prune(entry)
        return detached
