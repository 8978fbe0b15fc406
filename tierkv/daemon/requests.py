"""Requests: what the daemon does at each message of a client.

Short requests are answered at once, on the loop. What takes time (decoding, waiting, flushing) is a coroutine, answered
when it is done.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

from tierkv.block import HASH_BYTES
from tierkv.daemon.connection import Answer, ClientConnection
from tierkv.daemon.core import Core, Write
from tierkv.daemon.loader import Loader
from tierkv.daemon.messages import (
    Abandon,
    Compact,
    Count,
    Done,
    EndTicket,
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
    Saved,
    SaveState,
    Status,
    StatusReport,
    Stop,
    Wait,
    Waited,
    Welcome,
)
from tierkv.daemon.prefetcher import Prefetcher
from tierkv.daemon.protocol import MAX_PATH_BYTES, ProtocolError, printable, split_hashes, split_numbers
from tierkv.daemon.store_writer import StoreWriter
from tierkv.daemon.values import whole_hashes
from tierkv.daemon.waiters import Waiters
from tierkv.errors import ConfigError, DaemonError, NamespaceMismatchError
from tierkv.namespace import NAME_LIMIT, NamespaceDescription, parse_description
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.cold import ColdStore
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.storage.warm import Slab

__all__ = ["Requests"]

_CLIENT_CHARACTERS = 64


class Requests:
    """Answers messages. Used on the loop; what it opens (state files) it closes.

    report: everything that a status says. stop: ends the daemon.
    """

    def __init__(
        self,
        core: Core,
        *,
        store: ColdStore | None,
        store_path: Path | None,
        slab: Slab,
        threads: ThreadPoolExecutor,
        loader: Loader,
        writer: StoreWriter,
        waiters: Waiters,
        prefetcher: Prefetcher,
        report: Callable[[], StatusReport],
        stop: Callable[[], None],
    ) -> None:
        self._core = core
        self._store = store
        self._store_path = store_path
        self._slab = slab
        self._threads = threads
        self._loader = loader
        self._writer = writer
        self._waiters = waiters
        self._prefetcher = prefetcher
        self._report = report
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._states: list[StateFile] = []

    def answer(self, client: ClientConnection, message: Message) -> Answer | Coroutine[Any, Any, Answer]:
        """Return the answer to a message, or what will come up with it."""
        handler = _HANDLERS.get(type(message))
        if handler is None:
            raise ProtocolError(f"{type(message).__name__} is no request")
        if client.connection.tenant is None and not isinstance(message, Status | Stop | Compact | Flush | Hello):
            raise ProtocolError("the first message must be Hello, with a namespace")
        if isinstance(message, Flush | SaveState | LoadState | Pin | Compact):
            return self._in_turn(client, message, handler)
        return handler(self, client, message)

    def close(self) -> None:
        """Close the state files that clients had loaded."""
        for state in self._states:
            state.close()

    def hello(self, client: ClientConnection, message: Hello) -> Answer:
        """Let a client in, and hand it the slab if it names a namespace."""
        client.connection.client = printable(message.client, _CLIENT_CHARACTERS)
        welcome = Welcome(
            pid=os.getpid(),
            slab_bytes=self._slab.size_bytes,
            store=str(self._store_path or ""),
            has_cold=self._store is not None,
        )
        if not message.namespace:
            return welcome
        described = _checked_description(message)
        tenant = self._core.open_tenant(
            client.connection,
            described.digest,
            message.description,
            layout=described.layout,
            name=printable(described.name, NAME_LIMIT),
            owner=described.salt_digest,
            codec=described.lossy_codec,
        )
        self._writer.note_use(tenant)
        client.hand_over(self._slab.fd)
        return welcome

    def match(self, client: ClientConnection, message: Match) -> Answer:
        """Answer at once; the store hears of the use afterwards."""
        found = self._core.match(client.connection, message)
        if self._store is not None and message.lease and found.slots:
            count = message.start + len(found.slots) // 4
            hashes = message.hashes[: count * HASH_BYTES]
            self._loop.call_soon(self._touch, hashes)
        return found

    async def fetch(self, client: ClientConnection, message: Fetch) -> Answer:
        """Bring blocks into the warm tier; answer when they are there."""
        task = self._core.begin_fetch(client.connection, message)
        await self._loader.load(task)
        return self._core.end_fetch(client.connection, task)

    def release(self, client: ClientConnection, message: Release) -> Answer:
        """End leases."""
        self._core.release(client.connection, message)
        return None

    def reserve(self, client: ClientConnection, message: Reserve) -> Answer:
        """Give slots to write into."""
        return self._core.reserve(client.connection, message)

    def publish(self, client: ClientConnection, message: Publish) -> Answer:
        """Make blocks findable and queue them for the store."""
        answer, writes = self._core.publish(client.connection, message.slots)
        for write in writes:
            self._writer.offer(write)
        return answer

    def abandon(self, client: ClientConnection, message: Abandon) -> Answer:
        """Take reserved slots back."""
        self._core.abandon(client.connection, split_numbers(message.slots))
        return None

    async def wait(self, client: ClientConnection, message: Wait) -> Answer:
        """Answer when there is news of a block, or the time is over."""
        if len(message.block_hash) != HASH_BYTES:
            raise ProtocolError(f"a block hash has {HASH_BYTES} bytes, not {len(message.block_hash)}")
        if message.timeout_ms < 0:
            raise ProtocolError(f"a wait of {message.timeout_ms} ms")
        if not self._core.is_computed(client.connection, message.block_hash):
            return Waited(is_over=False)
        return Waited(is_over=not await self._waiters.wait(message.block_hash, message.timeout_ms / 1e3))

    def end_ticket(self, client: ClientConnection, message: EndTicket) -> Answer:
        """Nobody computes these any more."""
        self._core.end_ticket(client.connection, message.ticket)
        return None

    async def pin(self, client: ClientConnection, message: Pin) -> Answer:
        """Pin in the warm tier and in the store."""
        hashes = self._core.pin(client.connection, message)
        if self._store is not None and hashes:
            await self._loop.run_in_executor(None, self._store.set_pinned, hashes, message.pinned)
        return Count(count=len(hashes))

    def prefetch(self, client: ClientConnection, message: Prefetch) -> Answer:
        """Queue a prompt; a full queue forgets it."""
        tenant = client.connection.require_tenant()
        most = self._core.limits.blocks_of_message
        count = len(whole_hashes(tenant, message.hashes, message.tokens, most=most))
        is_queued = self._prefetcher.offer(tenant, message.hashes, message.tokens)
        return Count(count=count if is_queued else 0)

    def evict(self, client: ClientConnection, message: Evict) -> Answer:
        """Evict the client's own blocks."""
        return Count(count=self._core.evict(client.connection, message.count))

    async def flush(self, client: ClientConnection, message: Flush) -> Answer:
        """Wait until what is published so far is on the disk."""
        await self._loop.run_in_executor(None, self._writer.flush)
        return Done()

    async def save(self, client: ClientConnection, message: SaveState) -> Answer:
        """Write a state file of the client's namespace."""
        tenant = client.connection.require_tenant()
        path = _checked_path(message.path)
        await self.flush(client, Flush())
        entries = self._core.warm_entries(tenant)
        slots = [entry.warm_slot for entry in entries if entry.warm_slot is not None]
        blocks = [Write(tenant, entry, slot) for entry, slot in zip(entries, slots, strict=True)]
        try:
            saved = await self._loop.run_in_executor(
                None,
                lambda: write_state_file(
                    path,
                    namespace=tenant.digest,
                    description=tenant.description,
                    records=self._writer.iter_records(tenant, blocks),
                ),
            )
        finally:
            self._core.unpin_entries(tenant, slots)
        return Saved(blocks=saved.blocks, file_bytes=saved.file_bytes)

    async def load(self, client: ClientConnection, message: LoadState) -> Answer:
        """Take a state file as one more source."""
        tenant = client.connection.require_tenant()
        path = _checked_path(message.path)
        state = await self._loop.run_in_executor(None, StateFile, path)
        if state.namespace != tenant.digest:
            state.close()
            raise NamespaceMismatchError(f"{path} was saved for another model or setting")
        self._states.append(state)
        tenant.sources.append(state)
        return Count(count=len(state))

    async def compact(self, client: ClientConnection, message: Compact) -> Answer:
        """Compact the store."""
        if self._store is None:
            raise DaemonError("this daemon has no store")
        await self._loop.run_in_executor(None, self._store.compact)
        return Done()

    def stop(self, client: ClientConnection, message: Stop) -> Answer:
        """End soon."""
        self._loop.call_soon(self._stop)
        return Done()

    def status(self, client: ClientConnection, message: Status) -> Answer:
        """Return everything there is to say."""
        return self._report()

    async def _in_turn(self, client: ClientConnection, message: Message, handler: _Handler) -> Answer:
        """Work on a request that takes a thread once few enough of the same client do: the threads are everybody's."""
        async with client.slow:
            answer = handler(self, client, message)
            assert answer is not None and not isinstance(answer, Message)
            return await answer

    def _touch(self, hashes: bytes) -> None:
        if self._store is not None:
            self._store.touch(split_hashes(hashes))


