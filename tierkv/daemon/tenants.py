"""Tenants: the namespaces in use, and their chains of blocks in the indices of the slab."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.shares import WarmShares
from tierkv.daemon.size_class import SizeClass
from tierkv.daemon.slab import SharedSlab
from tierkv.daemon.values import BlockSource, Tenant
from tierkv.errors import CapacityError
from tierkv.index.index import Entry
from tierkv.policies import EvictionPolicy
from tierkv.remote_tiers.remotes import Remotes
from tierkv.storage.warm import slot_stride
from tierkv.values.block import HASH_BYTES, BlockHash, Tier
from tierkv.values.layout import BlockLayout

__all__ = ["Tenants"]


class Tenants:
    """The table of namespaces. It finds, makes and removes the entries of their blocks.

    A block is found only by following its chain from the namespace's own root entry, which no client can name.
    """

    def __init__(
        self,
        slab_bytes: int,
        *,
        clock: Callable[[], float],
        store: BlockSource | None,
        make_policy: Callable[[], EvictionPolicy],
        extent_bytes: int | None,
        limits: Limits,
    ) -> None:
        self.limits = limits
        self.clock = clock
        self.store = store
        self.remotes: Remotes | None = None
        self.slab: SharedSlab = SharedSlab(
            slab_bytes,
            make_policy=make_policy,
            clock=clock,
            forgotten=self._forget_slot,
            extent_bytes=extent_bytes,
            limits=limits,
        )
        self.by_digest: dict[BlockHash, Tenant] = {}
        self.shares: WarmShares = WarmShares(
            self.by_digest.values, lambda size_class, slot: self._slot_tenants.get((size_class, slot))
        )
        self.slab.may_lose = self.shares.may_lose
        self.description_bytes: int = 0
        self._secret = os.urandom(HASH_BYTES)
        self._slot_tenants: dict[tuple[SizeClass, int], Tenant] = {}

    def open(
        self,
        digest: BlockHash,
        description: bytes,
        *,
        layout: BlockLayout,
        name: str,
        owner: str,
        codec: str,
        has_rows: bool,
        is_member: bool,
    ) -> Tenant:
        """Return the tenant of a namespace; add it if it is new. Raises CapacityError, as `Core.open_tenant` does."""
        tenant = self.by_digest.get(digest)
        if tenant is not None and tenant.is_of_member and not is_member:  # the name is not covered by the digest
            self.description_bytes += len(description) - len(tenant.description)
            tenant.description, tenant.name, tenant.is_of_member = description, name, False
        if tenant is None:
            stride_bytes = slot_stride(layout.block_bytes)
            self._make_room(len(description), stride_bytes)
            if not self._has_place(len(description)):
                raise CapacityError(
                    f"the daemon serves {len(self.by_digest)} namespaces already, all of them in use",
                    hint="close clients of other models",
                )
            size_class = self.slab.class_of(stride_bytes)
            root_hash = self._root_hash(digest)
            name = "" if is_member else name
            tenant = Tenant(digest, description, name, owner, layout, size_class, root_hash, codec, has_rows)
            tenant.is_of_member = is_member
            if self.store is not None:
                tenant.sources.append(self.store)
            if self.remotes is not None:
                tenant.remote = self.remotes.source(description)
                tenant.sources.append(tenant.remote)
            self.by_digest[digest] = tenant
            self.description_bytes += len(description)
        assert (tenant.layout, tenant.has_rows) == (layout, has_rows), "a digest covers both"
        return tenant

    def walk(self, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes) -> Sequence[Entry | None]:
        """Return the entries of a chain, from its first block to the last one that the index has.

        Of rows, return an entry for each, or None.
        """
        index, step = tenant.size_class.index, tenant.step
        parent = self.root(tenant)
        known: list[Entry] = []
        if parent is None:
            return known
        if tenant.has_rows:
            return [self._find_row(tenant, parent, row, tokens[at * step :][:step]) for at, row in enumerate(hashes)]
        peek = index.peek
        marked = tenant.size_class.chosen.marked
        start = 0
        for block_hash in hashes:
            entry = peek(block_hash)
            if entry is None or entry.parent is not parent or entry.token_bytes != tokens[start : start + step]:
                break
            if marked and entry in marked:
                break  # evicted, and removed when its last user ends
            known.append(entry)
            parent = entry
            start += step
        return known

    def root(self, tenant: Tenant) -> Entry | None:
        """Return the root entry of a namespace, if it has any block."""
        return tenant.size_class.index.peek(tenant.root_hash)

    def parent_entry(self, tenant: Tenant, known: Sequence[Entry | None], total: int) -> Entry | None:
        """Return the entry that block `total` of a prompt follows, where the index has it. known: as `walk` returns."""
        if total > len(known):
            return None
        return known[total - 1] if total else self.root(tenant)

    def insert(self, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes, wanted: Sequence[int]) -> dict[int, Entry]:
        """Return the entries of the wanted blocks and of those that they follow, by number; make the missing ones.

        wanted: numbers, in order. A block is left out at a collision, and those that follow it.
        """
        step = tenant.step
        root = parent = tenant.size_class.root_of(tenant.root_hash)
        entries: dict[int, Entry] = {}
        for at in wanted if tenant.has_rows else range(wanted[-1] + 1):
            entry = self._insert_child(tenant, parent, hashes[at], tokens[at * step : (at + 1) * step])
            if entry is not None:
                entries[at] = entry
            elif not tenant.has_rows:
                break
            if entry is not None and not tenant.has_rows:
                parent = entry
        if not entries:
            self.prune(tenant, root)
        return entries

    def prune(self, tenant: Tenant, entry: Entry) -> None:
        """Remove an entry without a slot that is not in use, and then its parents."""
        if entry.warm_slot is None:
            tenant.size_class.index.forget(entry)

    def attach(self, tenant: Tenant, entry: Entry, slot: int) -> None:
        """Record that a slot holds the bytes of a block: from now on every client finds it."""
        tenant.size_class.index.attach(entry, Tier.WARM, slot)
        tenant.warm_blocks += 1
        self._slot_tenants[tenant.size_class, slot] = tenant

    def entries_of(self, tenant: Tenant) -> list[Entry]:
        """Return all entries of a namespace, parents before children."""
        root = self.root(tenant)
        pending = list(root.children) if root else []
        found: list[Entry] = []
        while pending:
            entry = pending.pop()
            pending += entry.children
            found.append(entry)
        return found

    def least_recent(self, to_bytes: int) -> set[BlockHash]:
        """Return the hashes of the blocks whose eviction leaves at most so many bytes in the warm tier."""
        blocks = [
            (entry.last_access, -entry.depth, tenant.layout.block_bytes, entry.block_hash)
            for tenant in self.by_digest.values()
            for entry in self.entries_of(tenant)
            if entry.warm_slot is not None
        ]
        excess = sum(size for _, _, size, _ in blocks) - to_bytes
        chosen: set[BlockHash] = set()
        for _, _, size, block_hash in sorted(blocks):
            if excess <= 0:
                break
            chosen.add(block_hash)
            excess -= size
        return chosen

    def owns(self, tenant: Tenant) -> Callable[[int], bool]:
        """Return a function that says whether a slot holds a block of this namespace."""
        size_class, tenants = tenant.size_class, self._slot_tenants
        return lambda slot: tenants.get((size_class, slot)) is tenant

    def unpin(self, tenant: Tenant) -> None:
        """Unpin every block of a namespace."""
        index = tenant.size_class.index
        for entry in self.entries_of(tenant) if tenant.pinned_bytes else ():
            if entry.pinned:
                index.set_pinned(entry, False)
        tenant.pinned_bytes = 0

    def forget_unused(self) -> None:
        """Remove namespaces without a client, a block, a load or a state file, and size classes without a namespace."""
        for size_class in self.slab.classes.values():
            size_class.unpin_unflagged()
            size_class.chosen.retry()
        num_own = int(self.store is not None) + int(self.remotes is not None)
        for tenant in list(self.by_digest.values()):
            if not (tenant.clients or tenant.warm_blocks or tenant.num_loading or len(tenant.sources) > num_own):
                del self.by_digest[tenant.digest]
                self.description_bytes -= len(tenant.description)
        used = {tenant.size_class for tenant in self.by_digest.values()}
        for size_class in list(self.slab.classes.values()):
            if size_class not in used and not size_class.chosen.marked:
                self.slab.drop_class(size_class)

    def check(self) -> None:
        """Raise AssertionError unless the counts are right and every slot with a block has its tenant."""
        for size_class in self.slab.classes.values():
            owners = size_class.index.warm.owners
            for slot in range(size_class.num_slots):
                assert (owners[slot] is not None) == ((size_class, slot) in self._slot_tenants)
            size_class.index.check()
        counted = Counter(self._slot_tenants.values())
        tenants = self.by_digest.values()
        for tenant in tenants:
            awaited = [entry for entry in self.entries_of(tenant) if entry.awaited and entry.warm_slot is None]
            assert tenant.num_awaited == len(awaited), "slots that are being filled are not counted"
            for entry in self.entries_of(tenant):
                assert entry.warm_slot is not None or entry.awaited or entry.children, "an entry that nothing uses"
        assert all(tenant.warm_blocks == counted[tenant] for tenant in tenants)
        assert self.description_bytes == sum(len(tenant.description) for tenant in tenants)
        for tenant in tenants:
            assert self.slab.classes.get(tenant.size_class.stride_bytes) is tenant.size_class

    def _find_row(self, tenant: Tenant, root: Entry, block_hash: BlockHash, token_bytes: bytes) -> Entry | None:
        entry = tenant.size_class.index.peek(block_hash)
        if entry is None or entry.parent is not root or entry.token_bytes != token_bytes:
            return None
        return None if entry in tenant.size_class.chosen.marked else entry

    def _insert_child(self, tenant: Tenant, parent: Entry, block_hash: BlockHash, token_bytes: bytes) -> Entry | None:
        """Return the entry of a block that follows another one; None at a collision."""
        index = tenant.size_class.index
        other = index.find_child(parent, token_bytes)
        if other and other.block_hash != block_hash:
            return None  # one of the two hashes is forged
        entry = index.insert(block_hash, parent.block_hash, token_bytes)
        return entry if entry is not None and entry.parent is parent else None

    def _forget_slot(self, size_class: SizeClass, slot: int) -> None:
        self._slot_tenants.pop((size_class, slot)).warm_blocks -= 1

    def _has_place(self, description_bytes: int) -> bool:
        return (
            len(self.by_digest) < self.limits.namespaces
            and self.description_bytes + description_bytes <= self.limits.description_bytes
        )

    def _make_room(self, description_bytes: int, stride_bytes: int) -> None:
        """Make room for one more namespace and its block size, if need be and as far as that is possible.

        Namespaces without a client are evicted, the one whose last client left first comes first.
        """

        def has_room() -> bool:
            return self._has_place(description_bytes) and self.slab.has_room_for_class(stride_bytes)

        if has_room():
            return
        self.forget_unused()
        for tenant in sorted(self.by_digest.values(), key=lambda each: each.left_at):
            if has_room():
                return
            if not tenant.clients:
                self.unpin(tenant)
                size_class = tenant.size_class
                size_class.evict(size_class.num_slots, self.owns(tenant))
                self.forget_unused()

    def _root_hash(self, digest: BlockHash) -> BlockHash:
        """Return the key of a namespace's root in an index. It is secret: no client can give it to a block."""
        return hashlib.sha256(self._secret + digest).digest()[:HASH_BYTES]
