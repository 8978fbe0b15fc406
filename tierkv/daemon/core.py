"""The daemon's core: which client may read which slot, writes which slot, computes which block. No sockets, no bytes.

The server and the tests drive it with plain values. The core owns four small objects, and itself does what concerns
more than one of them:

- `leases`: a lease pins a slot for one connection to read. It ends when it is released, or with the connection.
- `loads`: a load reads a block from a cold source into a slot; other fetches of the block wait for it.
- `reservations`: a reservation gives a connection one slot to write one block into. The block's entry gets that slot
  only when the connection publishes it.
- `claims`: a claim says which connection computes blocks that no tier has.

A hash is a key and no proof. A block is found only by following the chain from the namespace's own entry, comparing
each entry's parent (the object) and token ids. Of a block that is only in a cold source the core compares hash, parent
and length; the thread that reads it compares its content digest, which covers every token up to its end.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence

from tierkv.daemon.claims import Claims
from tierkv.daemon.counters import EventCounter
from tierkv.daemon.flag_leases import FlagLeases
from tierkv.daemon.leases import Leases
from tierkv.daemon.limits import Limits
from tierkv.daemon.loads import Loads
from tierkv.daemon.messages import NO_SLOT, Found, Match, Pin, Published, Release
from tierkv.daemon.pins import Pins
from tierkv.daemon.protocol import ProtocolError, split_numbers
from tierkv.daemon.reservations import Reservations
from tierkv.daemon.slab import SharedSlab
from tierkv.daemon.tenants import Tenants
from tierkv.daemon.values import BlockSource, Connection, Load, Tenant, Write, is_unknown, whole_hashes
from tierkv.index.chosen_eviction import Choice, Evicted
from tierkv.index.index import Entry
from tierkv.policies import EvictionPolicy, LRUPolicy
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.values.block import BlockHash, Tier
from tierkv.values.layout import BlockLayout

__all__ = ["Core"]


class Core:
    """All state of the daemon's shared memory. Not thread-safe: the thread of the server's loop calls it.

    store: the cold tier, if there is one. pin_share: of the slab, that one owner (salt) may pin.
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
        self.limits: Limits = limits or Limits()
        self.store = store
        self.clock = clock
        self.tenants: Tenants = Tenants(
            slab_bytes,
            clock=clock,
            store=store,
            make_policy=make_policy,
            extent_bytes=extent_bytes,
            limits=self.limits,
        )
        self.slab: SharedSlab = self.tenants.slab
        self.leases: Leases = Leases(self.limits)
        self.loads: Loads = Loads(self.tenants, self.leases)
        self.reservations: Reservations = Reservations(self.tenants)
        self.flag_leases: FlagLeases = FlagLeases(self.tenants, self.limits)
        self.claims: Claims = Claims(self.limits, clock)
        self.connections: set[Connection] = set()
        self.counters: EventCounter = EventCounter()
        self.pins: Pins = Pins(
            self.tenants,
            self.leases,
            clock=clock,
            quota_bytes=int(slab_bytes * pin_share),
            quota_of_all_bytes=int(slab_bytes * max(pin_share, self.limits.pinned_share)),
        )
        self._writes: set[Write] = set()

    def connect(self) -> Connection:
        """Return a new connection that has no namespace yet."""
        connection = Connection()
        self.connections.add(connection)
        return connection

    def open_tenant(
        self,
        connection: Connection,
        digest: BlockHash,
        description: bytes,
        *,
        layout: BlockLayout,
        name: str = "",
        owner: str = "",
        codec: str = "",
        has_rows: bool = False,
        is_member: bool = False,
    ) -> Tenant:
        """Let a connection use a namespace. The digest is that of the description; has_rows is what it says.

        is_member: the connection belongs to another user, and its name of the namespace is not shown.

        Raises CapacityError if its blocks fit no slab, or clients use as many namespaces or block sizes as they may.
        """
        assert connection.tenant is None and not connection.is_closed
        tenant = self.tenants.open(
            digest,
            description,
            layout=layout,
            name=name,
            owner=owner,
            codec=codec,
            has_rows=has_rows,
            is_member=is_member,
        )
        connection.tenant = tenant
        tenant.clients += 1
        return tenant

    def disconnect(self, connection: Connection) -> None:
        """End everything that a connection held. May be called twice."""
        if connection.is_closed:
            return
        connection.is_closed = True
        self.connections.discard(connection)
        for number in list(connection.claims):
            self.claims.end(connection, number)
        tenant = connection.tenant
        if tenant is None:
            return
        tenant.clients -= 1
        tenant.left_at = self.clock()
        self.flag_leases.disconnect(connection)
        self.leases.release_all(connection)
        self.reservations.abandon(connection, list(connection.reservations))
        for number in list(connection.cursors):
            self.loads.end_cursor(connection, number)
        tenant.size_class.chosen.retry()

    def match(self, connection: Connection, message: Match) -> Found:
        """Return how much of a prompt is there; lease what lies in the warm tier if asked to. Raises ProtocolError."""
        tenant = connection.require_tenant()
        hashes = whole_hashes(tenant, message.hashes, message.tokens, most=self.limits.blocks_of_message)
        if message.min_partial_tokens < 1:
            raise ProtocolError(f"a partial block of {message.min_partial_tokens} tokens")
        if not 0 <= message.start <= len(hashes):
            raise ProtocolError(f"block {message.start} of {len(hashes)} to start from")
        known = self.tenants.walk(tenant, hashes, message.tokens)
        slots, has_cold, has_failed = self.leases.find_blocks(connection, known, hashes, message)
        total = message.start + len(slots) if slots is not None else 0
        partial_block = None
        if slots is not None:
            parent = self.tenants.parent_entry(tenant, known, total)
            partial_block, failed = self.leases.find_partial(connection, hashes, total, parent, message)
            has_failed |= failed
        cursor = 0
        if message.lease and (has_cold or (partial_block and partial_block.slot == NO_SLOT)):
            cursor = self.loads.open_cursor(self.connections, connection, message, total, partial_block)
        miss = ""
        if has_failed:
            miss = MissReason.IO_ERROR.value
        elif total < len(hashes) and is_unknown(known, total) and tenant.size_class.index.peek(hashes[total]):
            miss = MissReason.COLLISION.value
        claim, is_computing = 0, False
        if message.wants_claim and total < len(hashes):
            claim, is_computing = self.claims.claim(connection, hashes[total:])
        found = slots if slots is not None else array("I")
        if message.is_use:
            tenant.size_class.index.touch_all([entry for entry in known[message.start : total] if entry])
        self.counters["matched_blocks"] += len(found)
        self.counters.add("missed_blocks", len(hashes) - total, reason=miss or MissReason.ABSENT.value)
        flags = tenant.size_class.flags
        return Found(
            generations=flags.generations(found) if flags and connection.has_flags and message.lease else b"",
            slots=found.tobytes(),
            partial_block=partial_block,
            cursor=cursor,
            claim=claim,
            is_computing=is_computing,
            miss=miss,
        )

    def release(self, connection: Connection, message: Release) -> None:
        """End leases and cursors. Raises ProtocolError, with nothing ended, for a slot that is not leased."""
        slots, cursors = split_numbers(message.slots), split_numbers(message.cursors)
        self.leases.release(connection, slots)
        for cursor in cursors:
            self.loads.end_cursor(connection, cursor)

    def finish_load(self, load: Load, reason: MissReason | None) -> None:
        """End a load. reason: why its slot does not hold the block, or None if it does."""
        if reason is None:
            self.claims.fulfil(load.tenant, load.entry.block_hash)
            self.counters["loaded_blocks"] += 1
        self.loads.finish(load, reason)

    def publish(self, connection: Connection, slots: bytes) -> tuple[Published, list[Write]]:
        """Let every client find the blocks in reserved slots. Return the answer and what the store has yet to get.

        Raises ProtocolError, with nothing published, for a slot that this connection has not reserved.
        """
        tenant = connection.require_tenant()
        published, lost = self.reservations.publish(connection, split_numbers(slots))
        writes: list[Write] = []
        for entry, slot in published:
            self.claims.fulfil(tenant, entry.block_hash)
            if self.store is None:
                tenant.size_class.index.unpin(Tier.WARM, slot)
            else:
                writes.append(Write(tenant, entry, slot))
        if followers := self._write_followers(tenant, {write.entry for write in writes}):
            writes = sorted(writes + followers, key=lambda write: write.entry.depth)  # parents first
        self._writes.update(writes)
        self.counters["published_blocks"] += len(published)
        return Published(count=len(published), lost=lost.tobytes()), writes

    def _write_followers(self, tenant: Tenant, published: set[Entry]) -> list[Write]:
        """Return writes of warm blocks that follow published ones. The store removes them with a damaged one."""
        pending = [child for entry in published for child in entry.children if child not in published]
        writes: list[Write] = []
        for entry in pending:  # the list grows in the loop
            pending += (child for child in entry.children if child not in published)
            if entry.warm_slot is not None:
                tenant.size_class.index.pin(entry, Tier.WARM)
                writes.append(Write(tenant, entry, entry.warm_slot))
        return writes

    def finish_write(self, write: Write, *, is_stored: bool, reason: str = "") -> None:
        """Note that a published block has been written to the store, or could not be. reason: why it was not."""
        self._writes.discard(write)
        write.entry.in_cold = is_stored
        self.counters["stored_blocks"] += is_stored
        self.counters.add("skipped_writes", not is_stored, reason=reason or PutOutcome.IO_ERROR.value)
        write.tenant.size_class.index.unpin(Tier.WARM, write.slot)

    def pin(self, connection: Connection, message: Pin) -> list[BlockHash]:
        """Pin or unpin a prompt's blocks, as `Pins.pin` does."""
        return self.pins.pin(connection, message)

    def evict(self, connection: Connection, count: int) -> int:
        """Evict blocks of the connection's namespace from the warm tier, all for -1; return how many went."""
        tenant = connection.require_tenant()
        if count < -1:
            raise ProtocolError(f"{count} blocks to evict")
        wanted = tenant.size_class.num_slots if count < 0 else count
        return tenant.size_class.evict(wanted, self.tenants.owns(tenant))

    def evict_chosen(self, namespace: BlockHash, choice: Choice) -> Evicted:
        """Evict the chosen blocks of one namespace, or of all where `namespace` is empty, from the warm tier.

        A block that is leased, loaded or written is marked: no client finds it any more, and it is removed when its
        last user ends.
        """
        blocks: Counter[Tier] = Counter()
        stayed: Counter[str] = Counter()
        for tenant in self.tenants.by_digest.values():
            root = self.tenants.root(tenant)
            if root is None or namespace not in (b"", tenant.digest):
                continue
            found = tenant.size_class.chosen.evict(root, choice, tenant.step)
            blocks += found.blocks
            stayed += found.stayed
        return Evicted(blocks, stayed)

    def is_marked(self, write: Write) -> bool:
        """Return whether a block that is to be stored was evicted meanwhile. Any thread may call it."""
        return write.entry in write.tenant.size_class.chosen.marked

    def count_marked(self) -> dict[str, int]:
        """Return how many evicted blocks are still in use, by what uses them."""
        leased = {
            (connection.tenant.size_class, slot)
            for connection in self.connections
            if connection.tenant
            for slot in connection.leases
        }
        for size_class in self.slab.classes.values():
            slots = [entry.warm_slot for entry in size_class.chosen.marked if entry.warm_slot is not None]
            leased.update(
                (size_class, slot) for slot in (size_class.flags.flagged_of(slots) if size_class.flags else ())
            )
        counts = Counter(
            "warm, leased to clients" if (size_class, entry.warm_slot) in leased else "warm, being read or written"
            for size_class in self.slab.classes.values()
            for entry in size_class.chosen.marked
            if entry.awaited or entry.warm_slot is not None
        )
        return dict(counts)

    def trim(self) -> int:
        """Evict a few blocks ahead of need where the slab is full. End expired claims; forget unused namespaces.

        Marked blocks that are no longer in use are removed too. Return how many blocks were evicted ahead of need.
        """
        self.claims.end_expired(self.connections)
        self.pins.end_expired()
        self.tenants.forget_unused()
        return self.tenants.shares.trim(self.slab.classes.values())

    def warm_entries(self, tenant: Tenant) -> list[Entry]:
        """Return a namespace's blocks in the warm tier, parents first, each pinned until `unpin_entries`."""
        marked = tenant.size_class.chosen.marked
        found = [each for each in self.tenants.entries_of(tenant) if each.warm_slot is not None and each not in marked]
        for entry in found:
            tenant.size_class.index.pin(entry, Tier.WARM)
        return found

    def unpin_entries(self, tenant: Tenant, slots: Sequence[int]) -> None:
        """Unpin what `warm_entries` pinned."""
        tenant.size_class.index.unpin_all(Tier.WARM, slots)

    @property
    def num_writes(self) -> int:
        """Published blocks that the store has not got yet."""
        return len(self._writes)

    def check(self) -> None:
        """Raise AssertionError unless every slot, pin, reservation and claim is accounted for."""
        connections, tenants = self.connections, self.tenants.by_digest.values()
        pins = Counter(
            (size_class, slot)
            for size_class in self.slab.classes.values()
            for slot in range(size_class.num_slots)
            if not size_class.is_usable(slot)
        )
        for connection in connections:
            if connection.tenant:
                size_class = connection.tenant.size_class
                for slot, count in connection.leases.items():
                    pins[size_class, slot] += count
                pins.update((size_class, slot) for slot in connection.reservations)
        for tenant, slot, count in self.loads.pins():
            pins[tenant.size_class, slot] += count
        pins.update((write.tenant.size_class, write.slot) for write in self._writes)
        for size_class in self.slab.classes.values():
            pins.update((size_class, slot) for slot in size_class.flagged)
            for slot in range(size_class.num_slots):
                count = size_class.index.warm.reference_count(slot)
                assert count == pins[size_class, slot], f"slot {slot} has {count} pins"
        self.tenants.check()
        self.leases.check(connections)
        self.loads.check(tenants, connections)
        self.reservations.check(self.slab.classes.values(), connections)
        self.claims.check(tenants, connections)
