"""The daemon's core, fetching: what comes up from a source, into which slot, and who waits for it."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

from tierkv.daemon.messages import NO_SLOT, Fetch, Fetched
from tierkv.daemon.protocol import ProtocolError, split_hashes
from tierkv.daemon.state import State
from tierkv.daemon.values import BlockSource, Connection, Cursor, FetchTask, Load, Tenant, is_in_some
from tierkv.errors import StoreError
from tierkv.storage.outcomes import MissReason
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash, Tier

__all__ = ["Fetching"]


class Fetching(State):
    """Loads, and the fetches that wait for them."""

    def begin_fetch(self, connection: Connection, message: Fetch) -> FetchTask:
        """Pin what is there already, start loads for the rest. The server fills `fresh`, then calls `end_fetch`.

        What comes up is leased: of a client that holds as much as it may the task has no block.
        """
        tenant = connection.require_tenant()
        cursor = connection.cursors.get(message.cursor)
        if cursor is None:
            raise ProtocolError(f"no cursor {message.cursor} is open")
        end = cursor.total + (cursor.partial_block is not None)
        if not (
            message.first >= 0
            and 1 <= message.count <= self.limits.fetch_blocks
            and message.first + message.count <= end
        ):
            raise ProtocolError(f"{message.count} blocks from {message.first} on, of {end}")
        count = min(message.count, max(0, self._lease_room(connection)))
        task = self._begin_fetch(tenant, cursor, message.first, count)
        task.num_counted = len(task.slots)
        connection.num_fetching += task.num_counted
        if count < message.count and task.miss is None:
            task.miss = MissReason.NO_ROOM
        return task

    def begin_prefetches(self, tenant: Tenant, hashes: list[bytes], tokens: bytes) -> Iterator[FetchTask]:
        """Yield fetches for nobody, one after the other, that bring up a whole prompt, a stored partial block included.

        Each ends by `end_fetch(None, task)`; the caller stops where one of them brings nothing.
        """
        rest = tokens[len(hashes) * tenant.step :]
        partial_block = _stored_partial(tenant, hashes[-1] if hashes else tenant.digest, rest) if rest else None
        cursor = Cursor(b"".join(hashes), tokens, len(hashes), partial_block)
        last, most = len(hashes) + (partial_block is not None), self.limits.fetch_blocks
        for first in range(0, last, most):
            if self.tenants.get(tenant.digest) is not tenant:
                return  # forgotten meanwhile
            yield self._begin_fetch(tenant, cursor, first, min(most, last - first))

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
        """Lease the leading blocks that arrived, give the others up. A load that is not done counts as failed."""
        tenant = self._fetching.pop(task)
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
                connection.leases.update(task.slots[:num_leased])
                self._count_leases(connection, num_leased)
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
        """Take slots for the wanted blocks and make their entries; what finds no room ends the task there."""
        index = tenant.size_class.index
        slots = tenant.size_class.take(len(wanted)) if wanted else []
        entries = self._anchor(tenant, hashes[: wanted[len(slots) - 1][0] + 1], tokens) if slots else []
        for (at, source), slot in zip(wanted, slots, strict=False):
            if at < len(entries) and not entries[at].awaited and entries[at].warm_slot is None:
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
        for _ in range(load.num_left):
            load.tenant.size_class.index.unpin(Tier.WARM, load.slot)

    def _source_of(
        self, tenant: Tenant, hashes: list[bytes], tokens: bytes, at: int
    ) -> tuple[BlockSource | None, MissReason]:
        """Return a source that has a block of this hash, parent and length, or why there is none.

        Whether it is this very block is known once it has been read: the source compares its content digest, which
        covers all
        blocks before it.
        """
        step = tenant.step
        num_tokens = len(tokens[at * step : (at + 1) * step]) // TOKEN_BYTES
        parent = hashes[at - 1] if at else tenant.digest
        miss = MissReason.ABSENT
        for source in tenant.sources:
            is_stored, has_failed = is_in_some([source], hashes[at], parent, num_tokens)
            if is_stored:
                return source, miss
            if has_failed:
                miss = MissReason.IO_ERROR
        return None, miss


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
