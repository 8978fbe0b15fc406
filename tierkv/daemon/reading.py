"""The daemon's core, reading: what of a prompt is there, who may read it, what comes up from a source."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator

from tierkv.block import TOKEN_BYTES, BlockHash, Tier
from tierkv.daemon.messages import NO_SLOT, Fetch, Fetched, Found, FoundTail, Match, Release
from tierkv.daemon.protocol import ProtocolError, split_numbers
from tierkv.daemon.state import HELD_SHARE, State
from tierkv.daemon.values import (
    BlockSource,
    Connection,
    Cursor,
    FetchTask,
    Load,
    Tenant,
    holds,
    is_in_some,
    whole_hashes,
)
from tierkv.errors import StoreError
from tierkv.index import Entry
from tierkv.storage.outcomes import MissReason

__all__ = ["Reading"]

_MAX_FETCH_BLOCKS = 64
_MAX_CURSORS = 64


class Reading(State):
    """Leases and loads."""

    def match(self, connection: Connection, message: Match) -> Found:
        """Say how much of a prompt is there, leasing what lies in the warm tier if asked to."""
        tenant = connection.require_tenant()
        hashes = whole_hashes(tenant, message.hashes, message.tokens)
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
        if not (
            message.first >= 0 and 1 <= message.count <= _MAX_FETCH_BLOCKS and message.first + message.count <= end
        ):
            raise ProtocolError(f"blocks {message.first} and {message.count - 1} more of {end}")
        return self._begin_fetch(tenant, cursor, message.first, message.count)

    def begin_prefetches(self, tenant: Tenant, hashes: list[bytes], tokens: bytes) -> Iterator[FetchTask]:
        """Yield fetches for nobody, one after the other, that bring up a whole prompt, a stored tail included.

        Each ends by `end_fetch(None, task)`; the caller stops where one of them brings nothing.
        """
        rest = tokens[len(hashes) * tenant.step :]
        tail = _stored_tail(tenant, hashes[-1] if hashes else tenant.digest, rest) if rest else None
        cursor = Cursor(hashes, tokens, len(hashes), tail)
        last = len(hashes) + (tail is not None)
        for first in range(0, last, _MAX_FETCH_BLOCKS):
            yield self._begin_fetch(tenant, cursor, first, min(_MAX_FETCH_BLOCKS, last - first))

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
        return slots

    def _lease_room(self, connection: Connection) -> int:
        tenant = connection.require_tenant()
        return max(1, int(tenant.size_class.num_slots * HELD_SHARE)) - connection.leases.total()

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
        connection.cursors[number] = Cursor(hashes, tokens, total, end)
        return number

    def _begin_fetch(self, tenant: Tenant, cursor: Cursor, first: int, count: int) -> FetchTask:
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
        self, tenant: Tenant, cursor: Cursor, hashes: list[bytes], tokens: bytes, at: int
    ) -> tuple[BlockSource | None, MissReason]:
        """Return the source that has block `at` behind the very chain that leads to it, or why there is none."""
        step = tenant.step
        num_tokens = len(tokens[at * step : (at + 1) * step]) // TOKEN_BYTES
        miss = MissReason.ABSENT
        for number, source in enumerate(tenant.sources):
            parent = hashes[at - 1] if at else tenant.digest
            is_stored, has_failed = is_in_some([source], hashes[at], parent, num_tokens)
            if has_failed:
                miss = MissReason.IO_ERROR
            if not is_stored:
                continue
            verified = cursor.verified.get(number, 0)
            while verified < at and holds(source, tenant, hashes, tokens, verified):
                verified += 1
            cursor.verified[number] = verified
            if verified >= at:
                return source, miss
            miss = MissReason.COLLISION
        return None, miss


def _fetch_chain(tenant: Tenant, cursor: Cursor, first: int, count: int) -> tuple[list[bytes], bytes]:
    """Return hashes and tokens of a cursor's blocks up to the last wanted one, which may be its tail."""
    end = min(first + count, cursor.total)
    hashes, tokens = cursor.hashes[:end], cursor.tokens[: end * tenant.step]
    if first + count > cursor.total and cursor.tail:
        return [*hashes, cursor.tail[0]], tokens + cursor.tail[1]
    return hashes, tokens


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
