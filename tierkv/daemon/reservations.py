"""Reservations: which connection writes which block into which slot."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.messages import Chain, ChainAnswer, Reserve, Reserved
from tierkv.daemon.protocol import ProtocolError, split_hashes, split_numbers
from tierkv.daemon.size_class import SizeClass
from tierkv.daemon.tenants import Tenants
from tierkv.daemon.values import Connection, Reservation, Tenant, has_hash, holds
from tierkv.index.index import Entry
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash, Tier

__all__ = ["Reservations"]


class Reservations:
    """A reservation gives a connection one slot to write one block into. Clients find the block once it is published.

    A second connection that proposes the block gets the answer that it is busy.
    """

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._limits = tenants.limits
        self._store = tenants.store
        self._reserved: dict[Entry, Reservation] = {}

    def __len__(self) -> int:
        return len(self._reserved)

    def reserve(self, connection: Connection, message: Reserve) -> Reserved:
        """Reserve slots for those proposed blocks that no tier has and no other client writes. Raises ProtocolError."""
        tenant = connection.require_tenant()
        _check_chains(tenant, message.chains, self._limits)
        return Reserved(chains=[self._reserve_chain(connection, tenant, chain) for chain in message.chains])

    def publish(self, connection: Connection, slots: Sequence[int]) -> tuple[list[tuple[Entry, int]], array[int]]:
        """Let every client find the blocks in these slots. Return their entries and slots, and the slots that lost.

        A slot loses if its block has another one by now. The slots of the others stay pinned, for the caller to unpin.
        Raises ProtocolError, with nothing published, for a slot that this connection has not reserved.
        """
        tenant = connection.require_tenant()
        self._require_reserved(connection, slots)
        published: list[tuple[Entry, int]] = []
        lost = array("I")
        for slot in slots:
            entry = self._end(connection, slot).entry
            if entry.warm_slot is not None:
                lost.append(slot)
                tenant.size_class.index.unpin(Tier.WARM, slot)
            else:
                self._tenants.attach(tenant, entry, slot)
                published.append((entry, slot))
        return published, lost

    def abandon(self, connection: Connection, slots: Sequence[int]) -> None:
        """Free reserved slots. Raises ProtocolError, with nothing freed, for one that is not reserved."""
        self._require_reserved(connection, slots)
        for slot in reversed(slots):
            reservation = self._end(connection, slot)
            reservation.tenant.size_class.index.unpin(Tier.WARM, slot)
            self._tenants.prune(reservation.tenant, reservation.entry)

    def _reserve_chain(self, connection: Connection, tenant: Tenant, chain: Chain) -> ChainAnswer:
        hashes = split_hashes(chain.hashes)
        proposed = set(split_numbers(chain.proposed))
        room = self._reservation_room(connection, tenant)
        wanted, num_there, num_busy, refusal = self._plan_writes(tenant, hashes, chain.tokens, proposed, room)
        slots = self._take_beside(tenant, hashes, chain.tokens, len(wanted))
        if len(slots) < len(wanted):
            refusal = "no_room"
        numbers, given = array("I"), array("I")
        entries = self._tenants.insert(tenant, hashes, chain.tokens, wanted[: len(slots)]) if slots else {}
        for at, slot in zip(wanted, slots, strict=False):
            entry = entries.get(at)
            if entry is None or entry.awaited or entry.warm_slot is not None:
                refusal = refusal or "collision"
                tenant.size_class.index.unpin(Tier.WARM, slot)
                continue
            reservation = Reservation(connection, tenant, entry, slot)
            entry.awaited = True
            tenant.num_awaited += 1
            self._reserved[entry] = reservation
            tenant.size_class.num_reserved += 1
            connection.reservations[slot] = reservation
            numbers.append(at)
            given.append(slot)
        if entries:
            self._tenants.prune(tenant, entries[max(entries)])
        return ChainAnswer(numbers.tobytes(), given.tobytes(), num_there, num_busy, refusal)

    def _reservation_room(self, connection: Connection, tenant: Tenant) -> int:
        """Return how many more slots a connection may reserve."""
        limits, size_class = self._limits, tenant.size_class
        own = max(1, int(size_class.num_slots * limits.reservation_share_of_client)) - len(connection.reservations)
        left = max(1, int(size_class.num_slots * limits.reservation_share)) - size_class.num_reserved
        return max(0, min(own, left))

    def _take_beside(self, tenant: Tenant, hashes: list[bytes], tokens: bytes, count: int) -> list[int]:
        """Take slots, and evict for them no block of this chain, unless the store has it.

        Else a prompt that is longer than the warm tier would not be stored.
        """
        if not count:
            return []
        index = tenant.size_class.index
        known = self._tenants.walk(tenant, hashes, tokens)
        chain = [(entry.warm_slot, entry.in_cold) for entry in known if entry and entry.warm_slot is not None]
        for slot, _ in chain:
            index.warm.pin(slot)
        slots = self._tenants.shares.take(tenant, count)
        for are_stored in (True, False):
            for slot, in_cold in chain:
                if (in_cold and self._store is not None) is are_stored:
                    index.unpin(Tier.WARM, slot)
            if are_stored and len(slots) < count:
                slots += self._tenants.shares.take(tenant, count - len(slots), num_taken=len(slots))
        return slots

    def _plan_writes(
        self, tenant: Tenant, hashes: list[bytes], tokens: bytes, proposed: set[int], room: int
    ) -> tuple[list[int], int, int, str]:
        """Return which blocks of a chain are to be written, how many proposed ones are there and busy, and the refusal.

        The walk ends at the first block that no tier has and the client does not propose, and after `room` blocks to be
        written: no client could find the blocks after it. Rows follow no other block: the walk goes on behind one
        that is not proposed, or cannot be written.
        """
        known = self._tenants.walk(tenant, hashes, tokens)
        wanted: list[int] = []
        refusal = ""
        num_there = num_busy = 0
        for at in range(len(hashes)):
            entry = known[at] if at < len(known) else None
            if entry and entry in self._reserved:
                num_busy += at in proposed
            elif entry and (entry.warm_slot is not None or entry.awaited):
                num_there += at in proposed
            elif self._store is not None and holds(self._store, tenant, hashes, tokens, at):
                if wanted and at in proposed and len(wanted) < room and not tenant.has_rows:
                    wanted.append(at)  # the store removes it with the damaged block that it follows
                else:
                    num_there += at in proposed
            elif self._is_taken(tenant, hashes[at], entry):
                refusal = "collision"
                if not tenant.has_rows:
                    break
            elif at in proposed and len(wanted) >= room:
                refusal = "no_room"
                break
            elif at in proposed:
                wanted.append(at)
            elif not tenant.has_rows:
                refusal = "no_parent"
                break
        return wanted, num_there, num_busy, refusal

    def _is_taken(self, tenant: Tenant, block_hash: BlockHash, entry: Entry | None) -> bool:
        """Return whether another block has this hash, here or in the store."""
        if entry is None and tenant.size_class.index.peek(block_hash):
            return True
        return self._store is not None and has_hash(self._store, block_hash)

    def _require_reserved(self, connection: Connection, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots) or any(slot not in connection.reservations for slot in slots):
            raise ProtocolError("a slot was named that is not reserved by this connection")

    def _end(self, connection: Connection, slot: int) -> Reservation:
        reservation = connection.reservations.pop(slot)
        reservation.entry.awaited = False
        reservation.tenant.num_awaited -= 1
        del self._reserved[reservation.entry]
        reservation.tenant.size_class.num_reserved -= 1
        return reservation

    def check(self, size_classes: Iterable[SizeClass], connections: Iterable[Connection]) -> None:
        """Raise AssertionError unless every reservation is that of one of these connections, and is counted."""
        held = [each for connection in connections for each in connection.reservations.values()]
        assert {id(each) for each in held} == {id(each) for each in self._reserved.values()}
        for size_class in size_classes:
            assert size_class.num_reserved == sum(each.tenant.size_class is size_class for each in held)


def _check_chains(tenant: Tenant, chains: Sequence[Chain], limits: Limits) -> None:
    """Raise ProtocolError unless the chains are no more than a message may have and each agrees with itself."""
    if len(chains) > limits.chains_of_message:
        raise ProtocolError(f"{len(chains)} chains, {limits.chains_of_message} at most")
    num_blocks = 0
    for chain in chains:
        count = -(-len(chain.tokens) // tenant.step)
        if len(chain.tokens) % TOKEN_BYTES or not count or len(chain.hashes) != count * HASH_BYTES:
            raise ProtocolError(f"{len(chain.hashes)} bytes of block hashes for {len(chain.tokens)} of token ids")
        num_blocks += count
        proposed = split_numbers(chain.proposed)
        if any(number >= count for number in proposed):
            raise ProtocolError("a block was proposed that is not part of its chain")
        if len(set(proposed)) != len(proposed):
            raise ProtocolError("a block was proposed twice")
    if num_blocks > limits.blocks_of_message:
        raise ProtocolError(f"chains of {num_blocks} blocks, {limits.blocks_of_message} at most")
