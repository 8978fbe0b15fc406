"""The daemon's mind: who may read which slot, who writes which, who computes what. No sockets, no bytes, no clock.

Every rule about shared memory is here, as a state machine over plain values, driven by the server and by tests:

- A **lease** pins a slot for one connection; it ends by `release` or with the connection.
- A **reservation** gives a connection one slot to write one block into. Its entry in the index has no place yet,
  so that nobody finds it, until `publish` attaches the slot. A second writer of the same block is told that it is
  busy.
- A **load** brings a block from a cold source into a slot; whoever wants the block meanwhile joins it.
- A **ticket** says who computes blocks that nobody has. It ends with their publication or with the connection.

Identity: a hash is a key and no proof. A block is found only by following the chain from the namespace's own
entry, comparing each entry's parent (the object) and token ids. A block behind that in a cold source counts only
if that source has the same chain up to it; otherwise the children of a colliding block could be taken for ours.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from tierkv.block import TOKEN_BYTES, BlockHash, Tier
from tierkv.daemon_slab import SharedSlab, SizeClass
from tierkv.errors import DaemonError, StoreError
from tierkv.index import Entry
from tierkv.layout import BlockLayout
from tierkv.policies import EvictionPolicy, LRUPolicy
from tierkv.protocol import (
    NO_SLOT,
    Chain,
    ChainAnswer,
    Fetch,
    Fetched,
    Found,
    FoundTail,
    Match,
    Pin,
    ProtocolError,
    Published,
    Release,
    Reserve,
    Reserved,
    split_hashes,
    split_numbers,
)
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.storage.warm import slot_stride

__all__ = ["BlockSource", "Connection", "Core", "FetchTask", "Load", "Tenant", "Write"]

MAX_FETCH_BLOCKS = 64
_MAX_CURSORS = 64
_MAX_TENANTS = 1024
_TICKET_S = 60.0
_HELD_SHARE = 0.5  # of a class's slots, that one connection may lease, and half of that reserve


class StoredEntry(Protocol):
    """What a source says of a block without reading it."""

    @property
    def parent(self) -> BlockHash: ...
    @property
    def num_tokens(self) -> int: ...


class BlockSource(Protocol):
    """Something below the warm tier, as far as the core asks it: identity only, no bytes."""

    def lookup(self, block_hash: BlockHash) -> StoredEntry | None: ...
    def read_tokens(self, block_hash: BlockHash) -> bytes | None: ...
    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None: ...


@dataclass(slots=True, eq=False)
class Tenant:
    """One namespace: its layout, where its blocks may lie, and what it has. codec: the lossy one it asks for, or ""."""

    digest: BlockHash
    description: bytes
    name: str
    owner: str
    layout: BlockLayout
    size_class: SizeClass
    codec: str = ""
    sources: list[BlockSource] = field(default_factory=list)
    warm_blocks: int = 0
    pinned_bytes: int = 0
    clients: int = 0

    @property
    def step(self) -> int:
        """Bytes of the token ids of a whole block."""
        return self.layout.block_size * TOKEN_BYTES


@dataclass(slots=True, eq=False)
class Load:
    """A block on its way from a source into a slot. users: fetches that wait for it, each with a pin."""

    tenant: Tenant
    entry: Entry
    slot: int
    source: BlockSource
    is_done: bool = False
    reason: MissReason | None = None

    @property
    def info(self) -> BlockInfo:
        """The block's identity, for reading it."""
        return _info(self.tenant, self.entry)


@dataclass(slots=True, eq=False)
class FetchTask:
    """What one Fetch waits for: slots that it has pinned, and the loads that are to fill some of them."""

    slots: list[int] = field(default_factory=list)
    loads: dict[int, Load] = field(default_factory=dict)
    fresh: list[Load] = field(default_factory=list)
    miss: MissReason | None = None


@dataclass(slots=True, eq=False)
class Write:
    """A published block that the store lacks; its slot stays pinned until `finish_write`."""

    tenant: Tenant
    entry: Entry
    slot: int

    @property
    def info(self) -> BlockInfo:
        """The block's identity, for storing it."""
        return _info(self.tenant, self.entry)


@dataclass(slots=True, eq=False)
class _Cursor:
    """A matched prompt, kept so that Fetch can name its blocks by number. tail: (hash, tokens), block `total`."""

    hashes: list[bytes]
    tokens: bytes
    total: int
    tail: tuple[bytes, bytes] | None
    verified: dict[int, int] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Ticket:
    number: int
    connection: Connection
    hashes: set[BlockHash]
    expires_at: float


@dataclass(slots=True, eq=False)
class _Reservation:
    connection: Connection
    tenant: Tenant
    entry: Entry
    slot: int


