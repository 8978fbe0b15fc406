"""Leases: which connection may read which slots."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.messages import NO_SLOT, FoundPartial, Match
from tierkv.daemon.protocol import ProtocolError
from tierkv.daemon.values import Connection, is_in_some, parent_hash
from tierkv.errors import StoreError
from tierkv.index.index import Entry
from tierkv.values.block import TOKEN_BYTES, Tier

__all__ = ["Leases"]


class Leases:
    """Finds the blocks of a prompt and leases their slots. A lease pins a slot until its connection releases it.

    count: leases of all connections. The same slot may be leased several times.
    """

    def __init__(self, limits: Limits) -> None:
        self.count: int = 0
        self._limits = limits

    def room(self, connection: Connection) -> int:
        """Return how many more slots a connection may lease; those of its fetches in work count as leased."""
        limits, num_slots = self._limits, connection.require_tenant().size_class.num_slots
        room = max(1, int(num_slots * limits.lease_share_of_client)) - connection.num_leases - connection.num_fetching
        return min(room, limits.leases - self.count)

    def add(self, connection: Connection, slots: Sequence[int]) -> None:
        """Lease slots that the caller has pinned, once for each time that they are named."""
        connection.leases.update(slots)
        self._change(connection, len(slots))

    def release(self, connection: Connection, slots: Sequence[int]) -> None:
        """End leases. Raises ProtocolError, with nothing ended, for a slot that is not leased."""
        size_class = connection.require_tenant().size_class
        wanted = Counter(slots)
        if any(connection.leases[slot] < count for slot, count in wanted.items()):
            raise ProtocolError("a slot was released that is not leased by this connection")
        index = size_class.index
        owners = index.warm.owners
        index.touch_all([owner for slot in wanted if (owner := owners[slot]) is not None])
        index.unpin_all(Tier.WARM, slots)
        connection.leases.subtract(wanted)
        for slot in wanted:
            if not connection.leases[slot]:
                del connection.leases[slot]
        self._change(connection, -len(slots))
        size_class.chosen.retry()

    def release_all(self, connection: Connection) -> None:
        """End all leases of a connection that has ended."""
        index = connection.require_tenant().size_class.index
        index.unpin_all(Tier.WARM, list(connection.leases.elements()))
        connection.leases.clear()
        self._change(connection, -connection.num_leases)

    def find_blocks(
        self, connection: Connection, known: Sequence[Entry | None], hashes: list[bytes], message: Match
    ) -> tuple[array[int] | None, bool, bool]:
        """Return the slots of the blocks from `start` on, whether some are cold, and whether a source failed.

        known: the entries that the index has of this chain. The slots are None where some block before `start` is in
        no tier; rows follow no such blocks.
        """
        tenant = connection.require_tenant()
        index, sources = tenant.size_class.index, tenant.sources
        room = self.room(connection) if message.lease else 0
        slots = self._lease_run(connection, known[message.start :], room) if room > 0 else array("I")
        room -= len(slots)
        has_cold = has_failed = False
        at = message.start
        first = message.start if tenant.has_rows else min(message.start, len(known))
        for at in range(first + len(slots), len(hashes)):
            entry = known[at] if at < len(known) else None
            slot = entry.warm_slot if entry else None
            if slot is not None:
                if room > 0:
                    index.warm.pin(slot)
                    self.add(connection, [slot])
                    room -= 1
                elif message.lease:
                    slot, has_cold = NO_SLOT, True
                slots.append(slot)
                continue
            parent = parent_hash(tenant, hashes, at)
            is_stored, failed = is_in_some(sources, hashes[at], parent, tenant.layout.block_size)
            has_failed |= failed
            if not is_stored:
                break
            if at >= message.start:
                slots.append(NO_SLOT)
                has_cold = True
                room -= 1  # for its fetch: blocks that follow it are of no use without it
        else:
            return slots, has_cold, has_failed
        return (slots, has_cold, has_failed) if at >= message.start else (None, False, has_failed)

    def find_partial(
        self, connection: Connection, hashes: list[bytes], total: int, parent: Entry | None, message: Match
    ) -> tuple[FoundPartial | None, bool]:
        """Return the child of the last block found that shares most leading tokens with the rest of the prompt.

        parent: that last block's entry, or the root, where the index has it. The flag says whether a source failed.
        """
        tenant = connection.require_tenant()
        rest = message.tokens[total * tenant.step : (total + 1) * tenant.step]
        best: FoundPartial | None = None
        longest = message.min_partial_tokens - 1
        if longest * TOKEN_BYTES >= len(rest) or tenant.has_rows:
            return None, False
        nearest = tenant.size_class.index.nearest_child(parent.block_hash, rest) if parent else None
        if nearest and nearest[2] > longest and nearest[0] not in tenant.size_class.chosen.marked:
            child, _, longest = nearest
            assert child.warm_slot is not None, "there is no hot tier here"
            best = FoundPartial(child.block_hash, child.token_bytes, longest, child.warm_slot)
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
                best = FoundPartial(*found, NO_SLOT)
        if best and best.slot != NO_SLOT and message.lease:
            if self.room(connection) > 0:
                tenant.size_class.index.warm.pin(best.slot)
                self.add(connection, [best.slot])
            else:
                best.slot = NO_SLOT
        return best, has_failed

    def check(self, connections: Iterable[Connection]) -> None:
        """Raise AssertionError unless these connections hold as many leases as were counted."""
        for connection in connections:
            assert connection.num_leases == connection.leases.total()
        assert self.count == sum(connection.num_leases for connection in connections)

    def _lease_run(self, connection: Connection, entries: Sequence[Entry | None], room: int) -> array[int]:
        """Lease the leading entries that lie in the warm tier, all at once: most requests find only such."""
        slots = array("I")
        for entry in entries[:room]:
            if entry is None or entry.warm_slot is None:
                break
            slots.append(entry.warm_slot)
        connection.require_tenant().size_class.index.warm.pin_all(slots)
        self.add(connection, slots)
        return slots

    def _change(self, connection: Connection, change: int) -> None:
        connection.num_leases += change
        self.count += change
