"""The daemon's mind: who may read which slot, who writes which, who computes what. No sockets, no bytes, no clock.

Every rule about shared memory is here, as a state machine over plain values, driven by the server and by tests:

- A **lease** pins a slot for one connection; it ends by `release` or with the connection.
- A **reservation** gives a connection one slot to write one block into. Its entry in the index has no place yet,
  so that nobody finds it, until `publish` attaches the slot. A second writer of the same block is told that it is
  busy.
- A **load** brings a block from a cold source into a slot; whoever wants the block meanwhile joins it.
- A **claim** says who computes blocks that nobody has. It ends with their publication or with the connection.

Identity: a hash is a key and no proof. A block is found only by following the chain from the namespace's own
entry, comparing each entry's parent (the object) and token ids. Of a block behind that in a cold source the core
compares hash, parent and length; who reads it compares its content digest, which covers every token up to its end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tierkv.daemon.fetching import Fetching
from tierkv.daemon.matching import Matching
from tierkv.daemon.messages import Match, Pin
from tierkv.daemon.protocol import ProtocolError
from tierkv.daemon.values import Connection, FetchTask, Load, Tenant, Write, whole_hashes
from tierkv.daemon.writing import Writing
from tierkv.errors import CapacityError, DaemonError
from tierkv.index.chosen_eviction import Choice, Evicted
from tierkv.index.index import Entry
from tierkv.storage.warm import slot_stride
from tierkv.values.block import BlockHash, Tier
from tierkv.values.layout import BlockLayout

__all__ = ["Connection", "Core", "FetchTask", "Load", "Tenant", "Write"]


class Core(Matching, Fetching, Writing):
    """All state of the daemon, and what may be done with it. Not thread-safe: the server's one thread calls it.

    The tables are in `state`, leases in `matching`, loads in `fetching`, reservations in `writing`.
    store: the cold tier, if there is one. pin_share: of the slab, that one owner (salt) may pin.
    """

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
    ) -> Tenant:
        """Let a connection work on a namespace, made known if need be. The digest is that of the description.

        Raises CapacityError if its blocks fit no slab, or clients use as many namespaces or sizes as there may be.
        """
        assert connection.tenant is None and not connection.is_closed
        tenant = self.tenants.get(digest)
        if tenant is None:
            stride_bytes = slot_stride(layout.block_bytes)
            self._make_room_for_tenant(len(description), stride_bytes)
            if len(self.tenants) >= self.limits.namespaces or (
                self.description_bytes + len(description) > self.limits.description_bytes
            ):
                raise CapacityError(
                    f"the daemon serves {len(self.tenants)} namespaces already, all of them in use",
                    hint="close clients of other models",
                )
            size_class = self.slab.class_of(stride_bytes)
            tenant = Tenant(digest, description, name, owner, layout, size_class, self._root_hash(digest), codec)
            if self.store is not None:
                tenant.sources.append(self.store)
            self.tenants[digest] = tenant
            self.description_bytes += len(description)
        assert tenant.layout == layout, "a digest covers the layout"
        connection.tenant = tenant
        tenant.clients += 1
        return tenant

    def disconnect(self, connection: Connection) -> None:
        """Take everything back that a connection held. May be called twice."""
        if connection.is_closed:
            return
        connection.is_closed = True
        self.connections.discard(connection)
        for number in list(connection.claims):
            self.end_claim(connection, number)
        tenant = connection.tenant
        if tenant is None:
            return
        tenant.clients -= 1
        tenant.left_at = self._clock()
        tenant.size_class.index.unpin_all(Tier.WARM, list(connection.leases.elements()))
        connection.leases.clear()
        self._count_leases(connection, -connection.num_leases)
        self.abandon(connection, list(connection.reservations))
        for number in list(connection.cursors):
            self._end_cursor(connection, number)
        tenant.size_class.chosen.retry()

    def pin(self, connection: Connection, message: Pin) -> list[BlockHash]:
        """Pin or unpin a prompt's blocks; return the hashes of all that are there, for the store to do the same.

        Raises DaemonError, with nothing changed, if the owner (salt) would have pinned more than its share.
        """
        tenant = connection.require_tenant()
        hashes = whole_hashes(tenant, message.hashes, message.tokens, most=self.limits.blocks_of_message)
        known = self._walk(tenant, hashes, message.tokens)
        ask = Match(hashes=message.hashes, tokens=message.tokens)
        slots, _, _ = self._find_blocks(connection, known, hashes, ask)
        total = len(slots or ())
        parent = self._parent_entry(tenant, known, total)
        partial_block, _ = self._find_partial(connection, hashes, total, parent, ask)
        entries = known[:total]
        if (
            partial_block
            and (entry := tenant.size_class.index.peek(partial_block.block_hash))
            and entry.parent is parent
        ):
            entries.append(entry)
        changing = [entry for entry in entries if entry.warm_slot is not None and entry.pinned is not message.pinned]
        change = len(changing) * tenant.layout.block_bytes * (1 if message.pinned else -1)
        pinned = sum(each.pinned_bytes for each in self.tenants.values() if each.owner == tenant.owner)
        if change > 0 and pinned + change > self.pin_quota_bytes:
            raise DaemonError(
                f"pinning {len(changing)} more blocks takes {pinned + change} bytes of the warm tier, "
                f"and one tenant may pin {self.pin_quota_bytes}",
                hint="unpin other prompts, or start the daemon with a larger --warm",
            )
        if change > 0:
            self._make_room_to_pin(tenant, change)
        for entry in changing:
            tenant.size_class.index.set_pinned(entry, message.pinned)
        tenant.pinned_bytes += change
        return hashes[:total] + ([partial_block.block_hash] if partial_block else [])

    def _make_room_to_pin(self, tenant: Tenant, more_bytes: int) -> None:
        """Have all tenants together pin no more than they may, by unpinning what clients that have gone have pinned.

        Raises DaemonError, with nothing pinned, if that is not enough.
        """
        most = self.pin_quota_of_all_bytes - more_bytes
        for other in sorted(self.tenants.values(), key=lambda each: each.left_at):
            if sum(each.pinned_bytes for each in self.tenants.values()) <= most:
                return
            if not other.clients and other is not tenant:
                self._unpin_tenant(other)
        if sum(each.pinned_bytes for each in self.tenants.values()) > most:
            raise DaemonError(
                f"all tenants together may pin {self.pin_quota_of_all_bytes} bytes of the warm tier",
                hint="unpin other prompts, or start the daemon with a larger --warm",
            )

    def evict(self, connection: Connection, count: int) -> int:
        """Evict blocks of the connection's namespace from the warm tier, all for -1; return how many went."""
        tenant = connection.require_tenant()
        if count < -1:
            raise ProtocolError(f"{count} blocks to evict")
        wanted = tenant.size_class.num_slots if count < 0 else count
        return tenant.size_class.evict(wanted, self._is_of(tenant))

    def evict_chosen(self, namespace: BlockHash, choice: Choice) -> Evicted:
        """Evict what is chosen from the warm tier, of one namespace or, where that is empty, of all.

        What is leased or on its way is marked: it serves nobody any more, and goes with its last user.
        """
        blocks: Counter[Tier] = Counter()
        stayed: Counter[str] = Counter()
        for tenant in self.tenants.values():
            root = self._root(tenant)
            if root is None or namespace not in (b"", tenant.digest):
                continue
            found = tenant.size_class.chosen.evict(root, choice, tenant.step)
            blocks += found.blocks
            stayed += found.stayed
        return Evicted(blocks, stayed)

    def is_marked(self, write: Write) -> bool:
        """Tell whether a block that is to be stored was evicted meanwhile. For any thread."""
        return write.entry in write.tenant.size_class.chosen.marked

    def now(self) -> float:
        """Return the time by which accesses are noted."""
        return self._clock()

    def count_marked(self) -> dict[str, int]:
        """Return how many evicted blocks are still in use, by what uses them."""
        leased = {
            (connection.tenant.size_class, slot)
            for connection in self.connections
            if connection.tenant
            for slot in connection.leases
        }
        counts = Counter(
            "warm, leased to clients" if (size_class, entry.warm_slot) in leased else "warm, being read or written"
            for size_class in self.slab.classes.values()
            for entry in size_class.chosen.marked
            if entry.awaited or entry.warm_slot is not None
        )
        return dict(counts)

    def least_recent(self, to_bytes: int) -> set[BlockHash]:
        """Return the hashes of the blocks whose eviction leaves at most so many bytes in the warm tier."""
        blocks = [
            (entry.last_access, -entry.depth, tenant.layout.block_bytes, entry.block_hash)
            for tenant in self.tenants.values()
            for entry in self._entries_of(tenant)
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

    def trim(self) -> int:
        """Evict a little ahead of need where the slab is full, and what was to be evicted and was in use; free what has
        expired and what nobody uses.
        """
        self.end_expired_claims()
        self.forget_unused()
        return sum(size_class.trim() for size_class in self.slab.classes.values())

    def warm_entries(self, tenant: Tenant) -> list[Entry]:
        """Return a namespace's blocks in the warm tier, parents first, each pinned; `unpin_entries` ends that."""
        marked = tenant.size_class.chosen.marked
        found = [each for each in self._entries_of(tenant) if each.warm_slot is not None and each not in marked]
        for entry in found:
            tenant.size_class.index.pin(entry, Tier.WARM)
        return found

    def unpin_entries(self, tenant: Tenant, slots: Sequence[int]) -> None:
        """End what `warm_entries` pinned."""
        tenant.size_class.index.unpin_all(Tier.WARM, slots)

    @property
    def num_reservations(self) -> int:
        """Slots that are being written."""
        return len(self._reserved)

    @property
    def num_claims(self) -> int:
        """Blocks that some client has promised to compute."""
        return self.num_promised

    @property
    def num_writes(self) -> int:
        """Published blocks that are not yet stored."""
        return len(self._writes)

    def check(self) -> None:
        """Raise AssertionError unless every slot, pin, reservation and claim is accounted for."""
        for size_class in self.slab.classes.values():
            pins = Counter(slot for slot in range(size_class.num_slots) if not size_class.is_usable(slot))
            for connection in self.connections:
                if connection.tenant and connection.tenant.size_class is size_class:
                    pins.update(connection.leases)
                    pins.update(connection.reservations.keys())
            for task, tenant in self._fetching.items():
                if tenant.size_class is size_class:
                    pins.update(task.slots)
            pins.update(write.slot for write in self._writes if write.tenant.size_class is size_class)
            for load in self._loads.values():
                if load.tenant.size_class is size_class:
                    pins[load.slot] += load.num_left
            pool = size_class.index.warm
            for slot in range(size_class.num_slots):
                assert pool.reference_count(slot) == pins[slot], f"slot {slot} has {pool.reference_count(slot)} pins"
                assert (pool.owners[slot] is not None) == ((size_class, slot) in self._slot_tenants)
            size_class.index.check()
        counted = Counter(self._slot_tenants.values())
        assert all(tenant.warm_blocks == counted[tenant] for tenant in self.tenants.values())
        held = [res for connection in self.connections for res in connection.reservations.values()]
        assert {id(each) for each in held} == {id(each) for each in self._reserved.values()}
        for size_class in self.slab.classes.values():
            assert size_class.num_reserved == sum(each.tenant.size_class is size_class for each in held)
        for tenant in self.tenants.values():
            for block_hash, claim in tenant.claims.items():
                assert block_hash in claim.hashes and claim.connection.claims.get(claim.number) is claim
                assert claim.connection in self.connections and claim.connection.tenant is tenant
        for connection in self.connections:
            assert connection.num_leases == connection.leases.total()
            assert connection.cursor_bytes == sum(cursor.num_bytes for cursor in connection.cursors.values())
            assert connection.num_promised == sum(len(claim.hashes) for claim in connection.claims.values())
        assert self.num_promised == sum(len(tenant.claims) for tenant in self.tenants.values())
        for total, own in (
            (self.num_leases, "num_leases"),
            (self.cursor_bytes, "cursor_bytes"),
            (self.num_promised, "num_promised"),
        ):
            assert total == sum(getattr(connection, own) for connection in self.connections), own
        assert self.description_bytes == sum(len(tenant.description) for tenant in self.tenants.values())
        for tenant in self.tenants.values():
            assert self.slab.classes.get(tenant.size_class.stride_bytes) is tenant.size_class