_Handler: TypeAlias = Callable[[Requests, ClientConnection, Any], Answer | Coroutine[Any, Any, Answer]]

_HANDLERS: dict[type[Message], _Handler] = {
    Hello: Requests.hello,
    Match: Requests.match,
    Fetch: Requests.fetch,
    Release: Requests.release,
    Reserve: Requests.reserve,
    Publish: Requests.publish,
    Abandon: Requests.abandon,
    Wait: Requests.wait,
    EndTicket: Requests.end_ticket,
    Pin: Requests.pin,
    Prefetch: Requests.prefetch,
    Evict: Requests.evict,
    Flush: Requests.flush,
    SaveState: Requests.save,
    LoadState: Requests.load,
    Status: Requests.status,
    Stop: Requests.stop,
    Compact: Requests.compact,
}


def _checked_description(message: Hello) -> NamespaceDescription:
    """Return what a client says of its namespace. Raises DaemonError if it claims what does not follow from that."""
    try:
        described = parse_description(message.description)
        if described.lossy_codec and not codec_by_name(described.lossy_codec).is_lossy:
            raise ConfigError(f"the codec {described.lossy_codec} is not lossy")
    except ConfigError as exc:
        raise ProtocolError(f"the namespace's description cannot be taken: {exc}") from exc
    if described.digest != message.namespace:
        raise ProtocolError(
            f"the namespace {message.namespace[:HASH_BYTES].hex()} is claimed, {described.digest.hex()} is described",
            hint="use the same version of tierkv on both sides",
        )
    block_bytes = described.layout.block_bytes
    if block_bytes != message.block_bytes:
        raise DaemonError(
            f"the client's blocks have {message.block_bytes} bytes, those of its namespace {block_bytes}",
            hint="the namespace must be that of the client's block size",
        )
    return described


def _checked_path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or len(os.fsencode(text)) > MAX_PATH_BYTES or "\0" in text:
        raise ProtocolError("a path must be absolute, and a path")
    return path