@dataclass(slots=True, eq=False)
class Connection:
    """What one client holds. Everything of it goes back when the connection ends."""

    tenant: Tenant | None = None
    client: str = ""
    leases: Counter[int] = field(default_factory=Counter)
    reservations: dict[int, _Reservation] = field(default_factory=dict)
    cursors: dict[int, _Cursor] = field(default_factory=dict)
    tickets: dict[int, _Ticket] = field(default_factory=dict)
    is_closed: bool = False

    def require_tenant(self) -> Tenant:
        """Return the namespace that this connection named. Raises ProtocolError if it named none."""
        if self.tenant is None:
            raise ProtocolError("this connection named no namespace when it said hello")
        return self.tenant


class Core:
    """All state of the daemon. Not thread-safe: the server's one thread calls it.

    store: the cold tier, if there is one. pin_share: of the slab, that one owner (salt) may pin.
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
    ) -> None:
        self.store = store
        self.slab = SharedSlab(
            slab_bytes,
            make_policy=make_policy,
            clock=clock,
            forgotten=self._forget_slot,
            extent_bytes=extent_bytes,
        )
        self.tenants: dict[BlockHash, Tenant] = {}
        self.connections: set[Connection] = set()
        self.counters: Counter[str] = Counter()
        self.news: list[BlockHash] = []
        self._clock = clock
        self._pin_quota_bytes = int(slab_bytes * pin_share)
        self._slot_tenants: dict[tuple[SizeClass, int], Tenant] = {}
        self._reserved: dict[Entry, _Reservation] = {}
        self._loads: dict[Entry, Load] = {}
        self._fetching: dict[FetchTask, Tenant] = {}
        self._writes: set[Write] = set()
        self._tickets: dict[BlockHash, _Ticket] = {}
        self._numbers = itertools.count(1)

    # -- connections -----------------------------------------------------------------------------------

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
        """Let a connection work on a namespace, made known if need be.

        Raises DaemonError if it is known with another description, CapacityError if its blocks fit no slab.
        """
        tenant = self.tenants.get(digest)
        if tenant is None:
            self._forget_idle_tenants()
            size_class = self.slab.class_of(slot_stride(layout.block_bytes))
            tenant = Tenant(digest, description, name, owner, layout, size_class, codec)
            if self.store is not None:
                tenant.sources.append(self.store)
            self.tenants[digest] = tenant
        elif tenant.layout != layout:
            raise DaemonError(
                f"namespace {digest.hex()} is known here with another layout of its blocks",
                hint="a namespace digest must cover the layout",
            )
        assert connection.tenant is None
        connection.tenant = tenant
        tenant.clients += 1
        return tenant

    def disconnect(self, connection: Connection) -> None:
        """Take everything back that a connection held. May be called twice."""
        if connection.is_closed:
            return
        connection.is_closed = True
        self.connections.discard(connection)
        for number in list(connection.tickets):
            self.end_ticket(connection, number)
        tenant = connection.tenant
        if tenant is None:
            return
        tenant.clients -= 1
        tenant.size_class.index.unpin_all(Tier.WARM, list(connection.leases.elements()))
        connection.leases.clear()
        self.abandon(connection, list(connection.reservations))
        connection.cursors.clear()

    # -- reading ---------------------------------------------------------------------------------------

    def match(self, connection: Connection, message: Match) -> Found:
        """Say how much of a prompt is there, leasing what lies in the warm tier if asked to."""
        tenant = connection.require_tenant()
        hashes = _whole_hashes(tenant, message.hashes, message.tokens)
        if not 0 <= message.start <= len(hashes):
            raise ProtocolError(f"block {message.start} of {len(hashes)} to start from")
        known = self._walk(tenant, hashes, message.tokens)
        slots, has_cold, has_failed = self._find_blocks(connection, known, hashes, message)
        total = message.start + len(slots) if slots is not None else 0
        tail = None
        if slots is not None:
            parent = self._parent_entry(tenant, known, total)
            tail, failed = self._find_tail(connection, hashes, total, parent, message)
            has_failed |= failed
        cursor = 0
        if message.lease and (has_cold or (tail and tail.slot == NO_SLOT)):
            cursor = self._open_cursor(connection, hashes, message.tokens, total, tail)
        miss = ""
        if has_failed:
            miss = MissReason.IO_ERROR.value
        elif total < len(hashes) and total == len(known) and tenant.size_class.index.peek(hashes[total]):
            miss = MissReason.COLLISION.value
        ticket, is_computing = 0, False
        if message.wants_ticket and total < len(hashes):
            ticket, is_computing = self._ticket_for(connection, hashes[total:])
        found = slots if slots is not None else array("I")
        self.counters["matched_blocks"] += len(found)
        self.counters["missed_blocks"] += len(hashes) - total
        return Found(
            slots=found.tobytes(), tail=tail, cursor=cursor, ticket=ticket, is_computing=is_computing, miss=miss
        )

    def begin_fetch(self, connection: Connection, message: Fetch) -> FetchTask:
        """Pin what is there already, start loads for the rest. The server fills `fresh`, then calls `end_fetch`."""
        tenant = connection.require_tenant()
        cursor = connection.cursors.get(message.cursor)
        if cursor is None:
            raise ProtocolError(f"no cursor {message.cursor} is open")
        end = cursor.total + (cursor.tail is not None)
        if not (message.first >= 0 and 1 <= message.count <= MAX_FETCH_BLOCKS and message.first + message.count <= end):
            raise ProtocolError(f"blocks {message.first} and {message.count - 1} more of {end}")
        return self._begin_fetch(tenant, cursor, message.first, message.count)

    def begin_prefetches(self, tenant: Tenant, hashes: list[bytes], tokens: bytes) -> Iterator[FetchTask]:
        """Yield fetches for nobody, one after the other, that bring up a whole prompt, a stored tail included.

        Each ends by `end_fetch(None, task)`; the caller stops where one of them brings nothing.
        """
        rest = tokens[len(hashes) * tenant.step :]
        tail = _stored_tail(tenant, hashes[-1] if hashes else tenant.digest, rest) if rest else None
        cursor = _Cursor(hashes, tokens, len(hashes), tail)
        last = len(hashes) + (tail is not None)
        for first in range(0, last, MAX_FETCH_BLOCKS):
            yield self._begin_fetch(tenant, cursor, first, min(MAX_FETCH_BLOCKS, last - first))

    def finish_load(self, load: Load, reason: MissReason | None) -> None:
        """The load's slot holds the block now; or does not, and why."""
        load.is_done = True
        load.reason = reason
        if reason is None:
            self._attach(load.tenant, load.entry, load.slot)
            load.entry.in_cold = load.source is self.store
            self.counters["loaded_blocks"] += 1
        self._end_load(load)

    def end_fetch(self, connection: Connection | None, task: FetchTask) -> Fetched:
        """Lease the leading blocks that arrived, give the others up. Every load of the task is done."""
        tenant = self._fetching.pop(task)
        num_good = len(task.slots)
        miss = task.miss
        for at, load in task.loads.items():
            assert load.is_done, "a fetch ends when its loads have ended"
            if load.reason is not None and at < num_good:
                num_good, miss = at, load.reason
        is_leasing = connection is not None and not connection.is_closed
        for at, slot in enumerate(task.slots):
            if is_leasing and at < num_good:
                assert connection is not None
                connection.leases[slot] += 1
            else:
                tenant.size_class.index.unpin(Tier.WARM, slot)
        return Fetched(slots=array("I", task.slots[:num_good]).tobytes(), miss=miss.value if miss else "")

    def release(self, connection: Connection, message: Release) -> None:
        """End leases and cursors. Raises ProtocolError, with nothing ended, for a slot that is not leased."""
        tenant = connection.require_tenant()
        slots = split_numbers(message.slots)
        wanted = Counter(slots)
        if any(connection.leases[slot] < count for slot, count in wanted.items()):
            raise ProtocolError("a slot was released that is not leased by this connection")
        index = tenant.size_class.index
        owners = index.warm.owners
        index.touch_all([owner for slot in wanted if (owner := owners[slot]) is not None])
        index.unpin_all(Tier.WARM, slots)
        connection.leases.subtract(wanted)
        for slot in wanted:
            if not connection.leases[slot]:
                del connection.leases[slot]
        for cursor in split_numbers(message.cursors):
            connection.cursors.pop(cursor, None)

    # -- writing ---------------------------------------------------------------------------------------

    def reserve(self, connection: Connection, message: Reserve) -> Reserved:
        """Give slots for the offered blocks that no tier has and nobody is writing."""
        tenant = connection.require_tenant()
        for chain in message.chains:
            _check_chain(tenant, chain)
        return Reserved(chains=[self._reserve_chain(connection, tenant, chain) for chain in message.chains])

    def publish(self, connection: Connection, slots: bytes) -> tuple[Published, list[Write]]:
        """Make reserved blocks findable. Return the answer and what the store has yet to get.

        Raises ProtocolError, with nothing published, for a slot that this connection has not reserved.
        """
        tenant = connection.require_tenant()
        numbers = split_numbers(slots)
        self._require_reserved(connection, numbers)
        index = tenant.size_class.index
        lost = array("I")
        writes: list[Write] = []
        for slot in numbers:
            entry = self._end_reservation(connection, slot).entry
            if entry.warm_slot is not None:
                lost.append(slot)
                index.unpin(Tier.WARM, slot)
                continue
            self._attach(tenant, entry, slot)
            if self.store is None:
                index.unpin(Tier.WARM, slot)
            else:
                writes.append(Write(tenant, entry, slot))
        self._writes.update(writes)
        count = len(numbers) - len(lost)
        self.counters["published_blocks"] += count
        return Published(count=count, lost=lost.tobytes()), writes

    def finish_write(self, write: Write, *, is_stored: bool) -> None:
        """A published block has been written to the store, or could not be."""
        self._writes.discard(write)
        write.entry.in_cold = is_stored
        self.counters["stored_blocks" if is_stored else "skipped_writes"] += 1
        write.tenant.size_class.index.unpin(Tier.WARM, write.slot)

    def abandon(self, connection: Connection, slots: Sequence[int]) -> None:
        """Give reserved slots back. Raises ProtocolError, with nothing given back, for one that is not reserved."""
        self._require_reserved(connection, slots)
        for slot in reversed(slots):
            reservation = self._end_reservation(connection, slot)
            reservation.tenant.size_class.index.unpin(Tier.WARM, slot)
            self._prune(reservation.tenant, reservation.entry)

    # -- computing once --------------------------------------------------------------------------------

    def is_computed(self, connection: Connection, block_hash: BlockHash) -> bool:
        """Tell whether some other connection has promised this block and not brought it yet."""
        ticket = self._tickets.get(block_hash)
        return ticket is not None and ticket.connection is not connection and ticket.expires_at > self._clock()

    def end_ticket(self, connection: Connection, number: int) -> None:
        """Nobody computes what is left of this ticket any more."""
        ticket = connection.tickets.pop(number, None)
        if ticket is None:
            return
        for block_hash in ticket.hashes:
            if self._tickets.get(block_hash) is ticket:
                del self._tickets[block_hash]
                self.news.append(block_hash)

    # -- pins, eviction, upkeep ------------------------------------------------------------------------

    def pin(self, connection: Connection, message: Pin) -> list[BlockHash]:
        """Pin or unpin a prompt's blocks; return the hashes of all that are there, for the store to do the same.

        Raises DaemonError, with nothing changed, if the owner (salt) would have pinned more than its share.
        """
        tenant = connection.require_tenant()
        hashes = _whole_hashes(tenant, message.hashes, message.tokens)
        known = self._walk(tenant, hashes, message.tokens)
        ask = Match(hashes=message.hashes, tokens=message.tokens)
        slots, _, _ = self._find_blocks(connection, known, hashes, ask)
        total = len(slots or ())
        tail, _ = self._find_tail(connection, hashes, total, self._parent_entry(tenant, known, total), ask)
        entries = known[:total]
        if tail and (entry := tenant.size_class.index.peek(tail.block_hash)):
            entries.append(entry)
        changing = [entry for entry in entries if entry.warm_slot is not None and entry.pinned is not message.pinned]
        change = len(changing) * tenant.layout.block_bytes * (1 if message.pinned else -1)
        pinned = sum(each.pinned_bytes for each in self.tenants.values() if each.owner == tenant.owner)
        if change > 0 and pinned + change > self._pin_quota_bytes:
            raise DaemonError(
                f"pinning {len(changing)} more blocks takes {pinned + change} bytes of the warm tier, "
                f"and one tenant may pin {self._pin_quota_bytes}",
                hint="unpin other prompts, or start the daemon with a larger --warm",
            )
        for entry in changing:
            tenant.size_class.index.set_pinned(entry, message.pinned)
        tenant.pinned_bytes += change
        return hashes[:total] + ([tail.block_hash] if tail else [])

    def evict(self, connection: Connection, count: int) -> int:
        """Evict blocks of the connection's namespace from the warm tier; return how many went."""
        tenant = connection.require_tenant()
        size_class = tenant.size_class
        wanted = size_class.num_slots if count < 0 else count
        return size_class.evict(wanted, lambda slot: self._slot_tenants.get((size_class, slot)) is tenant)

    def trim(self) -> int:
        """Evict a little ahead of need where the slab is full."""
        return sum(size_class.trim() for size_class in self.slab.classes.values())

    def warm_entries(self, tenant: Tenant) -> list[Entry]:
        """Return a namespace's blocks in the warm tier, parents first, each pinned; `unpin_entries` ends that."""
        index = tenant.size_class.index
        root = self._root(tenant)
        pending = list(root.children) if root else []
        found: list[Entry] = []
        for entry in pending:
            pending += entry.children
            if entry.warm_slot is not None:
                index.pin(entry, Tier.WARM)
                found.append(entry)
        return found

    def unpin_entries(self, tenant: Tenant, slots: Sequence[int]) -> None:
        """End what `warm_entries` pinned."""
        tenant.size_class.index.unpin_all(Tier.WARM, slots)

    @property
    def num_leases(self) -> int:
        """Leases of all connections."""
        return sum(connection.leases.total() for connection in self.connections)

    @property
    def num_reservations(self) -> int:
        """Slots that are being written."""
        return len(self._reserved)

    @property
    def num_tickets(self) -> int:
        """Blocks that somebody is computing."""
        return len(self._tickets)

    @property
    def num_writes(self) -> int:
        """Published blocks that are not yet stored."""
        return len(self._writes)

    def check(self) -> None:
        """Raise AssertionError unless every slot, pin, reservation and ticket is accounted for."""
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
            pool = size_class.index.warm
            for slot in range(size_class.num_slots):
                assert pool.reference_count(slot) == pins[slot], f"slot {slot} has {pool.reference_count(slot)} pins"
                assert (pool.owners[slot] is not None) == ((size_class, slot) in self._slot_tenants)
            size_class.index.check()
        counted = Counter(self._slot_tenants.values())
        assert all(tenant.warm_blocks == counted[tenant] for tenant in self.tenants.values())
        held = [res for connection in self.connections for res in connection.reservations.values()]
        assert {id(each) for each in held} == {id(each) for each in self._reserved.values()}
        for block_hash, ticket in self._tickets.items():
            assert block_hash in ticket.hashes and ticket.connection.tickets.get(ticket.number) is ticket

    # -- parts -----------------------------------------------------------------------------------------

    def _walk(self, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes) -> list[Entry]:
        """Return the entries of a chain from its first block on, as far as the index has this very chain."""
        index, step = tenant.size_class.index, tenant.step
        parent = self._root(tenant)
        known: list[Entry] = []
        if parent is None:
            return known
        peek = index.peek
        start = 0
        for block_hash in hashes:
            entry = peek(block_hash)
            if entry is None or entry.parent is not parent or entry.token_bytes != tokens[start : start + step]:
                break
            known.append(entry)
            parent = entry
            start += step
        return known

    def _root(self, tenant: Tenant) -> Entry | None:
        """Return the entry that a namespace's first blocks hang under, if it has any."""
        entry = tenant.size_class.index.peek(tenant.digest)
        return entry if entry and entry.depth == 0 and entry.token_bytes == tenant.digest else None

    def _anchor(self, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes) -> list[Entry]:
        """Return the entries of a chain, made as far as they are missing; ends early at a collision."""
        index, step = tenant.size_class.index, tenant.step
        parent = tenant.size_class.root_of(tenant.digest)
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
        return entries

    def _prune(self, tenant: Tenant, entry: Entry) -> None:
        """Let an entry go that nothing needs any more; its parents follow it."""
        if entry.warm_slot is None:
            tenant.size_class.index.forget(entry)

    def _attach(self, tenant: Tenant, entry: Entry, slot: int) -> None:
        tenant.size_class.index.attach(entry, Tier.WARM, slot)
        tenant.warm_blocks += 1
        self._slot_tenants[tenant.size_class, slot] = tenant
        ticket = self._tickets.pop(entry.block_hash, None)
        if ticket:
            ticket.hashes.discard(entry.block_hash)
            ticket.expires_at = self._clock() + _TICKET_S
            if not ticket.hashes:
                ticket.connection.tickets.pop(ticket.number, None)
        self.news.append(entry.block_hash)

    def _forget_idle_tenants(self) -> None:
        """Keep the table of namespaces small: who has no client and no block is made known again when it comes."""
        if len(self.tenants) < _MAX_TENANTS:
            return
        busy = {load.tenant for load in self._loads.values()}
        for tenant in list(self.tenants.values()):
            if not (tenant.clients or tenant.warm_blocks or tenant in busy):
                del self.tenants[tenant.digest]

    def _forget_slot(self, size_class: SizeClass, slot: int) -> None:
        self._slot_tenants.pop((size_class, slot)).warm_blocks -= 1

    def _find_blocks(
        self, connection: Connection, known: list[Entry], hashes: list[bytes], message: Match
    ) -> tuple[array[int] | None, bool, bool]:
        """Return the slots of the blocks from `start` on, whether some are cold, and whether a source failed.

        None where not even the blocks before `start` are known to any tier.
        """
        tenant = connection.require_tenant()
        index, sources = tenant.size_class.index, tenant.sources
        room = self._lease_room(connection) if message.lease else 0
        slots = self._lease_run(connection, known[message.start :], room) if room > 0 else array("I")
        room -= len(slots)
        has_cold = has_failed = False
        at = message.start
        for at in range(min(message.start, len(known)) + len(slots), len(hashes)):
            slot = known[at].warm_slot if at < len(known) else None
            if slot is not None:
                if room > 0:
                    index.warm.pin(slot)
                    connection.leases[slot] += 1
                    room -= 1
                elif message.lease:
                    slot, has_cold = NO_SLOT, True
                slots.append(slot)
                continue
            parent = hashes[at - 1] if at else tenant.digest
            is_stored, failed = _is_stored(sources, hashes[at], parent, tenant.layout.block_size)
            has_failed |= failed
            if not is_stored:
                break
            if at >= message.start:
                slots.append(NO_SLOT)
                has_cold = True
        else:
            return slots, has_cold, has_failed
        return (slots, has_cold, has_failed) if at >= message.start else (None, False, has_failed)

    def _lease_run(self, connection: Connection, entries: list[Entry], room: int) -> array[int]:
        """Lease the leading entries that lie in the warm tier, all at once: what most requests find."""
        slots = array("I")
        for entry in entries[:room]:
            if entry.warm_slot is None:
                break
            slots.append(entry.warm_slot)
        connection.require_tenant().size_class.index.warm.pin_all(slots)
        connection.leases.update(slots)
        return slots

    def _lease_room(self, connection: Connection) -> int:
        tenant = connection.require_tenant()
        return max(1, int(tenant.size_class.num_slots * _HELD_SHARE)) - connection.leases.total()

    def _parent_entry(self, tenant: Tenant, known: list[Entry], total: int) -> Entry | None:
        if total > len(known):
            return None
        return known[total - 1] if total else self._root(tenant)

    def _find_tail(
        self, connection: Connection, hashes: list[bytes], total: int, parent: Entry | None, message: Match
    ) -> tuple[FoundTail | None, bool]:
        """Return the child of the last block found that shares most leading tokens with the rest of the prompt."""
        tenant = connection.require_tenant()
        rest = message.tokens[total * tenant.step : (total + 1) * tenant.step]
        best: FoundTail | None = None
        longest = message.min_tail_tokens - 1
        if not rest:
            return None, False
        nearest = tenant.size_class.index.nearest_child(parent.block_hash, rest) if parent else None
        if nearest and nearest[2] > longest:
            child, _, longest = nearest
            assert child.warm_slot is not None, "there is no hot tier here"
            best = FoundTail(child.block_hash, child.token_bytes, longest, child.warm_slot)
        has_failed = False
        for source in tenant.sources:
            if longest * TOKEN_BYTES >= len(rest):
                break
            try:
                found = source.find_longest_run(hashes[total - 1] if total else tenant.digest, rest)
            except StoreError:
                has_failed = True
                continue
            if found and found[2] > longest:
                longest = found[2]
                best = FoundTail(*found, NO_SLOT)
        if best and best.slot != NO_SLOT and message.lease:
            if self._lease_room(connection) > 0:
                tenant.size_class.index.warm.pin(best.slot)
                connection.leases[best.slot] += 1
            else:
                best.slot = NO_SLOT
        return best, has_failed

    def _open_cursor(
        self, connection: Connection, hashes: list[bytes], tokens: bytes, total: int, tail: FoundTail | None
    ) -> int:
        while len(connection.cursors) >= _MAX_CURSORS:
            connection.cursors.pop(next(iter(connection.cursors)))
        number = next(self._numbers) & 0xFFFF_FFFF or next(self._numbers)
        end = (tail.block_hash, tail.tokens) if tail else None
        connection.cursors[number] = _Cursor(hashes, tokens, total, end)
        return number

    def _begin_fetch(self, tenant: Tenant, cursor: _Cursor, first: int, count: int) -> FetchTask:
        task = FetchTask()
        self._fetching[task] = tenant
        size_class = tenant.size_class
        hashes, tokens = _fetch_chain(tenant, cursor, first, count)
        wanted: list[tuple[int, BlockSource]] = []
        known = self._walk(tenant, hashes, tokens)
        for at in range(first, first + count):  # what is there is pinned before room is made for the rest
            entry = known[at] if at < len(known) else None
            load = self._loads.get(entry) if entry else None
            if entry and entry.warm_slot is not None:
                size_class.index.warm.pin(entry.warm_slot)
                task.slots.append(entry.warm_slot)
            elif load:
                size_class.index.warm.pin(load.slot)
                task.loads[len(task.slots)] = load
                task.slots.append(load.slot)
            else:
                source, miss = self._source_of(tenant, cursor, hashes, tokens, at)
                if source is None:
                    task.miss = miss
                    break
                wanted.append((at, source))
                task.slots.append(NO_SLOT)
        self._start_loads(tenant, task, hashes, tokens, first, wanted)
        return task

    def _start_loads(
        self,
        tenant: Tenant,
        task: FetchTask,
        hashes: list[bytes],
        tokens: bytes,
        first: int,
        wanted: list[tuple[int, BlockSource]],
    ) -> None:
        """Take slots for the wanted blocks and make their entries; what finds no room ends the task there."""
        index = tenant.size_class.index
        slots = tenant.size_class.take(len(wanted)) if wanted else []
        entries = self._anchor(tenant, hashes[: wanted[len(slots) - 1][0] + 1], tokens) if slots else []
        for (at, source), slot in zip(wanted, slots, strict=False):
            if at < len(entries) and not entries[at].awaited:
                load = Load(tenant, entries[at], slot, source)
                load.entry.awaited = True
                self._loads[load.entry] = load
                task.loads[at - first] = load
                task.slots[at - first] = slot
            else:
                index.unpin(Tier.WARM, slot)
        if entries:
            self._prune(tenant, entries[-1])
        fresh = {at - first for at, _ in wanted}
        if NO_SLOT in task.slots:
            end = task.slots.index(NO_SLOT)
            task.miss = MissReason.IO_ERROR if len(slots) < len(wanted) else MissReason.COLLISION
            for at in range(len(task.slots) - 1, end - 1, -1):
                dropped = task.loads.pop(at, None)
                if dropped and at in fresh:
                    self._end_load(dropped)
                if task.slots[at] != NO_SLOT:
                    index.unpin(Tier.WARM, task.slots[at])
            del task.slots[end:]
        task.fresh = [load for at, load in task.loads.items() if at in fresh]

    def _end_load(self, load: Load) -> None:
        del self._loads[load.entry]
        load.entry.awaited = False
        self._prune(load.tenant, load.entry)

    def _source_of(
        self, tenant: Tenant, cursor: _Cursor, hashes: list[bytes], tokens: bytes, at: int
    ) -> tuple[BlockSource | None, MissReason]:
        """Return the source that has block `at` behind the very chain that leads to it, or why there is none."""
        step = tenant.step
        num_tokens = len(tokens[at * step : (at + 1) * step]) // TOKEN_BYTES
        miss = MissReason.ABSENT
        for number, source in enumerate(tenant.sources):
            parent = hashes[at - 1] if at else tenant.digest
            is_stored, has_failed = _is_stored([source], hashes[at], parent, num_tokens)
            if has_failed:
                miss = MissReason.IO_ERROR
            if not is_stored:
                continue
            verified = cursor.verified.get(number, 0)
            while verified < at and _holds(source, tenant, hashes, tokens, verified):
                verified += 1
            cursor.verified[number] = verified
            if verified >= at:
                return source, miss
            miss = MissReason.COLLISION
        return None, miss

    def _reserve_chain(self, connection: Connection, tenant: Tenant, chain: Chain) -> ChainAnswer:
        hashes = split_hashes(chain.hashes)
        offers = set(split_numbers(chain.offers))
        wanted, num_there, num_busy, refusal = self._plan_writes(tenant, hashes, chain.tokens, offers)
        room = max(1, int(tenant.size_class.num_slots * _HELD_SHARE / 2)) - len(connection.reservations)
        slots = self._take_beside(tenant, hashes, chain.tokens, max(0, min(len(wanted), room)))
        if len(slots) < len(wanted):
            refusal = "no_room"
        numbers, given = array("I"), array("I")
        entries = self._anchor(tenant, hashes[: wanted[len(slots) - 1] + 1], chain.tokens) if slots else []
        for at, slot in zip(wanted, slots, strict=False):
            if at >= len(entries) or entries[at].awaited or entries[at].warm_slot is not None:
                refusal = refusal or "collision"
                tenant.size_class.index.unpin(Tier.WARM, slot)
                continue
            reservation = _Reservation(connection, tenant, entries[at], slot)
            entries[at].awaited = True
            self._reserved[entries[at]] = reservation
            connection.reservations[slot] = reservation
            numbers.append(at)
            given.append(slot)
        if entries:
            self._prune(tenant, entries[-1])
        return ChainAnswer(numbers.tobytes(), given.tobytes(), num_there, num_busy, refusal)

    def _take_beside(self, tenant: Tenant, hashes: list[bytes], tokens: bytes, count: int) -> list[int]:
        """Take slots without evicting the blocks of the chain that they are for."""
        if not count:
            return []
        index = tenant.size_class.index
        kept = [entry.warm_slot for entry in self._walk(tenant, hashes, tokens) if entry.warm_slot is not None]
        for slot in kept:
            index.warm.pin(slot)
        slots = tenant.size_class.take(count)
        for slot in kept:
            index.unpin(Tier.WARM, slot)
        return slots

    def _plan_writes(
        self, tenant: Tenant, hashes: list[bytes], tokens: bytes, offers: set[int]
    ) -> tuple[list[int], int, int, str]:
        """Return which blocks of a chain are to be written, how many offered ones are there and busy, and the refusal.

        Ends at the first block that nobody has and nobody offers: what follows it could not be found.
        """
        known = self._walk(tenant, hashes, tokens)
        wanted: list[int] = []
        num_there = num_busy = 0
        for at in range(len(hashes)):
            entry = known[at] if at < len(known) else None
            if entry and entry in self._reserved:
                num_busy += at in offers
            elif self._is_there(tenant, hashes, tokens, at, entry):
                num_there += at in offers
            elif self._is_taken(tenant, hashes[at], entry):
                return wanted, num_there, num_busy, "collision"
            elif at in offers:
                wanted.append(at)
            else:
                return wanted, num_there, num_busy, "no_parent"
        return wanted, num_there, num_busy, ""

    def _is_there(self, tenant: Tenant, hashes: list[bytes], tokens: bytes, at: int, entry: Entry | None) -> bool:
        """Tell whether a block need not be written: it lies in the warm tier, is coming, or is in the store."""
        if entry and (entry.warm_slot is not None or entry in self._loads):
            return True
        return self.store is not None and _holds(self.store, tenant, hashes, tokens, at)

    def _is_taken(self, tenant: Tenant, block_hash: BlockHash, entry: Entry | None) -> bool:
        """Tell whether another block has this hash, here or in the store."""
        if entry is None and tenant.size_class.index.peek(block_hash):
            return True
        return self.store is not None and _has_hash(self.store, block_hash)

    def _require_reserved(self, connection: Connection, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots) or any(slot not in connection.reservations for slot in slots):
            raise ProtocolError("a slot was named that is not reserved by this connection")

    def _end_reservation(self, connection: Connection, slot: int) -> _Reservation:
        reservation = connection.reservations.pop(slot)
        reservation.entry.awaited = False
        del self._reserved[reservation.entry]
        return reservation

    def _ticket_for(self, connection: Connection, missing: list[BlockHash]) -> tuple[int, bool]:
        """Return (ticket, whether somebody else computes the first missing block). Who holds a ticket never waits."""
        if self.is_computed(connection, missing[0]) and not connection.tickets:
            return 0, True
        free = {h for h in missing if h not in self._tickets or self._tickets[h].expires_at <= self._clock()}
        if not free:
            return 0, False
        ticket = _Ticket(next(self._numbers), connection, free, self._clock() + _TICKET_S)
        for block_hash in free:
            old = self._tickets.get(block_hash)
            if old:
                old.hashes.discard(block_hash)
                if not old.hashes:
                    old.connection.tickets.pop(old.number, None)
            self._tickets[block_hash] = ticket
        connection.tickets[ticket.number] = ticket
        return ticket.number, False


