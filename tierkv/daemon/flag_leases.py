"""FlagLeases: the daemon's part in leases that clients take by their flags, without asking; see `lease_flags`."""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.messages import Used
from tierkv.daemon.protocol import ProtocolError, split_numbers
from tierkv.daemon.tenants import Tenants
from tierkv.daemon.values import Connection, Tenant
from tierkv.index.index import Entry
from tierkv.values.block import BlockHash

__all__ = ["FlagLeases"]


class FlagLeases:
    """Gives connections their flags, ends them, and bounds them."""

    def __init__(self, tenants: Tenants, limits: Limits) -> None:
        self._tenants = tenants
        self._limits = limits

    def connect(self, connection: Connection) -> tuple[Sequence[int], int, int]:
        """Return the descriptors of the generations and of a connection's flags, how many slots those have, and how
        many flags the client may set. No descriptors where this system or this namespace has none. The caller closes
        the second one.
        """
        tenant = connection.require_tenant()
        flags = None if tenant.has_rows else tenant.size_class.open_flags()
        own = flags.connect(connection) if flags else None
        if flags is None or own is None:
            return (), 0, 0
        connection.has_flags = True
        return (flags.descriptor, own), flags.num_slots, self._most(tenant)

    def disconnect(self, connection: Connection) -> None:
        """End a connection's flags: what only they leased may be evicted."""
        size_class = connection.require_tenant().size_class
        if size_class.flags:
            size_class.flags.disconnect(connection)
            size_class.unpin_unflagged()

    def try_end(self, connection: Connection) -> bool:
        """End the flags of a connection that the daemon is about to end. False if the client leases a slot by one.

        Else a live client would copy from slots that other blocks get.
        """
        tenant = connection.tenant
        if tenant is None or tenant.size_class.flags is None:
            return True
        return tenant.size_class.flags.try_disconnect(connection)

    def count(self, connection: Connection) -> int:
        """Return how many slots a connection leases by its flags."""
        tenant = connection.tenant
        return tenant.size_class.flags.count(connection) if tenant and tenant.size_class.flags else 0

    def is_exceeded(self, connection: Connection) -> bool:
        """Return whether a client has set more flags than it may: it could keep all others from storing blocks."""
        tenant = connection.tenant
        return tenant is not None and self.count(connection) > self._most(tenant)

    def note_used(self, connection: Connection, message: Used) -> list[list[BlockHash]]:
        """Note the use of blocks. Return their chains: the store and remote tiers note them.

        A chain begins with the first block, or with the child of a block of a chain before it: each block is returned
        once, though a thousand sequences may share a long prefix. Raises ProtocolError for slots that there are not.
        """
        tenant = connection.require_tenant()
        index, slots = tenant.size_class.index, split_numbers(message.slots)
        if len(slots) > self._limits.blocks_of_message or any(slot >= index.warm.capacity for slot in slots):
            raise ProtocolError("slots were used that there are not")
        owns, owners = self._tenants.owns(tenant), index.warm.owners
        used = [entry for slot in slots if owns(slot) and (entry := owners[slot])]
        index.touch_all(used)
        followed = {entry.parent for entry in used}
        seen: set[Entry] = set()
        return [_chain_to(entry, seen) for entry in dict.fromkeys(used) if entry not in followed]

    def _most(self, tenant: Tenant) -> int:
        return max(1, int(tenant.size_class.num_slots * self._limits.flag_share_of_client))


def _chain_to(entry: Entry, seen: set[Entry]) -> list[BlockHash]:
    """Return the hashes of a block and of those before it that were not seen, the first one first; note them as seen.

    The namespace's root has depth 0.
    """
    found: list[BlockHash] = []
    while entry.depth > 0 and entry not in seen:
        seen.add(entry)
        found.append(entry.block_hash)
        entry = entry.parent
    return found[::-1]
