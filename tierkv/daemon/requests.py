"""Requests: the daemon's handler for each message of a client.

Short requests are answered at once, on the loop. A handler that takes time (loading, waiting, flushing) is a coroutine.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from functools import partial
from typing import Any, TypeAlias

from tierkv.daemon.checked_fields import absolute_path, described_namespace
from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.connection import Answer, ClientConnection
from tierkv.daemon.core import Core
from tierkv.daemon.eviction_messages import EngineEvicted, EvictBlocks, EvictionDone, EvictionsSince
from tierkv.daemon.evictor import Evictor
from tierkv.daemon.loader import Loader, Prefetcher
from tierkv.daemon.members import is_for_members
from tierkv.daemon.messages import (
    MOST_COUNT,
    Abandon,
    Compact,
    Count,
    Done,
    EndClaim,
    Evict,
    Fetch,
    Flush,
    Hello,
    LoadState,
    Match,
    Message,
    Pin,
    Prefetch,
    Publish,
    Release,
    Reserve,
    SaveState,
    Status,
    StatusReport,
    Stop,
    Used,
    Wait,
    Waited,
    Welcome,
)
from tierkv.daemon.protocol import ProtocolError, printable, split_hashes, split_numbers
from tierkv.daemon.remote_blocks import RemoteBlocks
from tierkv.daemon.side_threads import SideThreads, result_of
from tierkv.daemon.state_files import StateFiles
from tierkv.daemon.store_writer import StoreWriter
from tierkv.daemon.values import Tenant, Write, whole_hashes
from tierkv.errors import DaemonError
from tierkv.storage.cold import ColdStore
from tierkv.storage.warm import Slab
from tierkv.values.block import HASH_BYTES, BlockHash
from tierkv.values.namespace import NAME_LIMIT, has_rows
from tierkv.values.users import user_name

__all__ = ["Requests"]

_CLIENT_CHARACTERS = 64
_NUM_ASIDE = 16
_PIN_S = 25.0  # the client waits 30
_MAX_WAIT_S = 60.0


class Requests:
    """Answers messages. Used on the loop.

    members_descriptor: of the slab, to read only. report: returns the status. stop: ends the daemon.
    """

    def __init__(
        self,
        core: Core,
        *,
        config: DaemonConfig,
        store: ColdStore | None,
        slab: Slab,
        loader: Loader,
        writer: StoreWriter,
        prefetcher: Prefetcher,
        files: StateFiles,
        evictor: Evictor,
        members_descriptor: int | None,
        remote: RemoteBlocks | None,
        report: Callable[[], StatusReport],
        stop: Callable[[], None],
    ) -> None:
        self._core = core
        self._store = store
        self._config = config
        self._slab = slab
        self._members_descriptor = members_descriptor
        self._loader = loader
        self._writer = writer
        self._prefetcher = prefetcher
        self._report = report
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._files = files
        self._evictor = evictor
        self._remote = remote
        self._aside = SideThreads(_NUM_ASIDE, name="tierkv-aside")
        self._waiters: dict[BlockHash, set[asyncio.Future[None]]] = {}

    def answer(self, client: ClientConnection, message: Message) -> Answer | Coroutine[Any, Any, Answer]:
        """Return the answer to a message, or a coroutine that returns it."""
        handler = _HANDLERS.get(type(message))
        if handler is None:
            raise ProtocolError(f"{type(message).__name__} is no request")
        if client.is_member and not is_for_members(message):
            raise DaemonError(
                f"{type(message).__name__} is for the daemon's user, {user_name(os.geteuid())}; its group may only read"
            )
        if client.connection.tenant is None and not isinstance(
            message, Status | Stop | Compact | Flush | Hello | EvictBlocks
        ):
            raise ProtocolError("the first message must be Hello, with a namespace")
        if isinstance(message, Flush | SaveState | LoadState | Pin | Compact | EvictBlocks):
            return self._in_turn(client, message, handler)
        return handler(self, client, message)

    def close(self) -> None:
        """Close the loaded state files. Does not wait for their reads."""
        self._files.close()
        if self._members_descriptor is not None:
            os.close(self._members_descriptor)
            self._members_descriptor = None
        self._aside.shutdown()

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a block which another client computes."""
        return sum(map(len, self._waiters.values()))

    def notify(self, block_hashes: Iterable[BlockHash]) -> None:
        """Answer the requests that wait for blocks which were published, or which no client computes any more."""
        for block_hash in block_hashes:
            for waiter in self._waiters.pop(block_hash, ()):
                if not waiter.done():
                    waiter.set_result(None)

    def hello(self, client: ClientConnection, message: Hello) -> Answer:
        """Open the client's namespace, if it names one, and send it the slab's descriptor."""
        client.connection.client = printable(message.client, _CLIENT_CHARACTERS)
        welcome = Welcome(
            pid=os.getpid(),
            slab_bytes=self._slab.size_bytes,
            store=str(self._config.store or ""),
            has_cold=self._store is not None,
            is_member=client.is_member,
        )
        if not message.namespace:
            return welcome
        described = described_namespace(message)
        tenant = self._core.open_tenant(
            client.connection,
            described.digest,
            message.description,
            layout=described.layout,
            name=printable(described.name, NAME_LIMIT),
            owner=described.salt_digest,
            codec=described.lossy_codec,
            has_rows=has_rows(described.fields["architecture"]),
            is_member=client.is_member,
        )
        if client.is_member:  # it could register a false name, and keep blocks by lease flags
            if self._members_descriptor is not None:
                client.attach_descriptors((self._members_descriptor,))
            return welcome
        self._writer.note_use(tenant)
        if self._slab.fd is not None:
            more, welcome.flag_slots, welcome.most_flags = self._core.flag_leases.connect(client.connection)
            client.attach_descriptors((self._slab.fd, *more), own=more[1:])
        return welcome

    def match(self, client: ClientConnection, message: Match) -> Answer | Coroutine[Any, Any, Answer]:
        """Find and lease blocks of a prompt, after a look into remote tiers for what is missing here, if there are any.

        The store notes their use after the answer.
        """
        if client.is_member:
            message.wants_claim = False  # it cannot publish what it computes
            return self._match(client, message)  # nor does it make the daemon fetch
        return self._match(client, message) if self._remote is None else self._match_remotely(client, message)

    async def _match_remotely(self, client: ClientConnection, message: Match) -> Answer:
        assert self._remote is not None
        await self._remote.look_before(client.connection, message)
        if client.connection.is_closed:
            return None
        return self._match(client, message)

    def _match(self, client: ClientConnection, message: Match) -> Answer:
        found = self._core.match(client.connection, message)
        if self._store is not None and (message.lease or message.is_use) and found.slots:
            count = message.start + len(found.slots) // 4
            tenant, packed = client.connection.require_tenant(), message.hashes[: count * HASH_BYTES]
            self._loop.call_soon(lambda: self._note_use(tenant, split_hashes(packed)))
        return found

    async def fetch(self, client: ClientConnection, message: Fetch) -> Answer:
        task = self._core.loads.begin_fetch(client.connection, message)
        await self._loader.load(task)
        return self._core.loads.end_fetch(client.connection, task)

    def release(self, client: ClientConnection, message: Release) -> Answer:
        self._core.release(client.connection, message)
        return None

    def used(self, client: ClientConnection, message: Used) -> Answer:
        for chain in self._core.flag_leases.note_used(client.connection, message):
            self._note_use(client.connection.require_tenant(), chain)
        return None

    def _note_use(self, tenant: Tenant, chain: Sequence[BlockHash]) -> None:
        """Have the store and the remote tiers keep a chain longer."""
        if self._store is not None:
            self._store.notes.touch(chain)
            if self._remote is not None:
                self._remote.touch(tenant, chain)

    def reserve(self, client: ClientConnection, message: Reserve) -> Answer:
        return self._core.reservations.reserve(client.connection, message)

    def publish(self, client: ClientConnection, message: Publish) -> Answer:
        answer, writes = self._core.publish(client.connection, message.slots)
        for write in writes:
            self._writer.submit(write)
        return answer

    def abandon(self, client: ClientConnection, message: Abandon) -> Answer:
        self._core.reservations.abandon(client.connection, split_numbers(message.slots))
        return None

    async def wait(self, client: ClientConnection, message: Wait) -> Answer:
        """Wait until a block is published or no client computes it any more, a minute at most."""
        if len(message.block_hash) != HASH_BYTES:
            raise ProtocolError(f"a block hash has {HASH_BYTES} bytes, not {len(message.block_hash)}")
        if message.timeout_ms < 0:
            raise ProtocolError(f"a wait of {message.timeout_ms} ms")
        if not self._core.claims.is_computing(client.connection, message.block_hash):
            return Waited(is_over=False)
        waiter = self._loop.create_future()
        waiters = self._waiters.setdefault(message.block_hash, set())
        waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, min(message.timeout_ms / 1e3, _MAX_WAIT_S))
            return Waited(is_over=False)
        except asyncio.TimeoutError:
            return Waited(is_over=True)
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(message.block_hash) is waiters:
                del self._waiters[message.block_hash]

    def end_claim(self, client: ClientConnection, message: EndClaim) -> Answer:
        self._core.claims.end(client.connection, message.claim)
        return None

    async def pin(self, client: ClientConnection, message: Pin) -> Answer:
        hashes = self._core.pin(client.connection, message)
        if self._store is not None and hashes:
            ttl_s = message.ttl_s if message.ttl_s >= 0 else None
            pin = partial(self._store.set_pinned, hashes, message.pinned, ttl_s=ttl_s)
            await self._run_aside(pin, _PIN_S, "to pin blocks")
        return Count(count=len(hashes))

    def prefetch(self, client: ClientConnection, message: Prefetch) -> Answer:
        """Queue a prompt to be loaded, unless the queue is full."""
        tenant = client.connection.require_tenant()
        most = self._core.limits.blocks_of_message
        count = len(whole_hashes(tenant, message.hashes, message.tokens, most=most))
        is_queued = self._prefetcher.submit(tenant, message.hashes, message.tokens)
        return Count(count=count if is_queued else 0)

    def evict(self, client: ClientConnection, message: Evict) -> Answer:
        return Count(count=self._core.evict(client.connection, message.count))

    async def evict_blocks(self, client: ClientConnection, message: EvictBlocks) -> Answer:
        return await self._evictor.evict(client.connection, message)

    def evictions_since(self, client: ClientConnection, message: EvictionsSince) -> Answer:
        client.connection.asks_for_evictions = True
        return self._evictor.log.since(message.log, message.number)

    def eviction_done(self, client: ClientConnection, message: EvictionDone) -> Answer:
        """Note which evictions the client has applied."""
        if not all(0 <= each < MOST_COUNT for each in (message.number, message.blocks, message.in_use, message.pinned)):
            raise ProtocolError("impossible numbers of blocks")
        connection = client.connection
        connection.asks_for_evictions = True
        connection.evicted_number = message.number
        connection.evicted = EngineEvicted(connection.client, True, message.blocks, message.in_use, message.pinned)
        return None

    async def flush(self, client: ClientConnection, message: Flush) -> Answer:
        await self._run_aside(lambda: self._writer.flush(stall_s=self._config.stall_s), None, "to flush")
        return Done()

    async def save(self, client: ClientConnection, message: SaveState) -> Answer:
        tenant = client.connection.require_tenant()
        path = absolute_path(message.path)
        await self.flush(client, Flush())
        entries = self._core.warm_entries(tenant)
        blocks = [Write(tenant, entry, entry.warm_slot) for entry in entries if entry.warm_slot is not None]
        return await self._files.save(
            client.connection,
            path,
            self._writer.iter_records(tenant, blocks),
            ended=lambda: self._core.unpin_entries(tenant, [block.slot for block in blocks]),
        )

    async def load(self, client: ClientConnection, message: LoadState) -> Answer:
        """Make a state file a source of the client's namespace, until no client that has loaded it is connected."""
        return Count(count=await self._files.load(client.connection, absolute_path(message.path)))

    async def compact(self, client: ClientConnection, message: Compact) -> Answer:
        if self._store is None:
            raise DaemonError("this daemon has no store")
        await self._run_aside(self._store.compact, None, "to compact the store")
        return Done()

    def stop(self, client: ClientConnection, message: Stop) -> Answer:
        self._loop.call_soon(self._stop)
        return Done()

    def status(self, client: ClientConnection, message: Status) -> Answer:
        return self._report()

    async def _in_turn(self, client: ClientConnection, message: Message, handler: _Handler) -> Answer:
        """Run a request that takes a thread, when few enough of the same client run: all clients share the threads."""
        async with client.slow:
            answer = handler(self, client, message)
            assert answer is not None and not isinstance(answer, Message)
            return await answer

    async def _run_aside(self, call: Callable[[], object], timeout_s: float | None, what: str) -> None:
        """Call something that waits for the store, on a thread. Raises DaemonError if it takes too long."""
        aside = self._aside.submit(call)
        try:
            await result_of(aside, timeout_s=timeout_s)
        except TimeoutError as exc:
            if aside.done():
                raise
            raise DaemonError(f"it took more than {timeout_s:g} s {what}: the store's disk does not answer") from exc


_Handler: TypeAlias = Callable[[Requests, ClientConnection, Any], Answer | Coroutine[Any, Any, Answer]]

_HANDLERS: dict[type[Message], _Handler] = {
    Hello: Requests.hello,
    Match: Requests.match,
    Fetch: Requests.fetch,
    Release: Requests.release,
    Used: Requests.used,
    Reserve: Requests.reserve,
    Publish: Requests.publish,
    Abandon: Requests.abandon,
    Wait: Requests.wait,
    EndClaim: Requests.end_claim,
    Pin: Requests.pin,
    Prefetch: Requests.prefetch,
    Evict: Requests.evict,
    Flush: Requests.flush,
    SaveState: Requests.save,
    LoadState: Requests.load,
    Status: Requests.status,
    Stop: Requests.stop,
    Compact: Requests.compact,
    EvictBlocks: Requests.evict_blocks,
    EvictionsSince: Requests.evictions_since,
    EvictionDone: Requests.eviction_done,
}
