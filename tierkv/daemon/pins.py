"""Pins: prompts that clients want to keep in the warm tier, within the share that a tenant may pin."""

from __future__ import annotations

import math
from collections.abc import Callable

from tierkv.daemon.leases import Leases
from tierkv.daemon.messages import Match, Pin
from tierkv.daemon.protocol import ProtocolError
from tierkv.daemon.tenants import Tenants
from tierkv.daemon.values import Connection, Tenant, whole_hashes
from tierkv.errors import DaemonError
from tierkv.index.index import Entry
from tierkv.values.block import BlockHash

__all__ = ["Pins"]


class Pins:
    """Pins blocks of the warm tier. quota_bytes: that one owner (salt) may pin; quota_of_all_bytes: that all may."""

    def __init__(
        self,
        tenants: Tenants,
        leases: Leases,
        *,
        clock: Callable[[], float],
        quota_bytes: int,
        quota_of_all_bytes: int,
    ) -> None:
        self.quota_bytes = quota_bytes
        self.quota_of_all_bytes = quota_of_all_bytes
        self._tenants = tenants
        self._leases = leases
        self._clock = clock
        self._ends: dict[Entry, tuple[float, Tenant]] = {}

    def pin(self, connection: Connection, message: Pin) -> list[BlockHash]:
        """Pin or unpin a prompt's blocks. Return the hashes of all that are there, so that the store can do the same.

        Raises DaemonError, with nothing changed, if the owner (salt) would have pinned more than its share.
        """
        tenant = connection.require_tenant()
        if not math.isfinite(message.ttl_s):
            raise ProtocolError(f"a time to live of {message.ttl_s} s")
        hashes, entries = self._find(connection, tenant, message)
        changing = [entry for entry in entries if entry.warm_slot is not None and entry.pinned is not message.pinned]
        change = len(changing) * tenant.layout.block_bytes * (1 if message.pinned else -1)
        pinned = sum(each.pinned_bytes for each in self._all() if each.owner == tenant.owner)
        if change > 0 and pinned + change > self.quota_bytes:
            raise DaemonError(
                f"pinning {len(changing)} more blocks takes {pinned + change} bytes of the warm tier, "
                f"and one tenant may pin {self.quota_bytes}",
                hint="unpin other prompts, or start the daemon with a larger --warm",
            )
        if change > 0:
            self._make_room(tenant, change)
        for entry in changing:
            tenant.size_class.index.set_pinned(entry, message.pinned)
        tenant.pinned_bytes += change
        for entry in entries:
            self._ends.pop(entry, None)
            if entry.pinned and message.ttl_s >= 0:
                self._ends[entry] = self._clock() + message.ttl_s, tenant
        return hashes

    def end_expired(self) -> None:
        """Unpin the blocks whose pins have ended."""
        now = self._clock()
        for entry, (until, tenant) in list(self._ends.items()):
            if until > now and entry.pinned:
                continue
            del self._ends[entry]
            if entry.pinned:
                tenant.size_class.index.set_pinned(entry, False)
                tenant.pinned_bytes -= tenant.layout.block_bytes

    def _find(self, connection: Connection, tenant: Tenant, message: Pin) -> tuple[list[BlockHash], list[Entry]]:
        """Return the hashes of a prompt's blocks that are there, and the entries of those that the index has."""
        hashes = whole_hashes(tenant, message.hashes, message.tokens, most=self._tenants.limits.blocks_of_message)
        known = self._tenants.walk(tenant, hashes, message.tokens)
        ask = Match(hashes=message.hashes, tokens=message.tokens)
        slots, _, _ = self._leases.find_blocks(connection, known, hashes, ask)
        total = len(slots or ())
        parent = self._tenants.parent_entry(tenant, known, total)
        partial_block, _ = self._leases.find_partial(connection, hashes, total, parent, ask)
        entries = [entry for entry in known[:total] if entry]
        if partial_block is None:
            return hashes[:total], entries
        entry = tenant.size_class.index.peek(partial_block.block_hash)
        if entry and entry.parent is parent:
            entries.append(entry)
        return [*hashes[:total], partial_block.block_hash], entries

    def _make_room(self, tenant: Tenant, more_bytes: int) -> None:
        """Keep what all tenants pin within the limit: unpin the blocks of tenants whose clients have all left.

        Raises DaemonError, with nothing pinned, if that is not enough.
        """
        most = self.quota_of_all_bytes - more_bytes
        for other in sorted(self._all(), key=lambda each: each.left_at):
            if sum(each.pinned_bytes for each in self._all()) <= most:
                return
            if not other.clients and other is not tenant:
                self._tenants.unpin(other)
        if sum(each.pinned_bytes for each in self._all()) > most:
            raise DaemonError(
                f"all tenants together may pin {self.quota_of_all_bytes} bytes of the warm tier",
                hint="unpin other prompts, or start the daemon with a larger --warm",
            )

    def _all(self) -> list[Tenant]:
        return list(self._tenants.by_digest.values())
