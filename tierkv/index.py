"""Which blocks this process holds, where, and who uses them: the control plane's one table.

The index is a tree. An entry hangs under the entry of its parent block and stays as long as it has children,
even when its own bytes lie only in the cold store: so a chain is followed from verified entry to verified
entry, and a block stored later under a colliding hash can never adopt another's children.

It moves no bytes and knows no torch. The facade calls `attach` after bytes arrived and `detach` before a place
is used again; the cold tier's own table is the LMDB store, of which `in_cold` is only a reminder.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import TypeAlias

from tierkv.block import TOKEN_BYTES, BlockHash, Tier
from tierkv.policies import CacheBlock, EvictionPolicy
from tierkv.slots import SlotPool

__all__ = ["Entry", "Index"]


class Entry:
    """One block that this process knows. Satisfies `CacheBlock`; changed by the index alone."""

    __slots__ = (
        "access_count",
        "block_hash",
        "block_id",
        "children",
        "created_at",
        "depth",
        "hot_children",
        "in_cold",
        "last_access",
        "parent",
        "parent_hash",
        "pinned",
        "stamp",
        "token_bytes",
        "warm_children",
        "warm_slot",
    )

    def __init__(
        self,
        block_hash: BlockHash,
        parent_hash: BlockHash,
        parent: Entry | None,
        token_bytes: bytes,
        now: float,
    ) -> None:
        self.block_hash = block_hash
        self.parent_hash = parent_hash
        self.parent = parent
        self.token_bytes = token_bytes
        self.depth: int = parent.depth + 1 if parent else 0
        self.block_id: int | None = None
        self.warm_slot: int | None = None
        self.in_cold = False
        self.pinned = False
        self.children: set[Entry] | None = None
        self.hot_children = 0
        self.warm_children = 0
        self.created_at = now
        self.last_access = now
        self.access_count = 1
        self.stamp = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the block; fewer than the block size in a stored partial tail."""
        return len(self.token_bytes) // TOKEN_BYTES

    def place(self, tier: Tier) -> int | None:
        """Return the block id (hot) or warm slot that holds the bytes, or None."""
        return self.block_id if tier is Tier.HOT else self.warm_slot

    def tier_children(self, tier: Tier) -> int:
        """Return how many children have bytes in that tier."""
        return self.hot_children if tier is Tier.HOT else self.warm_children

    def is_same_block(self, parent_hash: BlockHash, token_bytes: bytes) -> bool:
        """Tell a true hit from a hash collision."""
        return self.parent_hash == parent_hash and self.token_bytes == token_bytes


_Offer: TypeAlias = "tuple[float, int, int, Entry, int]"


