"""What the daemon's core keeps: who has which slot, what is on its way, who computes what."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence

from tierkv.block import BlockHash, Tier
from tierkv.daemon.slab import SharedSlab, SizeClass
from tierkv.daemon.values import BlockSource, Connection, FetchTask, Load, Reservation, Tenant, Ticket, Write
from tierkv.index import Entry
from tierkv.policies import EvictionPolicy, LRUPolicy

__all__ = ["HELD_SHARE", "State"]

HELD_SHARE = 0.5
"""Of a class's slots, that one connection may lease; half of that, that it may reserve."""

_TICKET_S = 60.0
_MAX_TENANTS = 1024


class State:
    """The tables, and what reading and writing have in common: chains in the index, slots attached, tickets.

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
        self._reserved: dict[Entry, Reservation] = {}
        self._loads: dict[Entry, Load] = {}
        self._fetching: dict[FetchTask, Tenant] = {}
        self._writes: set[Write] = set()
        self._tickets: dict[BlockHash, Ticket] = {}
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

    def _forget_slot(self, size_class: SizeClass, slot: int) -> None:
        self._slot_tenants.pop((size_class, slot)).warm_blocks -= 1

    def _forget_idle_tenants(self) -> None:
        """Keep the table of namespaces small: who has no client and no block is made known again when it comes."""
        if len(self.tenants) < _MAX_TENANTS:
            return
        busy = {load.tenant for load in self._loads.values()}
        for tenant in list(self.tenants.values()):
            if not (tenant.clients or tenant.warm_blocks or tenant in busy):
                del self.tenants[tenant.digest]

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

    def _ticket_for(self, connection: Connection, missing: list[BlockHash]) -> tuple[int, bool]:
        """Return (ticket, whether somebody else computes the first missing block). Who holds a ticket never waits."""
        if self.is_computed(connection, missing[0]) and not connection.tickets:
            return 0, True
        free = {h for h in missing if h not in self._tickets or self._tickets[h].expires_at <= self._clock()}
        if not free:
            return 0, False
        ticket = Ticket(next(self._numbers), connection, free, self._clock() + _TICKET_S)
        for block_hash in free:
            old = self._tickets.get(block_hash)
            if old:
                old.hashes.discard(block_hash)
                if not old.hashes:
                    old.connection.tickets.pop(old.number, None)
            self._tickets[block_hash] = ticket
        connection.tickets[ticket.number] = ticket
        return ticket.number, False
