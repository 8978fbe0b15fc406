"""What the daemon's core keeps: who has which slot, what is on its way, who computes what."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.slab import SharedSlab, SizeClass
from tierkv.daemon.values import BlockSource, Claim, Connection, FetchTask, Load, Reservation, Tenant, Write
from tierkv.index.index import Entry
from tierkv.policies import EvictionPolicy, LRUPolicy
from tierkv.values.block import HASH_BYTES, BlockHash, Tier

__all__ = ["State"]


class State:
    """The tables, and what reading and writing have in common: chains in the index, slots attached, claims.

    `news` collects hashes of blocks that were published, or that nobody computes any more; the server empties it.
    """

    def __init__(
        self,
        slab_bytes: int,
        *,
        clock: Callable[[], float],
        store: BlockSource | None = None,
        make_policy: Callable[[], EvictionPolicy] = LRUPolicy,
        pin_share: float = 0.25,
        extent_bytes: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.store = store
        self.slab = SharedSlab(
            slab_bytes,
            make_policy=make_policy,
            clock=clock,
            forgotten=self._forget_slot,
            extent_bytes=extent_bytes,
            limits=self.limits,
        )
        self.tenants: dict[BlockHash, Tenant] = {}
        self.connections: set[Connection] = set()
        self.counters: Counter[str] = Counter()
        self.news: list[BlockHash] = []
        self.num_leases = 0
        self.num_promised = 0
        self.cursor_bytes = 0
        self.description_bytes = 0
        self.pin_quota_bytes = int(slab_bytes * pin_share)
        self.pin_quota_of_all_bytes = int(slab_bytes * max(pin_share, self.limits.pinned_share))
        self._clock = clock
        self._secret = os.urandom(HASH_BYTES)
        self._slot_tenants: dict[tuple[SizeClass, int], Tenant] = {}
        self._reserved: dict[Entry, Reservation] = {}
        self._loads: dict[Entry, Load] = {}
        self._fetching: dict[FetchTask, Tenant] = {}
        self._writes: set[Write] = set()
        self._numbers = itertools.count(1)

    def _walk(self, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes) -> list[Entry]:
        """Return the entries of a chain from its first block on, as far as the index has this very chain."""
        index, step = tenant.size_class.index, tenant.step
        parent = self._root(tenant)
        known: list[Entry] = []
        if parent is None:
            return known
        peek = index.peek
        marked = tenant.size_class.chosen.marked
        start = 0
        for block_hash in hashes:
            entry = peek(block_hash)
            if entry is None or entry.parent is not parent or entry.token_bytes != tokens[start : start + step]:
                break
            if marked and entry in marked:
                break  # it was evicted, and goes with its last user
            known.append(entry)
            parent = entry
            start += step
        return known

    def _root(self, tenant: Tenant) -> Entry | None:
        """Return the entry that a namespace's first blocks hang under, if it has any."""
        return tenant.size_class.index.peek(tenant.root_hash)

    def _anchor(self, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes) -> list[Entry]:
        """Return the entries of a chain, made as far as they are missing; ends early at a collision."""
        index, step = tenant.size_class.index, tenant.step
        parent = tenant.size_class.root_of(tenant.root_hash)
        entries: list[Entry] = []
        for at, block_hash in enumerate(hashes):
            token_bytes = tokens[at * step : (at + 1) * step]
            other = index.find_child(parent, token_bytes)
            if other and other.block_hash != block_hash:
                break  # one of the two hashes is forged
            entry = index.insert(block_hash, parent.block_hash, token_bytes)
            if entry is None or entry.parent is not parent:
                break
            entries.append(entry)
            parent = entry
        if not entries:
            self._prune(tenant, parent)  # the root, if nothing hangs under it
        return entries

    def _prune(self, tenant: Tenant, entry: Entry) -> None:
        """Let an entry go that nothing needs any more; its parents follow it."""
        if entry.warm_slot is None:
            tenant.size_class.index.forget(entry)

    def _attach(self, tenant: Tenant, entry: Entry, slot: int) -> None:
        tenant.size_class.index.attach(entry, Tier.WARM, slot)
        tenant.warm_blocks += 1
        self._slot_tenants[tenant.size_class, slot] = tenant
        claim = tenant.claims.get(entry.block_hash)
        if claim:
            self._take_from_claim(tenant, claim, entry.block_hash)
            if claim.hashes:
                claim.expires_at = self._clock() + self.limits.claim_s
                held = claim.connection.claims
                held[claim.number] = held.pop(claim.number)  # what expires first stays in front
        self.news.append(entry.block_hash)

    def _forget_slot(self, size_class: SizeClass, slot: int) -> None:
        self._slot_tenants.pop((size_class, slot)).warm_blocks -= 1

    def _lease_room(self, connection: Connection) -> int:
        """Return how many more slots a connection may lease; those of its fetches in work count as leased."""
        limits, num_slots = self.limits, connection.require_tenant().size_class.num_slots
        room = max(1, int(num_slots * limits.lease_share_of_client)) - connection.num_leases - connection.num_fetching
        return min(room, limits.leases - self.num_leases)

    def _count_leases(self, connection: Connection, change: int) -> None:
        connection.num_leases += change
        self.num_leases += change

    def forget_unused(self) -> None:
        """Forget namespaces that have no client, no block and no file, and sizes of blocks that none of them has.

        What was to be evicted and was in use goes first.
        """
        for size_class in self.slab.classes.values():
            size_class.chosen.retry()
        busy = {load.tenant for load in self._loads.values()} | set(self._fetching.values())
        num_own = int(self.store is not None)
        for tenant in list(self.tenants.values()):
            if not (tenant.clients or tenant.warm_blocks or tenant in busy or len(tenant.sources) > num_own):
                del self.tenants[tenant.digest]
                self.description_bytes -= len(tenant.description)
        used = {tenant.size_class for tenant in self.tenants.values()}
        for size_class in list(self.slab.classes.values()):
            if size_class not in used and not size_class.chosen.marked:
                self.slab.drop_class(size_class)

    def _make_room_for_tenant(self, description_bytes: int, stride_bytes: int) -> None:
        """Keep the table of namespaces small, and have a size class for one more, as far as that can be.

        Namespaces without a client are given up with their blocks, the one that was left first goes first.
        """

        def has_room() -> bool:
            return (
                len(self.tenants) < self.limits.namespaces
                and self.description_bytes + description_bytes <= self.limits.description_bytes
                and self.slab.has_room_for_class(stride_bytes)
            )

        if has_room():
            return
        self.forget_unused()
        for tenant in sorted(self.tenants.values(), key=lambda each: each.left_at):
            if has_room():
                return
            if not tenant.clients:
                self._unpin_tenant(tenant)
                size_class = tenant.size_class
                size_class.evict(size_class.num_slots, self._is_of(tenant))
                self.forget_unused()

    def _is_of(self, tenant: Tenant) -> Callable[[int], bool]:
        """Return a function that tells whether a slot holds a block of a namespace."""
        size_class, tenants = tenant.size_class, self._slot_tenants
        return lambda slot: tenants.get((size_class, slot)) is tenant

    def _unpin_tenant(self, tenant: Tenant) -> None:
        """End all that has been pinned in a namespace."""
        index = tenant.size_class.index
        for entry in self._entries_of(tenant) if tenant.pinned_bytes else ():
            if entry.pinned:
                index.set_pinned(entry, False)
        tenant.pinned_bytes = 0

    def _entries_of(self, tenant: Tenant) -> list[Entry]:
        """Return a namespace's entries, parents first, chain by chain."""
        root = self._root(tenant)
        pending = list(root.children) if root else []
        found: list[Entry] = []
        while pending:
            entry = pending.pop()
            pending += entry.children
            found.append(entry)
        return found

    def _root_hash(self, digest: BlockHash) -> BlockHash:
        """Return the key of a namespace's root in an index: one that no client can give to a block."""
        return hashlib.sha256(self._secret + digest).digest()[:HASH_BYTES]

    def is_computed(self, connection: Connection, block_hash: BlockHash) -> bool:
        """Tell whether some other connection has promised this block and not brought it yet."""
        claim = connection.require_tenant().claims.get(block_hash)
        return claim is not None and claim.connection is not connection and claim.expires_at > self._clock()

    def end_claim(self, connection: Connection, number: int) -> None:
        """Nobody computes what is left of this claim any more."""
        claim = connection.claims.get(number)
        tenant = connection.tenant
        if claim is None or tenant is None:
            return
        for block_hash in list(claim.hashes):
            self._take_from_claim(tenant, claim, block_hash)
            self.news.append(block_hash)

    def end_expired_claims(self) -> None:
        """Free what has been promised and not brought for too long."""
        now = self._clock()
        for connection in self.connections:
            while connection.claims and (first := next(iter(connection.claims.values()))).expires_at <= now:
                self.end_claim(connection, first.number)

    def _claim_for(self, connection: Connection, missing: list[BlockHash]) -> tuple[int, bool]:
        """Return (claim, whether somebody else computes the first missing block). Who holds a claim never waits.

        No more blocks are promised than the limits allow: of the others nobody knows who computes them.
        """
        if self.is_computed(connection, missing[0]) and not connection.claims:
            return 0, True
        tenant, now = connection.require_tenant(), self._clock()
        room = self.limits.claimed_blocks_of_client - connection.num_promised
        room = min(room, self.limits.claimed_blocks - self.num_promised)
        free: set[BlockHash] = set()
        for block_hash in missing:
            if len(free) >= room:
                break
            other = tenant.claims.get(block_hash)
            if other is None or other.expires_at <= now:
                free.add(block_hash)
        if not free:
            return 0, False
        claim = Claim(next(self._numbers), connection, free, now + self.limits.claim_s)
        for block_hash in free:
            if (old := tenant.claims.get(block_hash)) is not None:
                self._take_from_claim(tenant, old, block_hash)
            tenant.claims[block_hash] = claim
        connection.claims[claim.number] = claim
        connection.num_promised += len(free)
        self.num_promised += len(free)
        return claim.number, False

    def _take_from_claim(self, tenant: Tenant, claim: Claim, block_hash: BlockHash) -> None:
        """A block is promised no more; a claim ends with its last block."""
        del tenant.claims[block_hash]
        claim.hashes.discard(block_hash)
        claim.connection.num_promised -= 1
        self.num_promised -= 1
        if not claim.hashes:
            del claim.connection.claims[claim.number]
