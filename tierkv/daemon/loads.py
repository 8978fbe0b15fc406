"""Loads: which blocks are on their way from a source into which slot, and which fetches wait for them."""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator

from tierkv.daemon.leases import Leases
from tierkv.daemon.messages import NO_SLOT, Fetch, Fetched, FoundPartial, Match
from tierkv.daemon.protocol import ProtocolError, split_hashes
from tierkv.daemon.tenants import Tenants
from tierkv.daemon.values import BlockSource, Connection, Cursor, FetchTask, Load, Tenant, is_in_some, parent_hash
from tierkv.errors import StoreError
from tierkv.index.index import Entry
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash, Tier

__all__ = ["Loads"]


class Loads:
    """A load reads one block from a source into a slot. Every other fetch of the block waits for it.

    A cursor names the blocks of one matched prompt, so that a fetch can ask for them by number.
    cursor_bytes: memory of all cursors.
    """

    def __init__(self, tenants: Tenants, leases: Leases) -> None:
        self.cursor_bytes: int = 0
        self._tenants = tenants
        self._leases = leases
        self._limits = tenants.limits
        self._loads: dict[Entry, Load] = {}
        self._fetching: dict[FetchTask, Tenant] = {}
        self._numbers = itertools.count(1)

    def open_cursor(
        self,
        connections: Iterable[Connection],
        connection: Connection,
        message: Match,
        total: int,
        partial_block: FoundPartial | None,
    ) -> int:
        """Keep what was found of a prompt and return its number. Beyond the limits the oldest cursors end.

        connections: all of them. Beyond the limit of all cursors, the connection that has most loses its oldest one.
        """
        number = next(self._numbers) & 0xFFFF_FFFF or next(self._numbers)
        end = (partial_block.block_hash, partial_block.tokens) if partial_block else None
        step = connection.require_tenant().step
        cursor = Cursor(message.hashes[: total * HASH_BYTES], message.tokens[: total * step], total, end)
        connection.cursors[number] = cursor
        self._count_cursor(connection, cursor.num_bytes)
        limits = self._limits
        while (
            len(connection.cursors) > limits.cursors_of_client
            or connection.cursor_bytes > limits.cursor_bytes_of_client
        ):
            self.end_cursor(connection, next(iter(connection.cursors)))
        while self.cursor_bytes > limits.cursor_bytes:
            richest = max(connections, key=lambda each: each.cursor_bytes)
            self.end_cursor(richest, next(iter(richest.cursors)))
        return number

    def end_cursor(self, connection: Connection, number: int) -> None:
        """Forget a cursor. One that has ended already is no error: the daemon may end what a client still has."""
        cursor = connection.cursors.pop(number, None)
        if cursor:
            self._count_cursor(connection, -cursor.num_bytes)

    def begin_fetch(self, connection: Connection, message: Fetch) -> FetchTask:
        """Pin the blocks that lie in the warm tier, start loads for the others, and return both.

        The caller runs the loads in `fresh`, then calls `end_fetch`. All blocks of the task count as leased: it has no
        more of them than the connection may still lease. Raises ProtocolError.
        """
        tenant = connection.require_tenant()
        cursor = connection.cursors.get(message.cursor)
        if cursor is None:
            raise ProtocolError(f"no cursor {message.cursor} is open")
        end = cursor.total + (cursor.partial_block is not None)
        if not (
            message.first >= 0
            and 1 <= message.count <= self._limits.fetch_blocks
            and message.first + message.count <= end
        ):
            raise ProtocolError(f"{message.count} blocks from {message.first} on, of {end}")
        count = min(message.count, max(0, self._leases.room(connection)))
        task = self._begin_fetch(tenant, cursor, message.first, count)
        task.num_counted = len(task.slots)
        connection.num_fetching += task.num_counted
        if count < message.count and task.miss is None:
            task.miss = MissReason.NO_ROOM
        return task

    def begin_prefetches(self, tenant: Tenant, hashes: list[bytes], tokens: bytes) -> Iterator[FetchTask]:
        """Yield fetches, one after the other, that load a whole prompt, a stored partial block included, for no client.

        The caller ends each by `end_fetch(None, task)`, and stops where one of them loads nothing.
        """
        rest = tokens[len(hashes) * tenant.step :]
        partial_block = _stored_partial(tenant, hashes[-1] if hashes else tenant.digest, rest) if rest else None
        cursor = Cursor(b"".join(hashes), tokens, len(hashes), partial_block)
        last, most = len(hashes) + (partial_block is not None), self._limits.fetch_blocks
        for first in range(0, last, most):
            if self._tenants.by_digest.get(tenant.digest) is not tenant:
                return  # forgotten meanwhile
            yield self._begin_fetch(tenant, cursor, first, min(most, last - first))

    def finish(self, load: Load, reason: MissReason | None) -> None:
        """End a load. reason: why its slot does not hold the block, or None if it does."""
        load.is_done = True
        load.reason = reason
        if reason is None:
            self._tenants.attach(load.tenant, load.entry, load.slot)
            load.entry.in_cold = load.source is self._tenants.store
        self._end_load(load)

    def end_fetch(self, connection: Connection | None, task: FetchTask) -> Fetched:
        """Lease the leading blocks that arrived and unpin the others. A load that is not done counts as failed.

        connection: None for a prefetch, which leases nothing.
        """
        tenant = self._fetching.pop(task)
        tenant.num_loading -= 1
        num_good = len(task.slots)
        miss = task.miss
        for at, load in task.loads.items():
            reason = load.reason if load.is_done else MissReason.IO_ERROR
            if reason is not None and at < num_good:
                num_good, miss = at, reason
        num_leased = 0
        if connection is not None:
            connection.num_fetching -= task.num_counted
            if not connection.is_closed:
                num_leased = num_good
                self._leases.add(connection, task.slots[:num_leased])
        for at in range(num_leased, len(task.slots)):
            left = task.loads.get(at)
            if left and not left.is_done:
                left.num_left += 1  # a thread may still write into the slot
            else:
                tenant.size_class.index.unpin(Tier.WARM, task.slots[at])
        return Fetched(slots=array("I", task.slots[:num_good]).tobytes(), miss=miss.value if miss else "")

    def _begin_fetch(self, tenant: Tenant, cursor: Cursor, first: int, count: int) -> FetchTask:
        task = FetchTask()
        self._fetching[task] = tenant
        tenant.num_loading += 1
        size_class = tenant.size_class
        hashes, tokens = _fetch_chain(tenant, cursor, first, count)
        wanted: list[tuple[int, BlockSource]] = []
        known = self._tenants.walk(tenant, hashes, tokens)
        for at in range(first, first + count):  # pin what is there before room is made for the others
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
                source, miss = self._source_of(tenant, hashes, tokens, at)
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
        """Take slots for the wanted blocks and make their entries. The task ends at the first block without a slot."""
        index = tenant.size_class.index
        slots = self._tenants.shares.take(tenant, len(wanted)) if wanted else []
        numbers = [at for at, _ in wanted[: len(slots)]]
        entries = self._tenants.insert(tenant, hashes, tokens, numbers) if slots else {}
        for (at, source), slot in zip(wanted, slots, strict=False):
            entry = entries.get(at)
            if entry and not entry.awaited and entry.warm_slot is None:
                load = Load(tenant, entry, slot, source)
                load.entry.awaited = True
                tenant.num_awaited += 1
                self._loads[load.entry] = load
                tenant.num_loading += 1
                task.loads[at - first] = load
                task.slots[at - first] = slot
            else:
                index.unpin(Tier.WARM, slot)
        if entries:
            self._tenants.prune(tenant, entries[max(entries)])
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
        load.tenant.num_loading -= 1
        load.entry.awaited = False
        load.tenant.num_awaited -= 1
        self._tenants.prune(load.tenant, load.entry)
        for _ in range(load.num_left):
            load.tenant.size_class.index.unpin(Tier.WARM, load.slot)

    def _source_of(
        self, tenant: Tenant, hashes: list[bytes], tokens: bytes, at: int
    ) -> tuple[BlockSource | None, MissReason]:
        """Return a source that has a block of this hash, parent and length, or why there is none.

        The read proves that it is this very block: the source compares its content digest, which covers all blocks
        before it.
        """
        step = tenant.step
        num_tokens = len(tokens[at * step : (at + 1) * step]) // TOKEN_BYTES
        parent = parent_hash(tenant, hashes, at)
        miss = MissReason.ABSENT
        for source in tenant.sources:
            is_stored, has_failed = is_in_some([source], hashes[at], parent, num_tokens)
            if is_stored:
                return source, miss
            if has_failed:
                miss = MissReason.IO_ERROR
        return None, miss

    def pins(self) -> Iterator[tuple[Tenant, int, int]]:
        """Yield (tenant, slot, pins) of what fetches and loads in work have pinned."""
        for task, tenant in self._fetching.items():
            yield from ((tenant, slot, 1) for slot in task.slots)
        for load in self._loads.values():
            yield load.tenant, load.slot, load.num_left

    def check(self, tenants: Iterable[Tenant], connections: set[Connection]) -> None:
        """Raise AssertionError unless cursors, loads and fetches are counted right."""
        for connection in connections:
            assert connection.cursor_bytes == sum(cursor.num_bytes for cursor in connection.cursors.values())
        assert self.cursor_bytes == sum(connection.cursor_bytes for connection in connections)
        loading = Counter([load.tenant for load in self._loads.values()])
        loading.update(self._fetching.values())
        assert all(tenant.num_loading == loading[tenant] for tenant in tenants)

    def _count_cursor(self, connection: Connection, change: int) -> None:
        connection.cursor_bytes += change
        self.cursor_bytes += change


def _fetch_chain(tenant: Tenant, cursor: Cursor, first: int, count: int) -> tuple[list[bytes], bytes]:
    """Return hashes and tokens of a cursor's blocks up to the last wanted one, which may be its partial block."""
    end = min(first + count, cursor.total)
    hashes, tokens = split_hashes(cursor.hashes[: end * HASH_BYTES]), cursor.tokens[: end * tenant.step]
    if first + count > cursor.total and cursor.partial_block:
        return [*hashes, cursor.partial_block[0]], tokens + cursor.partial_block[1]
    return hashes, tokens


def _stored_partial(tenant: Tenant, parent: BlockHash, rest: bytes) -> tuple[bytes, bytes] | None:
    """Return (hash, tokens) of a source's block that has all tokens of a prompt's partly filled last block."""
    for source in tenant.sources:
        try:
            found = source.find_longest_run(parent, rest)
        except StoreError:
            continue
        if found and found[2] * TOKEN_BYTES == len(rest):
            return found[0], found[1]
    return None
