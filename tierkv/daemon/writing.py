"""The daemon's core, writing: who may write which block where, and when everybody may find it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.messages import Chain, ChainAnswer, Published, Reserve, Reserved
from tierkv.daemon.protocol import ProtocolError, split_hashes, split_numbers
from tierkv.daemon.state import State
from tierkv.daemon.values import Connection, Reservation, Tenant, Write, has_hash, holds
from tierkv.index.index import Entry
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash, Tier

__all__ = ["Writing"]


class Writing(State):
    """Reservations, and what becomes of them."""

    def reserve(self, connection: Connection, message: Reserve) -> Reserved:
        """Give slots for the offered blocks that no tier has and nobody is writing."""
        tenant = connection.require_tenant()
        _check_chains(tenant, message.chains, self.limits)
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

    def _reserve_chain(self, connection: Connection, tenant: Tenant, chain: Chain) -> ChainAnswer:
        hashes = split_hashes(chain.hashes)
        offers = set(split_numbers(chain.offers))
        room = self._reservation_room(connection, tenant)
        wanted, num_there, num_busy, refusal = self._plan_writes(tenant, hashes, chain.tokens, offers, room)
        slots = self._take_beside(tenant, hashes, chain.tokens, len(wanted))
        if len(slots) < len(wanted):
            refusal = "no_room"
        numbers, given = array("I"), array("I")
        entries = self._anchor(tenant, hashes[: wanted[len(slots) - 1] + 1], chain.tokens) if slots else []
        for at, slot in zip(wanted, slots, strict=False):
            if at >= len(entries) or entries[at].awaited or entries[at].warm_slot is not None:
                refusal = refusal or "collision"
                tenant.size_class.index.unpin(Tier.WARM, slot)
                continue
            reservation = Reservation(connection, tenant, entries[at], slot)
            entries[at].awaited = True
            self._reserved[entries[at]] = reservation
            tenant.size_class.num_reserved += 1
            connection.reservations[slot] = reservation
            numbers.append(at)
            given.append(slot)
        if entries:
            self._prune(tenant, entries[-1])
        return ChainAnswer(numbers.tobytes(), given.tobytes(), num_there, num_busy, refusal)

    def _reservation_room(self, connection: Connection, tenant: Tenant) -> int:
        """Return how many more slots a connection may reserve."""
        limits, size_class = self.limits, tenant.size_class
        own = max(1, int(size_class.num_slots * limits.reservation_share_of_client)) - len(connection.reservations)
        left = max(1, int(size_class.num_slots * limits.reservation_share)) - size_class.num_reserved
        return max(0, min(own, left))

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
        self, tenant: Tenant, hashes: list[bytes], tokens: bytes, offers: set[int], room: int
    ) -> tuple[list[int], int, int, str]:
        """Return which blocks of a chain are to be written, how many offered ones are there and busy, and the refusal.

        Ends at the first block that nobody has and nobody offers, and behind `room` blocks to be written: what
        follows could not be found.
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
            elif at in offers and len(wanted) >= room:
                return wanted, num_there, num_busy, "no_room"
            elif at in offers:
                wanted.append(at)
            else:
                return wanted, num_there, num_busy, "no_parent"
        return wanted, num_there, num_busy, ""

    def _is_there(self, tenant: Tenant, hashes: list[bytes], tokens: bytes, at: int, entry: Entry | None) -> bool:
        """Tell whether a block need not be written: it lies in the warm tier, is coming, or is in the store."""
        if entry and (entry.warm_slot is not None or entry in self._loads):
            return True
        return self.store is not None and holds(self.store, tenant, hashes, tokens, at)

    def _is_taken(self, tenant: Tenant, block_hash: BlockHash, entry: Entry | None) -> bool:
        """Tell whether another block has this hash, here or in the store."""
        if entry is None and tenant.size_class.index.peek(block_hash):
            return True
        return self.store is not None and has_hash(self.store, block_hash)

    def _require_reserved(self, connection: Connection, slots: Sequence[int]) -> None:
        if len(set(slots)) != len(slots) or any(slot not in connection.reservations for slot in slots):
            raise ProtocolError("a slot was named that is not reserved by this connection")

    def _end_reservation(self, connection: Connection, slot: int) -> Reservation:
        reservation = connection.reservations.pop(slot)
        reservation.entry.awaited = False
        del self._reserved[reservation.entry]
        reservation.tenant.size_class.num_reserved -= 1
        return reservation


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
        offers = split_numbers(chain.offers)
        if any(number >= count for number in offers):
            raise ProtocolError("a block was offered that is not part of its chain")
        if len(set(offers)) != len(offers):
            raise ProtocolError("a block was offered twice")
    if num_blocks > limits.blocks_of_message:
        raise ProtocolError(f"chains of {num_blocks} blocks, {limits.blocks_of_message} at most")
