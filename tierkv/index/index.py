"""The index: which blocks this process holds, in which places, and how many users each place has.

The index moves no bytes and needs no torch. Its caller calls `attach` after bytes arrived, and `detach` before a place
is used again. The cold tier's table is the LMDB store; `in_cold` only remembers what it said.
There may be a million entries and a request uses hundreds, so what a request does to all its blocks is one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

from tierkv.index.children import Children
from tierkv.index.entry import INDEX_FLAGS
from tierkv.index.entry_table import EntryTable
from tierkv.index.eviction_policy import EvictionPolicy, access_observer, insert_observer
from tierkv.index.eviction_queue import EvictionQueue
from tierkv.index.slots import SlotPool
from tierkv.index.tree import BlockTree, Entry
from tierkv.values.block import BlockHash, Tier
from tierkv.values.locks import NO_LOCK, Owned
from tierkv.values.untracked import untrack

__all__ = ["Entry", "Index"]


class Index(BlockTree):
    """Entries of the hot and the warm tier, their places, and the eviction queues of both.

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
        numbers = list(range(max(num_hot, num_warm)))  # shared: an int for each place of each entry takes memory
        untrack(numbers)
        super().__init__(root, clock, lock, numbers)
        self.hot: SlotPool[Entry] = SlotPool(num_hot, numbers)
        self.warm: SlotPool[Entry] = SlotPool(num_warm, numbers)
        self._queues = {tier: EvictionQueue(tier, self.pool(tier), policy) for tier in (Tier.HOT, Tier.WARM)}
        self._pin_ends: dict[Entry, float] = {}
        self._next_pin_end = math.inf
        self._set_policy(policy)

    def pool(self, tier: Tier) -> SlotPool[Entry]:
        """Return the places of the hot or the warm tier; needs no lock."""
        return self.hot if tier is Tier.HOT else self.warm

    def attach(self, entry: Entry, tier: Tier, slot: int) -> None:
        """Record that `slot` now holds the entry's bytes. The entry must not have a place in that tier."""
        assert self._lock.is_owned()
        assert entry.place(tier) is None, "an entry has one place in a tier"
        if tier is Tier.HOT:
            self.hot.own(slot, entry)
            entry.block_id = slot
            entry.parent.hot_children += 1
        else:
            self.warm.own(slot, entry)
            entry.warm_slot = slot
            if isinstance(below := entry.parent.child_or_children, Children):
                below.num_warm += 1
        self._queues[tier].add(entry)

    def extend(
        self, parent_hash: BlockHash, named: Sequence[tuple[BlockHash, bytes]], block_ids: Sequence[int]
    ) -> list[Entry]:
        """Insert blocks that continue each other, each with its hot place, in one pass. Return their entries.

        named: (block hash, token ids) of each block, the first after `parent_hash`. block_ids: their places, which are
        in use and have no owner. It ends before the first block whose hash the index has, for this or for another
        block, and inserts nothing after an unknown parent: the caller inserts that one by itself.
        """
        assert self._lock.is_owned()
        first_parent = self._parent(parent_hash)
        added: list[Entry] = []
        count = 0 if first_parent is None else self._count_new([block_hash for block_hash, _ in named])
        if first_parent is None or not count:
            return added
        parent, now = first_parent, self._time()
        for (block_hash, token_bytes), block_id in zip(named[:count], block_ids, strict=False):
            entry = Entry(block_hash, parent, token_bytes, now)
            entry.block_id = block_id
            added.append(entry)
            parent = entry
        self.hot.own_all(block_ids[: len(added)], added)
        self._entries.add_all(added)
        if first_parent.child_or_children is None:
            first_parent.child_or_children = added[0]
        else:
            self._add_child(first_parent, added[0])
        first_parent.hot_children += 1
        for above, entry in pairwise(added):
            above.child_or_children = entry
            above.hot_children = 1
        self._queues[Tier.HOT].add_in_use(added)
        if self._observe:
            try:
                self._observe(added, None if first_parent is self.root_entry else first_parent)
            except BaseException:  # of a user's policy: the caller gets no entries, and could not write them down
                self._detach_all(added[::-1], is_hot=True, only_leaves=False)
                raise
        return added

    def _count_new(self, hashes: Sequence[BlockHash]) -> int:
        """Return how many leading hashes are neither in the index nor twice among these."""
        if not self._entries.has_any(hashes) and self.root not in hashes and len(set(hashes)) == len(hashes):
            return len(hashes)  # nearly always
        before = {self.root}
        for number, block_hash in enumerate(hashes):
            if block_hash in before or block_hash in self._entries:
                return number
            before.add(block_hash)
        return len(hashes)

    def detach(self, entry: Entry, tier: Tier) -> None:
        """Record that the tier forgot the entry. An entry without place and children leaves the index."""
        assert self._lock.is_owned()
        self._detach_all((entry,), tier is Tier.HOT, only_leaves=False)
        self._queues[tier].push(entry.parent)

    def rearrange_hot(self, places: Mapping[int, int]) -> None:
        """Record that the bytes of hot blocks have moved, with their users: old block id -> new."""
        assert self._lock.is_owned()
        self.hot.rearrange(places)
        for block_id in places.values():
            entry = self.hot.owners[block_id]
            if entry:
                entry.block_id = block_id

    def evict(self, entries: Iterable[Entry], tier: Tier) -> list[Entry]:
        """Detach entries, children before parents, and return those; an entry with children in the tier stays."""
        assert self._lock.is_owned()
        is_hot = tier is Tier.HOT
        evicted = self._detach_all(entries, is_hot, only_leaves=True)
        queue = self._queues[tier]
        if is_hot:  # most parents went too
            parents = {parent: None for entry in evicted if (parent := entry.parent).block_id is not None}
        else:
            parents = {parent: None for entry in evicted if (parent := entry.parent).warm_slot is not None}
        for parent in parents:
            queue.push(parent)
        queue.put_back()
        return evicted

    def forget(self, entry: Entry) -> None:
        """Drop an entry's places, and the entry itself unless it has children."""
        assert self._lock.is_owned()
        for tier in (Tier.HOT, Tier.WARM):
            if entry.place(tier) is not None:
                self.detach(entry, tier)
        self._prune_all((entry,))

    def pin(self, entry: Entry, tier: Tier) -> None:
        """Raise the reference count of the entry's place in that tier."""
        assert self._lock.is_owned()
        slot = entry.place(tier)
        assert slot is not None, "only a block with a place can be pinned"
        self.pool(tier).pin(slot)

    def unpin(self, tier: Tier, slot: int) -> None:
        """Lower the reference count of a place; its owner may become evictable."""
        assert self._lock.is_owned()
        self.unpin_all(tier, (slot,))

    def unpin_all(self, tier: Tier, slots: Sequence[int]) -> None:
        """Lower the reference counts of several places."""
        assert self._lock.is_owned()
        idle: list[Entry] = []
        self.pool(tier).unpin_all(slots, idle)
        if tier is Tier.HOT:  # of a chain only the last block is a leaf: skip the calls for the others
            idle = [entry for entry in idle if not entry.hot_children]
        queue = self._queues[tier]
        for entry in idle:
            queue.push(entry)

    def set_pinned(self, entry: Entry, pinned: bool, *, ttl_s: float | None = None) -> None:
        """Pin an entry in all tiers that hold it, or unpin it. ttl_s: `end_pins` unpins it after so long."""
        assert self._lock.is_owned()
        self._pin_ends.pop(entry, None)
        if pinned and ttl_s is not None:
            self._pin_ends[entry] = self._time() + ttl_s
            self._next_pin_end = min(self._next_pin_end, self._pin_ends[entry])
        entry.pinned = pinned
        for queue in self._queues.values():
            queue.push(entry)

    def end_pins(self) -> None:
        """Unpin the entries whose pins have ended."""
        assert self._lock.is_owned()
        if not self._pin_ends or (now := self._time()) < self._next_pin_end:
            return
        for entry in [each for each, until in self._pin_ends.items() if until <= now]:
            if self.peek(entry.block_hash) is entry:
                self.set_pinned(entry, False)
            self._pin_ends.pop(entry, None)
        self._next_pin_end = min(self._pin_ends.values(), default=math.inf)

    def touch(self, entry: Entry) -> None:
        """Record a use of the entry now."""
        assert self._lock.is_owned()
        self.touch_all((entry,))

    def touch_all(self, entries: Sequence[Entry]) -> None:
        """Record a use of several entries, all at the same time."""
        assert self._lock.is_owned()
        now = self._time()
        hot, warm = self._queues[Tier.HOT], self._queues[Tier.WARM]
        for entry in entries:
            entry.last_access = now
            entry.access_count += 1
        try:
            if self._observe_uses:
                self._observe_uses(entries)
        finally:  # their older pushes are outdated: without new ones they would never be evicted
            for entry in entries:
                if not entry.hot_children and entry.block_id is not None:
                    hot.push(entry)
                if entry.warm_slot is not None and not entry.warm_children:
                    warm.push(entry)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Order all evictable entries by another policy."""
        assert self._lock.is_owned()
        self._set_policy(policy)
        for queue in self._queues.values():
            queue.set_policy(policy)

    def is_evictable(self, entry: Entry, tier: Tier) -> bool:
        """Return whether an entry is a leaf of the tier, not in use and not pinned."""
        assert self._lock.is_owned()
        return self._queues[tier].is_evictable(entry)

    def select_evictions(self, tier: Tier, count: int) -> list[Entry]:
        """Return up to `count` entries of a tier, children before parents, chosen by the policy.

        Nothing changes yet: the caller evicts them, in this order.
        """
        assert self._lock.is_owned()
        return self._queues[tier].select(count)

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds; linear in the number of entries."""
        assert self._lock.is_owned()
        for tier, queue in self._queues.items():
            _check_places(tier, self.pool(tier), self._entries)
            queue.check(self)
        _check_tree(self.root_entry, self._entries)
        self._content_digests.check()

    def _set_policy(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        for entry in self:
            entry.flags &= INDEX_FLAGS
        self._observe, self._observe_uses = insert_observer(policy), access_observer(policy)
        if self._observe:
            for entry in self:  # in the order of insertion: parents first
                self._observe((entry,), None if entry.parent is self.root_entry else entry.parent)

    def _detach_all(self, entries: Iterable[Entry], is_hot: bool, *, only_leaves: bool) -> list[Entry]:
        """Record that a tier forgot entries, and return them. only_leaves: skip those with children in the tier."""
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
                if isinstance(below := entry.parent.child_or_children, Children):
                    below.num_warm -= 1
            detached.append(entry)
            if entry.child_or_children is None:
                bare.append(entry)
        (self.hot if is_hot else self.warm).disown_all(slots)
        self._queues[Tier.HOT if is_hot else Tier.WARM].remove_all(detached)
        self._prune_all(bare)
        return detached


def _check_places(tier: Tier, pool: SlotPool[Entry], entries: EntryTable) -> None:
    """Raise AssertionError unless the places of a tier and the entries agree."""
    pool.check()
    for slot, owner in enumerate(pool.owners):
        assert owner is None or (owner.place(tier) == slot and entries.get(owner.block_hash) is owner), (
            f"{tier} slot {slot} has a stale owner"
        )
    for entry in entries:
        place = entry.place(tier)
        assert place is None or pool.owners[place] is entry, "an entry does not own its place"


def _check_tree(root_entry: Entry, entries: EntryTable) -> None:
    """Raise AssertionError unless the entries are one tree, counted by their parents, none of them without purpose."""
    num_children = 0
    for parent in (root_entry, *entries):
        children = list(parent.children)
        num_children += len(children)
        tokens = [child.token_bytes for child in children]
        assert tokens == sorted(set(tokens)), "children are out of order"
        for child in children:
            assert child.parent is parent and child.depth == parent.depth + 1
            assert entries.get(child.block_hash) is child, "a child is not in the table"
        for tier in (Tier.HOT, Tier.WARM):
            held = sum(child.place(tier) is not None for child in children)
            assert parent.tier_children(tier) == held, "child count is off"
        has_bytes = parent.block_id is not None or parent.warm_slot is not None
        has_purpose = has_bytes or children or parent.awaited or parent is root_entry
        assert has_purpose, "an entry without bytes and children stayed"
    assert num_children == len(entries), "an entry is not its parent's child"
