"""The daemon's core, matching: what of a prompt is there, and who may read it."""

from __future__ import annotations

from array import array
from collections import Counter

from tierkv.daemon.messages import NO_SLOT, Found, FoundPartial, Match, Release
from tierkv.daemon.protocol import ProtocolError, split_numbers
from tierkv.daemon.state import State
from tierkv.daemon.values import Connection, Cursor, Tenant, is_in_some, whole_hashes
from tierkv.errors import StoreError
from tierkv.index.index import Entry
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, Tier

__all__ = ["Matching"]


class Matching(State):
    """Leases, and the cursors that name what was found but lies in no slot."""

    def match(self, connection: Connection, message: Match) -> Found:
        """Say how much of a prompt is there, leasing what lies in the warm tier if asked to."""
        tenant = connection.require_tenant()
        hashes = whole_hashes(tenant, message.hashes, message.tokens, most=self.limits.blocks_of_message)
        if message.min_partial_tokens < 1:
            raise ProtocolError(f"a partial block of {message.min_partial_tokens} tokens")
        if not 0 <= message.start <= len(hashes):
            raise ProtocolError(f"block {message.start} of {len(hashes)} to start from")
        known = self._walk(tenant, hashes, message.tokens)
        slots, has_cold, has_failed = self._find_blocks(connection, known, hashes, message)
        total = message.start + len(slots) if slots is not None else 0
        partial_block = None
        if slots is not None:
            parent = self._parent_entry(tenant, known, total)
            partial_block, failed = self._find_partial(connection, hashes, total, parent, message)
            has_failed |= failed
        cursor = 0
        if message.lease and (has_cold or (partial_block and partial_block.slot == NO_SLOT)):
            cursor = self._open_cursor(connection, tenant, message, total, partial_block)
        miss = ""
        if has_failed:
            miss = MissReason.IO_ERROR.value
        elif total < len(hashes) and total == len(known) and tenant.size_class.index.peek(hashes[total]):
            miss = MissReason.COLLISION.value
        claim, is_computing = 0, False
        if message.wants_claim and total < len(hashes):
            claim, is_computing = self._claim_for(connection, hashes[total:])
        found = slots if slots is not None else array("I")
        self.counters["matched_blocks"] += len(found)
        self.counters["missed_blocks"] += len(hashes) - total
        return Found(
            slots=found.tobytes(),
            partial_block=partial_block,
            cursor=cursor,
            claim=claim,
            is_computing=is_computing,
            miss=miss,
        )

    def release(self, connection: Connection, message: Release) -> None:
        """End leases and cursors. Raises ProtocolError, with nothing ended, for a slot that is not leased."""
        tenant = connection.require_tenant()
        slots, cursors = split_numbers(message.slots), split_numbers(message.cursors)
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
        self._count_leases(connection, -len(slots))
        tenant.size_class.chosen.retry()
        for cursor in cursors:
            self._end_cursor(connection, cursor)

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
                    self._count_leases(connection, 1)
                    room -= 1
                elif message.lease:
                    slot, has_cold = NO_SLOT, True
                slots.append(slot)
                continue
            parent = hashes[at - 1] if at else tenant.digest
            is_stored, failed = is_in_some(sources, hashes[at], parent, tenant.layout.block_size)
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
        self._count_leases(connection, len(slots))
        return slots

    def _parent_entry(self, tenant: Tenant, known: list[Entry], total: int) -> Entry | None:
        if total > len(known):
            return None
        return known[total - 1] if total else self._root(tenant)

    def _find_partial(
        self, connection: Connection, hashes: list[bytes], total: int, parent: Entry | None, message: Match
    ) -> tuple[FoundPartial | None, bool]:
        """Return the child of the last block found that shares most leading tokens with the rest of the prompt."""
        tenant = connection.require_tenant()
        rest = message.tokens[total * tenant.step : (total + 1) * tenant.step]
        best: FoundPartial | None = None
        longest = message.min_partial_tokens - 1
        if not rest:
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
            if self._lease_room(connection) > 0:
                tenant.size_class.index.warm.pin(best.slot)
                connection.leases[best.slot] += 1
                self._count_leases(connection, 1)
            else:
                best.slot = NO_SLOT
        return best, has_failed

    def _open_cursor(
        self, connection: Connection, tenant: Tenant, message: Match, total: int, partial_block: FoundPartial | None
    ) -> int:
        """Keep what was found of a prompt, in place of the oldest ones if it is too much. Return its number."""
        number = next(self._numbers) & 0xFFFF_FFFF or next(self._numbers)
        end = (partial_block.block_hash, partial_block.tokens) if partial_block else None
        cursor = Cursor(message.hashes[: total * HASH_BYTES], message.tokens[: total * tenant.step], total, end)
        connection.cursors[number] = cursor
        self._count_cursor(connection, cursor.num_bytes)
        limits = self.limits
        while (
            len(connection.cursors) > limits.cursors_of_client
            or connection.cursor_bytes > limits.cursor_bytes_of_client
        ):
            self._end_cursor(connection, next(iter(connection.cursors)))
        while self.cursor_bytes > limits.cursor_bytes:
            richest = max(self.connections, key=lambda each: each.cursor_bytes)
            self._end_cursor(richest, next(iter(richest.cursors)))
        return number

    def _end_cursor(self, connection: Connection, number: int) -> None:
        """Forget a cursor, unless it has gone already: the daemon may end one that a client still has."""
        cursor = connection.cursors.pop(number, None)
        if cursor:
            self._count_cursor(connection, -cursor.num_bytes)

    def _count_cursor(self, connection: Connection, change: int) -> None:
        connection.cursor_bytes += change
        self.cursor_bytes += change