class Index:
    """Entries of the hot and the warm tier, their places, and the eviction order of both.

    root: the namespace digest, parent of every first block. Not thread-safe: the facade holds the lock.
    """

    def __init__(
        self,
        *,
        root: BlockHash,
        num_hot: int,
        num_warm: int,
        policy: EvictionPolicy,
        clock: Callable[[], float],
    ) -> None:
        self.root = root
        self.policy = policy
        self.hot: SlotPool[Entry] = SlotPool(num_hot)
        self.warm: SlotPool[Entry] = SlotPool(num_warm)
        self._clock = clock
        self._entries: dict[BlockHash, Entry] = {}
        self._first_blocks: set[Entry] = set()
        self._offers: dict[Tier, list[_Offer]] = {Tier.HOT: [], Tier.WARM: []}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def pool(self, tier: Tier) -> SlotPool[Entry]:
        """Return the places of the hot or the warm tier."""
        return self.hot if tier is Tier.HOT else self.warm

    def get(self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes) -> Entry | None:
        """Return the entry of exactly this block. None if it is unknown, and on a hash collision."""
        entry = self._entries.get(block_hash)
        return entry if entry and entry.is_same_block(parent_hash, token_bytes) else None

    def collides(self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes) -> bool:
        """Tell whether another block has taken this hash, so that this one cannot be cached."""
        entry = self._entries.get(block_hash)
        if entry:
            return not entry.is_same_block(parent_hash, token_bytes)
        return block_hash == self.root

    def children(self, parent_hash: BlockHash) -> list[Entry]:
        """Return the entries that continue the block (or, for the root, begin a chain)."""
        if parent_hash == self.root:
            return list(self._first_blocks)
        parent = self._entries.get(parent_hash)
        return list(parent.children or ()) if parent else []

    def insert(self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes) -> Entry | None:
        """Return the entry of the block, made if need be. None if its hash is taken or its parent unknown.

        A new entry has no place yet: attach one, or call `forget`.
        """
        entry = self._entries.get(block_hash)
        if entry:
            return entry if entry.is_same_block(parent_hash, token_bytes) else None
        parent = self._entries.get(parent_hash)
        if block_hash == self.root or (parent is None and parent_hash != self.root):
            return None
        entry = Entry(block_hash, parent.block_hash if parent else self.root, parent, token_bytes, self._clock())
        self._entries[block_hash] = entry
        if parent is None:
            self._first_blocks.add(entry)
        elif parent.children is None:
            parent.children = {entry}
        else:
            parent.children.add(entry)
        return entry

    def attach(self, entry: Entry, tier: Tier, slot: int) -> None:
        """Record that `slot` holds the entry's bytes from now on. The entry must not have a place there."""
        assert entry.place(tier) is None, "an entry has one place in a tier"
        self.pool(tier).own(slot, entry)
        if tier is Tier.HOT:
            entry.block_id = slot
        else:
            entry.warm_slot = slot
        self._count_child(entry, tier, 1)
        self._offer(entry, tier)

    def detach(self, entry: Entry, tier: Tier) -> None:
        """Record that the tier forgot the entry; an entry without place and children leaves the index."""
        slot = entry.place(tier)
        assert slot is not None, "nothing to detach"
        if tier is Tier.HOT:
            entry.block_id = None
        else:
            entry.warm_slot = None
        self.pool(tier).disown(slot)
        self._count_child(entry, tier, -1)
        self._prune(entry)

    def forget(self, entry: Entry) -> None:
        """Drop an entry's places and the entry itself unless children still hang on it."""
        for tier in (Tier.HOT, Tier.WARM):
            if entry.place(tier) is not None:
                self.detach(entry, tier)
        self._prune(entry)

    def pin(self, entry: Entry, tier: Tier) -> None:
        """Raise the reference count of the entry's place in that tier."""
        slot = entry.place(tier)
        assert slot is not None, "only bytes that are there can be pinned"
        self.pool(tier).pin(slot)

    def unpin(self, tier: Tier, slot: int) -> None:
        """Lower the reference count of a place; its owner, if any, may be evictable again."""
        pool = self.pool(tier)
        owner = pool.owners[slot]
        if pool.unpin(slot) and owner is not None:
            self._offer(owner, tier)

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """Keep the entry in whichever tiers hold it until it is unpinned again."""
        entry.pinned = pinned
        for tier in (Tier.HOT, Tier.WARM):
            self._offer(entry, tier)

    def touch(self, entry: Entry) -> None:
        """Record a use of the entry now."""
        entry.last_access = self._clock()
        entry.access_count += 1
        entry.stamp += 1
        self.policy.update_on_access(entry)
        for tier in (Tier.HOT, Tier.WARM):
            self._offer(entry, tier)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Rank everything evictable by another policy from now on."""
        self.policy = policy
        for tier in (Tier.HOT, Tier.WARM):
            self._rank_anew(tier)

    def is_evictable(self, entry: Entry, tier: Tier) -> bool:
        """True for a leaf of that tier that nobody uses and nobody pinned."""
        slot = entry.place(tier)
        return (
            slot is not None
            and not entry.pinned
            and entry.tier_children(tier) == 0
            and self.pool(tier).reference_count(slot) == 0
        )

    def select_victims(self, tier: Tier, count: int) -> list[Entry]:
        """Return up to `count` entries to evict from a tier, children before parents, chosen by the policy.

        Nothing changes yet: the caller detaches each, in this order.
        """
        offers = self._offers[tier]
        popped: list[_Offer] = []
        chosen = self.policy.select_victims(count, self._iter_leaves(tier, popped))
        for offer in popped:
            heapq.heappush(offers, offer)
        victims: list[Entry] = []
        chosen_children: dict[Entry, int] = {}
        for block in chosen[:count]:
            assert isinstance(block, Entry), "a policy returns the blocks that it was offered"
            if block.tier_children(tier) == chosen_children.get(block, 0):
                victims.append(block)
                if block.parent:
                    chosen_children[block.parent] = chosen_children.get(block.parent, 0) + 1
        return victims

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds; linear in the number of entries."""
        for tier in (Tier.HOT, Tier.WARM):
            pool = self.pool(tier)
            pool.check()
            offered = {offer[3] for offer in self._offers[tier] if offer[4] == offer[3].stamp}
            for slot, owner in enumerate(pool.owners):
                assert owner is None or (owner.place(tier) == slot and self._entries.get(owner.block_hash) is owner), (
                    f"{tier} slot {slot} has a stale owner"
                )
            for entry in self:
                slot_or_none = entry.place(tier)
                assert slot_or_none is None or pool.owners[slot_or_none] is entry
                assert not self.is_evictable(entry, tier) or entry in offered, "an evictable entry is not offered"
                held = sum(child.place(tier) is not None for child in entry.children or ())
                assert entry.tier_children(tier) == held, "child count is off"
        for entry in self:
            self._check_links(entry)

    def _check_links(self, entry: Entry) -> None:
        siblings = entry.parent.children if entry.parent else self._first_blocks
        assert siblings and entry in siblings, "a parent does not know its child"
        assert entry.parent is None or self._entries.get(entry.parent_hash) is entry.parent, "a child lost its parent"
        assert entry.parent is not None or entry.parent_hash == self.root
        has_bytes = entry.block_id is not None or entry.warm_slot is not None
        assert has_bytes or entry.children, "an entry without bytes and children stayed"

    def _count_child(self, entry: Entry, tier: Tier, change: int) -> None:
        parent = entry.parent
        if parent is None:
            return
        if tier is Tier.HOT:
            parent.hot_children += change
        else:
            parent.warm_children += change
        self._offer(parent, tier)

    def _prune(self, entry: Entry | None) -> None:
        while entry and entry.block_id is None and entry.warm_slot is None and not entry.children:
            if self._entries.get(entry.block_hash) is not entry:
                return
            del self._entries[entry.block_hash]
            parent = entry.parent
            if parent is None:
                self._first_blocks.discard(entry)
            else:
                assert parent.children is not None
                parent.children.discard(entry)
            entry = parent

    def _offer(self, entry: Entry, tier: Tier) -> None:
        if not self.is_evictable(entry, tier):
            return
        offers = self._offers[tier]
        heapq.heappush(offers, self._ranked(entry))
        if len(offers) > 4 * self.pool(tier).capacity + 64:
            self._rank_anew(tier)

    def _ranked(self, entry: Entry) -> _Offer:
        self._serial += 1
        return (-self.policy.score_block(entry), -entry.depth, self._serial, entry, entry.stamp)

    def _rank_anew(self, tier: Tier) -> None:
        owners = (owner for owner in self.pool(tier).owners if owner is not None)
        self._offers[tier] = [self._ranked(owner) for owner in owners if self.is_evictable(owner, tier)]
        heapq.heapify(self._offers[tier])

    def _iter_leaves(self, tier: Tier, popped: list[_Offer]) -> Iterator[CacheBlock]:
        """Yield evictable entries, best victim first, as if each one yielded were already gone."""
        offers = self._offers[tier]
        gone: set[Entry] = set()
        gone_children: dict[Entry, int] = {}
        while offers:
            offer = heapq.heappop(offers)
            entry = offer[3]
            slot = entry.place(tier)
            is_current = (
                offer[4] == entry.stamp
                and entry not in gone
                and slot is not None
                and not entry.pinned
                and self.pool(tier).reference_count(slot) == 0
                and entry.tier_children(tier) == gone_children.get(entry, 0)
            )
            if not is_current:
                continue
            if self.is_evictable(entry, tier):
                popped.append(offer)
            gone.add(entry)
            yield entry
            parent = entry.parent
            if parent:
                gone_children[parent] = gone_children.get(parent, 0) + 1
                if parent.tier_children(tier) == gone_children[parent]:
                    heapq.heappush(offers, self._ranked(parent))
