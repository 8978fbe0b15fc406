"""Which blocks this process holds, where, and who uses them: the control plane's one table.

The index is a tree. An entry hangs under the entry of its parent block and stays as long as it has children,
even when its own bytes lie only in the cold store: so a chain is followed from verified entry to verified
entry, and a block stored later under a colliding hash can never adopt another's children. What comes from outside
the tree (a block read from a store, one written down behind the request) is known by its seal.

It moves no bytes and knows no torch. The facade calls `attach` after bytes arrived and `detach` before a place
is used again; the cold tier's own table is the LMDB store, of which `in_cold` is only a reminder.

There may be a million entries, and a request uses hundreds. So an entry is one object without a dictionary, an only
child needs no collection, and what a request does to all of its blocks has a method that does it in one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice

from tierkv.block import TOKEN_BYTES, BlockHash, Seal, Tier, common_run, seal_block
from tierkv.eviction import CacheBlock, EvictionPolicy, ObservingPolicy, VictimQueue, new_queue
from tierkv.siblings import Siblings
from tierkv.slots import SlotPool

__all__ = ["Entry", "Index"]

_NEAREST = 32
_IN_COLD, _AWAITED = 1, 2
_SEAL_EVERY = 16
_SAME_TIME_S = 1e-4


class Entry:
    """One block that this process knows. Satisfies `CacheBlock`; changed by the index alone."""

    __slots__ = (  # one more, and an entry has 160 bytes instead of 144: so two flags share one
        "_flags",
        "access_count",
        "block_hash",
        "block_id",
        "created_at",
        "depth",
        "family",
        "hot_children",
        "last_access",
        "parent",
        "pinned",
        "token_bytes",
        "warm_children",
        "warm_slot",
    )

    def __init__(self, block_hash: BlockHash, parent: Entry | None, token_bytes: bytes, now: float) -> None:
        self.block_hash = block_hash
        self.parent: Entry = parent or self
        self.token_bytes = token_bytes
        self.depth: int = parent.depth + 1 if parent else -1
        self.block_id: int | None = None
        self.warm_slot: int | None = None
        self.pinned = False
        self._flags = 0
        self.family: Entry | Siblings[Entry] | None = None  # most entries have one child: it needs no collection
        self.hot_children = 0
        self.warm_children = 0
        self.created_at = now
        self.last_access = now
        self.access_count = 1

    @property
    def parent_hash(self) -> BlockHash:
        """The parent's block hash; of a first block the namespace digest."""
        return self.parent.block_hash

    @property
    def children(self) -> Iterable[Entry]:
        """The entries that continue this one, in the order of their token ids."""
        family = self.family
        if family is None:
            return ()
        return (family,) if isinstance(family, Entry) else family

    @property
    def is_prefix_block(self) -> bool:
        """Whether prompts part behind it: two or more known blocks continue it."""
        return isinstance(self.family, Siblings)

    @property
    def in_cold(self) -> bool:
        """Whether the cold store is known to have the block."""
        return bool(self._flags & _IN_COLD)

    @in_cold.setter
    def in_cold(self, is_there: bool) -> None:
        self._flags = self._flags | _IN_COLD if is_there else self._flags & ~_IN_COLD

    @property
    def awaited(self) -> bool:
        """Whether its bytes are on their way: it stays without place and children."""
        return bool(self._flags & _AWAITED)

    @awaited.setter
    def awaited(self, is_coming: bool) -> None:
        self._flags = self._flags | _AWAITED if is_coming else self._flags & ~_AWAITED

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
        return self.parent.block_hash == parent_hash and self.token_bytes == token_bytes


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
        self.hot: SlotPool[Entry] = SlotPool(num_hot)
        self.warm: SlotPool[Entry] = SlotPool(num_warm)
        self._clock = clock
        self._entries: dict[BlockHash, Entry] = {}
        self._now = clock()
        self._trunk = Entry(root, None, b"", self._now)  # stands for the root, and is not in the table
        self._seals: dict[Entry, Seal] = {self._trunk: root}
        self._newest_seal = (self._trunk, root)
        self._taken: dict[Tier, list[Entry]] = {Tier.HOT: [], Tier.WARM: []}
        self._most_offers: dict[Tier, int] = {Tier.HOT: 64, Tier.WARM: 64}
        self.set_policy(policy)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def pool(self, tier: Tier) -> SlotPool[Entry]:
        """Return the places of the hot or the warm tier."""
        return self.hot if tier is Tier.HOT else self.warm

    def get(
        self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes, *, seal: Seal | None = None
    ) -> Entry | None:
        """Return the entry of exactly this block. None if it is unknown, and on a hash collision. seal: as `insert`."""
        entry = self._entries.get(block_hash)
        if entry is None or not entry.is_same_block(parent_hash, token_bytes):
            return None
        return entry if seal is None or seal == self.seal_of(entry) else None

    def seal_of(self, entry: Entry) -> Seal:
        """Return the seal of an entry, computed from the nearest one above it of which it is known.

        Only every 16th of a chain is kept, for each would cost its entry a fifth of its memory, and the newest one of
        all, so that a chain that is sealed block by block costs one digest a block.
        """
        chain: list[Entry] = []
        newest, seal = self._newest_seal
        at = entry
        while at is not newest:
            if known := self._seals.get(at):
                seal = known
                break
            chain.append(at)
            at = at.parent
        for each in reversed(chain):
            seal = seal_block(seal, each.token_bytes)
            self._keep_seal(each, seal)
        return seal

    def _keep_seal(self, entry: Entry, seal: Seal) -> None:
        self._newest_seal = entry, seal
        if entry.depth % _SEAL_EVERY == _SEAL_EVERY - 1 and self._entries.get(entry.block_hash) is entry:
            self._seals[entry] = seal

    def seal_behind(self, parent_hash: BlockHash, token_bytes: bytes) -> Seal:
        """Return the seal of a block, perhaps a partial one, behind an entry (or the root) that the caller holds."""
        parent = self._parent(parent_hash)
        assert parent is not None, "the parent of what is to be sealed has gone"
        return seal_block(self.seal_of(parent), token_bytes)

    def peek(self, block_hash: BlockHash) -> Entry | None:
        """Return whatever entry has this hash: the caller compares its identity."""
        return self._entries.get(block_hash)

    def walk(self, token_bytes: bytes, block_size: int) -> list[Entry]:
        """Return the entries of the leading whole blocks of a sequence, up to the first that is unknown.

        token_bytes: the sequence as little-endian uint32. The tree is followed by token ids, so nothing is hashed
        and no collision can lead astray.
        """
        step = block_size * TOKEN_BYTES
        parent = self._trunk
        found: list[Entry] = []
        for start in range(0, len(token_bytes) - step + 1, step):
            family = parent.family
            if family is None:
                break
            tokens = token_bytes[start : start + step]
            if isinstance(family, Siblings):
                child = family.find(tokens)
            else:
                child = family if family.token_bytes == tokens else None
            if child is None:
                break
            found.append(child)
            parent = child
        return found

    def collides(self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes) -> bool:
        """Tell whether another block has taken this hash, so that this one cannot be cached."""
        entry = self._entries.get(block_hash)
        if entry:
            return not entry.is_same_block(parent_hash, token_bytes)
        return block_hash == self.root

    def children(self, parent_hash: BlockHash) -> list[Entry]:
        """Return the entries that continue the block (or, for the root, begin a chain)."""
        parent = self._parent(parent_hash)
        return list(parent.children) if parent else []

    def nearest_child(self, parent_hash: BlockHash, token_bytes: bytes) -> tuple[Entry, Tier, int] | None:
        """Return the child whose token ids have most in common with these, its tier, and how many they have.

        Only children with bytes in the hot or the warm tier, and one token or more in common. Of equals a hot one,
        if there is one among the 32 nearest on either side: there may be a hundred thousand.
        """
        parent = self._parent(parent_hash)
        family = parent.family if parent else None
        if family is None:
            return None
        if isinstance(family, Entry):
            family = Siblings(family)
        best: tuple[Entry, Tier, int] | None = None
        for side in (family.upwards(token_bytes), family.downwards(token_bytes)):
            best = _nearest(islice(side, _NEAREST), token_bytes, best)
        return best

    def find_child(self, parent: Entry, token_bytes: bytes) -> Entry | None:
        """Return the child of an entry with exactly these token ids, whatever its hash."""
        family = parent.family
        if isinstance(family, Siblings):
            return family.find(token_bytes)
        return family if family and family.token_bytes == token_bytes else None

    def insert(
        self, block_hash: BlockHash, parent_hash: BlockHash, token_bytes: bytes, *, seal: Seal | None = None
    ) -> Entry | None:
        """Return the entry of the block, made if need be. None if its hash is taken or its parent unknown.

        A new entry has no place yet: attach one, or call `forget`.
        seal: of a block whose parent the caller does not hold, and so knows by the hash alone: another block may
        have that hash by now. Then that is an unknown parent too.
        """
        entry = self._entries.get(block_hash)
        if entry:
            return self.get(block_hash, parent_hash, token_bytes, seal=seal)
        parent = self._parent(parent_hash)
        if block_hash == self.root or parent is None:
            return None
        if seal is not None and seal_block(self.seal_of(parent), token_bytes) != seal:
            return None
        entry = Entry(block_hash, parent, token_bytes, self._time())
        self._entries[block_hash] = entry
        if seal is not None:
            self._keep_seal(entry, seal)
        family = parent.family
        if family is None:
            parent.family = entry
        elif isinstance(family, Entry):
            parent.family = Siblings(family, entry)
        else:
            family.add(entry)
        if self._observe:
            self._observe(entry, None if parent is self._trunk else parent)
        return entry

    def attach(self, entry: Entry, tier: Tier, slot: int) -> None:
        """Record that `slot` holds the entry's bytes from now on. The entry must not have a place there."""
        assert entry.place(tier) is None, "an entry has one place in a tier"
        if tier is Tier.HOT:
            self.hot.own(slot, entry)
            entry.block_id = slot
            entry.parent.hot_children += 1
        else:
            self.warm.own(slot, entry)
            entry.warm_slot = slot
            entry.parent.warm_children += 1
        self._offers[tier].add(entry)
        self._offer(entry, tier)

    def detach(self, entry: Entry, tier: Tier) -> None:
        """Record that the tier forgot the entry; an entry without place and children leaves the index."""
        self._detach(entry, tier is Tier.HOT)
        self._offer(entry.parent, tier)

    def rearrange_hot(self, places: Mapping[int, int]) -> None:
        """Record that the bytes of block ids, whoever uses them, now lie in others: old -> new."""
        self.hot.rearrange(places)
        for block_id in places.values():
            entry = self.hot.owners[block_id]
            if entry:
                entry.block_id = block_id

    def depth_first(self) -> Iterator[Entry]:
        """Yield every entry, parents first, and what continues a block right behind it, as far as it does not part."""
        stack = [self._trunk]
        while stack:
            entry = stack.pop()
            if entry is not self._trunk:
                yield entry
            stack.extend(reversed(list(entry.children)))

    def evict(self, victims: Iterable[Entry], tier: Tier) -> list[Entry]:
        """Detach several entries, children before parents, and return them; one that has children there stays."""
        is_hot = tier is Tier.HOT
        evicted: list[Entry] = []
        for entry in victims:
            if entry.hot_children if is_hot else entry.warm_children:
                continue
            self._detach(entry, is_hot)
            evicted.append(entry)
        parents = dict.fromkeys(entry.parent for entry in evicted)
        for parent in parents:  # only now: most of them went too, and need no place in the order
            if (parent.block_id if is_hot else parent.warm_slot) is not None:
                self._offer(parent, tier)
        self._put_back(tier)
        return evicted

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
        self.unpin_all(tier, (slot,))

    def unpin_all(self, tier: Tier, slots: Sequence[int]) -> None:
        """Lower the reference counts of several places."""
        idle: list[Entry] = []
        self.pool(tier).unpin_all(slots, idle)
        if tier is Tier.HOT:  # of a whole chain only the last may be evicted: say so without a call for each
            idle = [entry for entry in idle if not entry.hot_children]
        for entry in idle:
            self._offer(entry, tier)

    def set_pinned(self, entry: Entry, pinned: bool) -> None:
        """Keep the entry in whichever tiers hold it until it is unpinned again."""
        entry.pinned = pinned
        for tier in (Tier.HOT, Tier.WARM):
            self._offer(entry, tier)

    def touch(self, entry: Entry) -> None:
        """Record a use of the entry now."""
        self.touch_all((entry,))

    def touch_all(self, entries: Iterable[Entry]) -> None:
        """Record a use of several entries, all at the same time."""
        now = self._time()
        learn = self.policy.update_on_access
        hot, warm = Tier.HOT, Tier.WARM
        for entry in entries:
            entry.last_access = now
            entry.access_count += 1
            learn(entry)
            if not entry.hot_children and entry.block_id is not None:
                self._offer(entry, hot)
            if not entry.warm_children and entry.warm_slot is not None:
                self._offer(entry, warm)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Rank everything evictable by another policy from now on."""
        self.policy = policy
        self._observe = policy.update_on_insert if isinstance(policy, ObservingPolicy) else None
        if self._observe:
            for entry in self:  # parents came before their children
                self._observe(entry, None if entry.parent is self._trunk else entry.parent)
        hot, warm = new_queue(policy), new_queue(policy)
        self._offers: dict[Tier, VictimQueue[CacheBlock]] = {Tier.HOT: hot, Tier.WARM: warm}
        for tier, offers in self._offers.items():
            self._taken[tier] = []
            for owner in self.pool(tier).owners:
                if owner is not None:
                    offers.add(owner)
                    if self.is_evictable(owner, tier):
                        offers.push(owner, owner.access_count)
            self._most_offers[tier] = 2 * len(offers) + 64

    def is_evictable(self, entry: Entry, tier: Tier) -> bool:
        """True for a leaf of that tier that nobody uses and nobody pinned."""
        if tier is Tier.HOT:
            slot, num_children, pool = entry.block_id, entry.hot_children, self.hot
        else:
            slot, num_children, pool = entry.warm_slot, entry.warm_children, self.warm
        return slot is not None and not num_children and not entry.pinned and not pool.pins[slot]

    def select_victims(self, tier: Tier, count: int) -> list[Entry]:
        """Return up to `count` entries to evict from a tier, children before parents, chosen by the policy.

        Nothing changes yet: the caller detaches each, in this order.
        """
        self._put_back(tier)
        yielded: list[CacheBlock] = []
        chosen = self.policy.select_victims(count, self._iter_leaves(tier, yielded))[:count]
        self._limit_offers(tier)
        if chosen == yielded:  # everything that was offered, in order: nothing can have been left out below
            return [block for block in chosen if isinstance(block, Entry)]
        victims: list[Entry] = []
        chosen_children: dict[Entry, int] = {}
        for block in chosen:
            assert isinstance(block, Entry), "a policy returns the blocks that it was offered"
            if block.tier_children(tier) == chosen_children.get(block, 0):
                victims.append(block)
                chosen_children[block.parent] = chosen_children.get(block.parent, 0) + 1
        return victims

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds; linear in the number of entries."""
        for tier in (Tier.HOT, Tier.WARM):
            pool = self.pool(tier)
            pool.check()
            offers = [entry for entry, stamp in self._offers[tier] if stamp == entry.access_count]
            assert self._num_offers(tier) <= self._most_offers[tier], "void offers pile up"
            offered = {*offers, *self._taken[tier]}
            for slot, owner in enumerate(pool.owners):
                assert owner is None or (owner.place(tier) == slot and self._entries.get(owner.block_hash) is owner), (
                    f"{tier} slot {slot} has a stale owner"
                )
            for entry in self:
                slot_or_none = entry.place(tier)
                assert slot_or_none is None or pool.owners[slot_or_none] is entry
                assert not self.is_evictable(entry, tier) or entry in offered, "an evictable entry is not offered"
        self._check_tree()

    def _check_tree(self) -> None:
        num_children = 0
        for parent in (self._trunk, *self):
            children = list(parent.children)
            num_children += len(children)
            tokens = [child.token_bytes for child in children]
            assert tokens == sorted(set(tokens)), "children are out of order"
            for child in children:
                assert child.parent is parent and child.depth == parent.depth + 1
                assert self._entries.get(child.block_hash) is child, "a child is not in the table"
            for tier in (Tier.HOT, Tier.WARM):
                held = sum(child.place(tier) is not None for child in children)
                assert parent.tier_children(tier) == held, "child count is off"
            has_bytes = parent.block_id is not None or parent.warm_slot is not None
            is_wanted = has_bytes or children or parent.awaited or parent is self._trunk
            assert is_wanted, "an entry without bytes and children stayed"
        assert num_children == len(self), "an entry is not its parent's child"
        for entry, seal in self._seals.items():
            is_there = entry is self._trunk or self._entries.get(entry.block_hash) is entry
            assert is_there, "a seal outlived its entry"
            assert seal == self._sealed_anew(entry), "a seal is not that of its chain"

    def _sealed_anew(self, entry: Entry) -> Seal:
        chain: list[Entry] = []
        while entry is not self._trunk:
            chain.append(entry)
            entry = entry.parent
        return reduce(lambda seal, each: seal_block(seal, each.token_bytes), reversed(chain), self.root)

    def _time(self) -> float:
        """Return the time, the same float for a while: a float of its own would cost every entry 32 bytes."""
        now = self._clock()
        if not 0 <= now - self._now < _SAME_TIME_S:
            self._now = now
        return self._now

    def _parent(self, parent_hash: BlockHash) -> Entry | None:
        return self._trunk if parent_hash == self.root else self._entries.get(parent_hash)

    def _detach(self, entry: Entry, is_hot: bool) -> None:
        if is_hot:
            slot, entry.block_id = entry.block_id, None
            entry.parent.hot_children -= 1
        else:
            slot, entry.warm_slot = entry.warm_slot, None
            entry.parent.warm_children -= 1
        assert slot is not None, "nothing to detach"
        (self.hot if is_hot else self.warm).disown(slot)
        self._offers[Tier.HOT if is_hot else Tier.WARM].remove(entry)
        if entry.family is None and entry.block_id is None and entry.warm_slot is None:
            self._prune(entry)

    def _prune(self, entry: Entry) -> None:
        while entry.block_id is None and entry.warm_slot is None and not (entry.family is not None or entry.awaited):
            if self._entries.get(entry.block_hash) is not entry:
                return
            del self._entries[entry.block_hash]
            self._seals.pop(entry, None)
            parent = entry.parent
            family = parent.family
            if isinstance(family, Siblings):
                family.remove(entry)
                parent.family = family.only() or family
            else:
                assert family is entry, "a parent does not know its child"
                parent.family = None
            entry = parent

    def _offer(self, entry: Entry, tier: Tier) -> None:
        if not self.is_evictable(entry, tier):
            return
        self._offers[tier].push(entry, entry.access_count)
        self._limit_offers(tier)

    def _num_offers(self, tier: Tier) -> int:
        return len(self._offers[tier]) + len(self._taken[tier])

    def _limit_offers(self, tier: Tier) -> None:
        """Drop void offers and repeated ones when they may be half of all."""
        if self._num_offers(tier) <= self._most_offers[tier]:
            return
        self._put_back(tier)
        offers = self._offers[tier]
        kept = dict.fromkeys(e for e, stamp in offers if isinstance(e, Entry) and stamp == e.access_count)
        offers.clear()
        for entry in kept:
            if self.is_evictable(entry, tier):
                offers.push(entry, entry.access_count)
        self._most_offers[tier] = 2 * len(offers) + 64

    def _put_back(self, tier: Tier) -> None:
        """Offer again what the last selection took and nobody detached or pinned."""
        taken, self._taken[tier] = self._taken[tier], []
        for entry in taken:
            if self.is_evictable(entry, tier):
                self._offers[tier].push(entry, entry.access_count)

    def _iter_leaves(self, tier: Tier, yielded: list[CacheBlock]) -> Iterator[CacheBlock]:
        """Yield evictable entries, best victim first, as if each one yielded were already gone.

        What it takes from the offers goes to `_taken`: most of it will be detached, so it is put back only when
        that is known. Parents that would become leaves are offered at once: void again, if their children stay.
        """
        offers, taken = self._offers[tier], self._taken[tier]
        is_hot = tier is Tier.HOT
        pins = self.pool(tier).pins
        gone: set[Entry] = set()
        freed: set[Entry] = set()
        gone_children: dict[Entry, int] = {}
        parent: Entry | None = None
        while offer := offers.push_pop(parent, parent.access_count) if parent else offers.pop():
            entry, stamp = offer
            parent = None
            assert isinstance(entry, Entry), "a queue returns what was pushed"
            if stamp != entry.access_count or entry in gone:
                continue
            if entry not in freed:
                if not self.is_evictable(entry, tier):
                    continue
                taken.append(entry)
            gone.add(entry)
            yielded.append(entry)
            yield entry
            above = entry.parent
            num_children = above.hot_children if is_hot else above.warm_children
            if num_children > 1:
                gone_children[above] = num_gone = gone_children.get(above, 0) + 1
                if num_gone < num_children:
                    continue
            slot = above.block_id if is_hot else above.warm_slot
            if slot is not None and not above.pinned and not pins[slot]:
                freed.add(above)
                parent = above


def _nearest(
    children: Iterable[Entry], token_bytes: bytes, best: tuple[Entry, Tier, int] | None
) -> tuple[Entry, Tier, int] | None:
    """Return the best of `best` and some children, of which each has at most as much in common as the one before."""
    has_warm = False
    for child in children:
        if best and not child.token_bytes.startswith(token_bytes[: best[2] * TOKEN_BYTES]):
            break
        if child.block_id is None and (has_warm or child.warm_slot is None):
            continue
        run = common_run(child.token_bytes, token_bytes)
        if not run:
            break
        tier = Tier.WARM if child.block_id is None else Tier.HOT
        if best is None or run > best[2] or (tier is Tier.HOT and best[1] is Tier.WARM):
            best = (child, tier, run)
        if best[1] is Tier.HOT:
            break
        has_warm = True
    return best