def _info(tenant: Tenant, entry: Entry) -> BlockInfo:
    return BlockInfo(
        block_hash=entry.block_hash,
        parent=entry.parent_hash,
        namespace=tenant.digest,
        token_bytes=entry.token_bytes,
    )


def _whole_hashes(tenant: Tenant, hashes: bytes, tokens: bytes) -> list[bytes]:
    """Return the hashes of a prompt's whole blocks. Raises ProtocolError unless they are as many as the tokens."""
    found = split_hashes(hashes)
    if len(tokens) % TOKEN_BYTES or len(found) != len(tokens) // tenant.step:
        raise ProtocolError(f"{len(found)} block hashes for {len(tokens)} bytes of token ids")
    return found


def _check_chain(tenant: Tenant, chain: Chain) -> None:
    count = -(-len(chain.tokens) // tenant.step)
    if len(chain.tokens) % TOKEN_BYTES or not count or len(split_hashes(chain.hashes)) != count:
        raise ProtocolError(f"{len(chain.hashes)} bytes of block hashes for {len(chain.tokens)} of token ids")
    if any(number >= count for number in split_numbers(chain.offers)):
        raise ProtocolError("a block was offered that is not part of its chain")


def _fetch_chain(tenant: Tenant, cursor: _Cursor, first: int, count: int) -> tuple[list[bytes], bytes]:
    """Return hashes and tokens of a cursor's blocks up to the last wanted one, which may be its tail."""
    end = min(first + count, cursor.total)
    hashes, tokens = cursor.hashes[:end], cursor.tokens[: end * tenant.step]
    if first + count > cursor.total and cursor.tail:
        return [*hashes, cursor.tail[0]], tokens + cursor.tail[1]
    return hashes, tokens


def _is_stored(
    sources: Sequence[BlockSource], block_hash: BlockHash, parent: BlockHash, num_tokens: int
) -> tuple[bool, bool]:
    """Return whether some source has a block of that hash, parent and length, and whether one failed."""
    has_failed = False
    for source in sources:
        try:
            stored = source.lookup(block_hash)
        except StoreError:
            has_failed = True
            continue
        if stored and stored.parent == parent and stored.num_tokens == num_tokens:
            return True, has_failed
    return False, has_failed


def _has_hash(source: BlockSource, block_hash: BlockHash) -> bool:
    try:
        return source.lookup(block_hash) is not None
    except StoreError:
        return False


def _holds(source: BlockSource, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes, at: int) -> bool:
    """Tell whether a source's block of that hash is this very block: parent and token ids compared."""
    parent = hashes[at - 1] if at else tenant.digest
    try:
        stored = source.lookup(hashes[at])
        return (
            stored is not None
            and stored.parent == parent
            and source.read_tokens(hashes[at]) == tokens[at * tenant.step : (at + 1) * tenant.step]
        )
    except StoreError:
        return False


def _stored_tail(tenant: Tenant, parent: BlockHash, rest: bytes) -> tuple[bytes, bytes] | None:
    """Return (hash, tokens) of a source's block that has all tokens of a prompt's partly filled last block."""
    for source in tenant.sources:
        try:
            found = source.find_longest_run(parent, rest)
        except StoreError:
            continue
        if found and found[2] * TOKEN_BYTES == len(rest):
            return found[0], found[1]
    return None
