"""The daemon's body: one asyncio loop in front of the core, threads for bytes, a write-behind for the store.

Short requests are answered inside `data_received`. What takes time (decoding, waiting, flushing) runs beside and is
answered when it is done, by its number.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tierkv.block import BlockHash
from tierkv.daemon.connection import Answer, ClientConnection
from tierkv.daemon.core import Core, FetchTask, Load, Tenant, Write
from tierkv.daemon.host import check_memory, exclusive_file, listening_socket, memory_of_process
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
    TenantStatus,
    Wait,
    Waited,
    Welcome,
)
from tierkv.daemon.protocol import MAX_PATH_BYTES, ProtocolError, split_hashes, split_numbers
from tierkv.errors import ConfigError, DaemonError, NamespaceMismatchError, StoreError
from tierkv.layout import BlockLayout
from tierkv.policies import make_policy
from tierkv.storage.codecs import codec_by_name, default_codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import EncodedRecord, encode_record, read_header
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.storage.warm import Slab
from tierkv.write_behind import WriteBehind

__all__ = ["DaemonConfig", "serve"]

_log = logging.getLogger(__name__)

_TICK_S = 0.5
_MAX_PREFETCHES = 1024
_MAX_WAIT_S = 60.0
_WRITE_QUEUE_BLOCKS = 4096
_WRITE_BATCH_BLOCKS = 8
_AHEAD_BLOCKS = 4
_HASH_BYTES = 16

_GAUGES = (
    "uptime_s",
    "warm_bytes",
    "warm_free_bytes",
    "rss_bytes",
    "clients",
    "leased_slots",
    "reserved_slots",
    "tickets",
    "pending_writes",
    "bytes_received",
    "bytes_sent",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """What a daemon is started with.

    store: None keeps nothing on disk. pin_share: of the slab, that one tenant may pin. metrics_port: of the loopback
    interface, for Prometheus. hello_s: so long may a client take to say hello.
    """

    socket: Path
    store: Path | None
    warm_bytes: int
    cold_bytes: int
    min_free_bytes: int = 1 << 30
    num_io_threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    pin_share: float = 0.25
    eviction_policy: str = "hit-density"
    metrics_port: int | None = None
    hello_s: float = 5.0

    def __post_init__(self) -> None:
        if min(self.warm_bytes, self.cold_bytes, self.num_io_threads) <= 0:
            raise ConfigError("warm_bytes, cold_bytes and num_io_threads must be positive")
        make_policy(self.eviction_policy)  # refuses a name that there is not
        if not 0 < self.pin_share <= 1:
            raise ConfigError(f"pin_share must lie between 0 and 1, got {self.pin_share}")


def serve(config: DaemonConfig, *, started: Callable[[], None] = lambda: None) -> None:
    """Run a daemon until it is stopped by a message, SIGTERM or SIGINT. started: called when clients may come.

    Raises DaemonError if socket or store belong to another daemon, CapacityError if the slab does not fit.
    """
    check_memory(config.warm_bytes)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(listening_socket(config.socket))
        store = None
        if config.store is not None:
            stack.enter_context(exclusive_file(config.store / "daemon.lock", f"the store {config.store}"))
            store = ColdStore(config.store, quota_bytes=config.cold_bytes, min_free_bytes=config.min_free_bytes)
            stack.callback(store.close)
        slab = Slab(config.warm_bytes, num_threads=config.num_io_threads)
        stack.callback(slab.close)
        threads = stack.enter_context(ThreadPoolExecutor(config.num_io_threads, thread_name_prefix="tierkv-io"))
        asyncio.run(_Server(config, listener, store, slab, threads).run(started))


class _Server:
    """One running daemon."""

    def __init__(
        self,
        config: DaemonConfig,
        listener: socket.socket,
        store: ColdStore | None,
        slab: Slab,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.config = config
        self.hello_s = config.hello_s
        self.boot = secrets.randbits(63) | 1
        self.core = Core(
            slab.size_bytes,
            clock=time.monotonic,
            store=store,
            make_policy=partial(make_policy, config.eviction_policy),
            pin_share=config.pin_share,
        )
        self.clients: set[ClientConnection] = set()
        self.bytes_received = 0
        self.bytes_sent = 0
        self._listener = listener
        self._store = store
        self._slab = slab
        self._threads = threads
        self._started_at = time.monotonic()
        self._reads: dict[Load, asyncio.Future[None]] = {}
        self._waiters: dict[BlockHash, set[asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._states: list[StateFile] = []

    async def run(self, started: Callable[[], None]) -> None:
        """Serve until stopped."""
        self.loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._prefetches: asyncio.Queue[tuple[Tenant, list[bytes], bytes]] = asyncio.Queue(_MAX_PREFETCHES)
        self._writes = WriteBehind(
            self._write, capacity=_WRITE_QUEUE_BLOCKS, batch_size=_WRITE_BATCH_BLOCKS, name="tierkv-daemon-write"
        )
        for number in (signal.SIGTERM, signal.SIGINT):
            self.loop.add_signal_handler(number, self._stopping.set)
        server = await self.loop.create_unix_server(lambda: ClientConnection(self), sock=self._listener)
        metrics = await self._serve_metrics()
        background = [self.spawn(self._prefetch_forever()), self.spawn(self._tick_forever())]
        started()
        _log.info("serving on %s, slab of %d bytes", self.config.socket, self._slab.size_bytes)
        try:
            await self._stopping.wait()
        finally:
            server.close()
            if metrics:
                metrics.close()
            for task in background:
                task.cancel()
            for client in list(self.clients):
                client.close()
            await self.loop.run_in_executor(None, self._writes.close)
            for state in self._states:
                state.close()

    # -- requests --------------------------------------------------------------------------------------

    def answer(self, client: ClientConnection, message: Message) -> Answer | Coroutine[Any, Any, Answer]:
        """Return the answer to a message, or what will come up with it."""
        handler = _HANDLERS.get(type(message))
        if handler is None:
            raise ProtocolError(f"{type(message).__name__} is no request")
        if client.connection.tenant is None and not isinstance(message, Status | Stop | Compact | Flush | Hello):
            raise ProtocolError("the first message must be Hello, with a namespace")
        result = handler(self, client, message)
        if self.core.news:
            self.tell_news()
        return result

    def tell_news(self) -> None:
        """Wake who waits for a block that was published, or that nobody computes any more."""
        for block_hash in self.core.news:
            for waiter in self._waiters.pop(block_hash, ()):
                if not waiter.done():
                    waiter.set_result(None)
        self.core.news.clear()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something beside, and keep it alive."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def hello(self, client: ClientConnection, message: Hello) -> Answer:
        """Let a client in, and hand it the slab if it names a namespace."""
        if client.is_greeted:
            raise ProtocolError("this connection said hello already")
        client.is_greeted = True
        client.connection.client = message.client[:64]
        welcome = Welcome(
            pid=os.getpid(),
            slab_bytes=self._slab.size_bytes,
            store=str(self.config.store or ""),
            has_cold=self._store is not None,
        )
        if not message.namespace:
            return welcome
        description, layout = _parse_description(message)
        self.core.open_tenant(
            client.connection,
            message.namespace,
            message.description,
            layout=layout,
            name=str(description.get("name", ""))[:128],
            owner=str(description.get("salt", "")),
            codec=str(description.get("lossy_codec", "")),
        )
        if self._store is not None:
            register = self._store.register_namespace
            await self.loop.run_in_executor(self._threads, register, message.namespace, message.description)
        client.hand_over(self._slab.fd)
        return welcome

    def match(self, client: ClientConnection, message: Match) -> Answer:
        """Answer at once; the store hears of the use afterwards."""
        found = self.core.match(client.connection, message)
        if self._store is not None and message.lease and found.slots:
            count = message.start + len(found.slots) // 4
            hashes = message.hashes[: count * _HASH_BYTES]
            self.loop.call_soon(self._touch, hashes)
        return found

    async def fetch(self, client: ClientConnection, message: Fetch) -> Answer:
        """Bring blocks into the warm tier; answer when they are there."""
        task = self.core.begin_fetch(client.connection, message)
        await self._load(task)
        return self.core.end_fetch(client.connection, task)

    def release(self, client: ClientConnection, message: Release) -> Answer:
        """End leases."""
        self.core.release(client.connection, message)
        return None

    def reserve(self, client: ClientConnection, message: Reserve) -> Answer:
        """Give slots to write into."""
        return self.core.reserve(client.connection, message)

    def publish(self, client: ClientConnection, message: Publish) -> Answer:
        """Make blocks findable and queue them for the store."""
        answer, writes = self.core.publish(client.connection, message.slots)
        for write in writes:
            if not self._writes.offer(write):
                self.core.finish_write(write, is_stored=False)
        return answer

    def abandon(self, client: ClientConnection, message: Abandon) -> Answer:
        """Take reserved slots back."""
        self.core.abandon(client.connection, split_numbers(message.slots))
        return None

    async def wait(self, client: ClientConnection, message: Wait) -> Answer:
        """Answer when there is news of a block, or the time is over."""
        if not self.core.is_computed(client.connection, message.block_hash):
            return Waited(is_over=False)
        waiter = self.loop.create_future()
        waiters = self._waiters.setdefault(message.block_hash, set())
        waiters.add(waiter)
        try:
            await asyncio.wait_for(waiter, min(max(message.timeout_ms, 0) / 1e3, _MAX_WAIT_S))
            return Waited(is_over=False)
        except asyncio.TimeoutError:
            return Waited(is_over=True)
        finally:
            waiters.discard(waiter)
            if not waiters and self._waiters.get(message.block_hash) is waiters:
                del self._waiters[message.block_hash]

    def end_ticket(self, client: ClientConnection, message: EndTicket) -> Answer:
        """Nobody computes these any more."""
        self.core.end_ticket(client.connection, message.ticket)
        return None

    async def pin(self, client: ClientConnection, message: Pin) -> Answer:
        """Pin in the warm tier and in the store."""
        hashes = self.core.pin(client.connection, message)
        if self._store is not None and hashes:
            await self.loop.run_in_executor(self._threads, self._store.set_pinned, hashes, message.pinned)
        return Count(count=len(hashes))

    def prefetch(self, client: ClientConnection, message: Prefetch) -> Answer:
        """Queue a prompt; a full queue forgets it."""
        tenant = client.connection.require_tenant()
        hashes = split_hashes(message.hashes)
        if len(message.tokens) // tenant.step != len(hashes):
            raise ProtocolError(f"{len(hashes)} block hashes for {len(message.tokens)} bytes of token ids")
        try:
            self._prefetches.put_nowait((tenant, hashes, message.tokens))
        except asyncio.QueueFull:
            return Count(count=0)
        return Count(count=len(hashes))

    def evict(self, client: ClientConnection, message: Evict) -> Answer:
        """Evict the client's own blocks."""
        return Count(count=self.core.evict(client.connection, message.count))

    async def flush(self, client: ClientConnection, message: Flush) -> Answer:
        """Wait until what is published so far is on the disk."""
        await self.loop.run_in_executor(None, self._writes.flush)
        if self._store is not None:
            await self.loop.run_in_executor(None, self._store.flush)
        return Done()

    async def save(self, client: ClientConnection, message: SaveState) -> Answer:
        """Write a state file of the client's namespace."""
        tenant = client.connection.require_tenant()
        path = _checked_path(message.path)
        await self.flush(client, Flush())
        entries = self.core.warm_entries(tenant)
        slots = [entry.warm_slot for entry in entries if entry.warm_slot is not None]
        blocks = [Write(tenant, entry, slot) for entry, slot in zip(entries, slots, strict=True)]
        try:
            saved = await self.loop.run_in_executor(
                None,
                lambda: write_state_file(
                    path,
                    namespace=tenant.digest,
                    description=tenant.description,
                    records=self._iter_records(tenant, blocks),
                ),
            )
        finally:
            self.core.unpin_entries(tenant, slots)
        return Saved(blocks=saved.blocks, file_bytes=saved.file_bytes)

    async def load(self, client: ClientConnection, message: LoadState) -> Answer:
        """Take a state file as one more source."""
        tenant = client.connection.require_tenant()
        path = _checked_path(message.path)
        state = await self.loop.run_in_executor(None, StateFile, path)
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
        await self.loop.run_in_executor(None, self._store.compact)
        return Done()

    def stop(self, client: ClientConnection, message: Stop) -> Answer:
        """End soon."""
        self.loop.call_soon(self._stopping.set)
        return Done()

    def status(self, client: ClientConnection, message: Status) -> Answer:
        """Return everything there is to say."""
        core = self.core
        cold = self._store.stats() if self._store is not None else None
        tenants = [
            TenantStatus(
                namespace=tenant.digest.hex(),
                name=tenant.name,
                block_bytes=tenant.layout.block_bytes,
                warm_blocks=tenant.warm_blocks,
                pinned_bytes=tenant.pinned_bytes,
                clients=tenant.clients,
            )
            for tenant in core.tenants.values()
        ]
        evictions = sum(size_class.evictions for size_class in core.slab.classes.values())
        return StatusReport(
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started_at,
            socket=str(self.config.socket),
            store=str(self.config.store or ""),
            warm_bytes=self._slab.size_bytes,
            warm_free_bytes=core.slab.free_bytes,
            rss_bytes=memory_of_process(),
            clients=len(self.clients),
            leased_slots=core.num_leases,
            reserved_slots=core.num_reservations,
            tickets=core.num_tickets,
            pending_writes=core.num_writes,
            bytes_received=self.bytes_received,
            bytes_sent=self.bytes_sent,
            counters={**core.counters, "evicted_blocks": evictions},
            tenants=tenants,
            cold={"blocks": cold.blocks, "live_bytes": cold.live_bytes, "quota_bytes": cold.quota_bytes}
            if cold
            else {},
        )

    # -- bytes -----------------------------------------------------------------------------------------

    async def _load(self, task: FetchTask) -> None:
        """Read what a task started, and wait for that and for what others are reading already."""
        for at, load in enumerate(task.fresh):
            ahead = task.fresh[at + _AHEAD_BLOCKS : at + _AHEAD_BLOCKS + 1]
            reading = self.loop.run_in_executor(self._threads, self._read, load, ahead)
            done = self.loop.create_future()
            self._reads[load] = done
            reading.add_done_callback(partial(self._loaded, load, done))
        for load in task.loads.values():
            if not load.is_done:
                await asyncio.shield(self._reads[load])

    def _loaded(self, load: Load, done: asyncio.Future[None], result: asyncio.Future[MissReason | None]) -> None:
        failure = result.exception()
        if failure is not None:
            _log.error("reading block %s failed", load.entry.block_hash.hex(), exc_info=failure)
        self.core.finish_load(load, MissReason.IO_ERROR if failure else result.result())
        del self._reads[load]
        done.set_result(None)
        self.tell_news()

    def _read(self, load: Load, ahead: list[Load]) -> MissReason | None:
        source, layout = load.source, load.tenant.layout
        assert isinstance(source, ColdStore | StateFile)
        for later in ahead:
            source.read_ahead([later.entry.block_hash])
        try:
            reason = source.read_into(load.info, self._slab.slots(layout.block_bytes)[load.slot], layout=layout)
            if reason in (MissReason.CORRUPT, MissReason.TRUNCATED) and isinstance(source, StateFile):
                source.delete(load.entry.block_hash)
            return reason
        except StoreError:
            return MissReason.IO_ERROR

    def _write(self, writes: list[Write]) -> None:
        """Encode and store published blocks; runs on the write thread."""
        store = self._store
        assert store is not None
        stored = dict.fromkeys(writes, False)
        try:
            missing = [write for write in writes if not store.contains(write.entry.block_hash)]
            stored.update((write, True) for write in writes if write not in missing)
            outcomes = store.put(list(self._threads.map(self._encode, missing)))
            for write, outcome in zip(missing, outcomes, strict=True):
                stored[write] = outcome in (PutOutcome.STORED, PutOutcome.EXISTS)
        except StoreError as exc:
            _log.warning("%d blocks were not stored: %s", len(writes), exc)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has everything that pins count for
                self.loop.call_soon_threadsafe(self._wrote, stored)

    def _wrote(self, stored: dict[Write, bool]) -> None:
        for write, is_stored in stored.items():
            self.core.finish_write(write, is_stored=is_stored)

    def _encode(self, write: Write) -> EncodedRecord:
        layout = write.tenant.layout
        block = self._slab.slots(layout.block_bytes)[write.slot]
        name = write.tenant.codec
        codec = codec_by_name(name) if name else default_codec(layout.dtype)
        return encode_record(write.info, block, layout=layout, codec=codec)

    def _iter_records(self, tenant: Tenant, blocks: list[Write]) -> Iterator[bytes]:
        """Yield the record of every block of a namespace, each once: stored ones, warm ones, those of state files."""
        seen: set[bytes] = set()
        if self._store is not None:
            for block_hash, _ in list(self._store.iter_entries(tenant.digest)):
                record = self._store.read_record(block_hash)
                if record is not None:
                    seen.add(block_hash)
                    yield record
        for block in blocks:
            if block.entry.block_hash not in seen:
                seen.add(block.entry.block_hash)
                yield self._encode(block).data.tobytes()
        for source in tenant.sources:
            if isinstance(source, StateFile):
                yield from (each for each in source.iter_records() if read_header(each).info.block_hash not in seen)

    def _touch(self, hashes: bytes) -> None:
        if self._store is not None:
            self._store.touch(split_hashes(hashes))

    # -- background ------------------------------------------------------------------------------------

    async def _prefetch_forever(self) -> None:
        while True:
            tenant, hashes, tokens = await self._prefetches.get()
            for task in self.core.begin_prefetches(tenant, hashes, tokens):
                await self._load(task)
                self.core.end_fetch(None, task)
                self.core.counters["prefetched_blocks"] += sum(load.reason is None for load in task.fresh)
                if task.miss:
                    break

    async def _tick_forever(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.core.trim()
            for client in list(self.clients):
                client.check_alive()

    async def _serve_metrics(self) -> asyncio.Server | None:
        if self.config.metrics_port is None:
            return None

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(
                asyncio.TimeoutError, asyncio.LimitOverrunError, asyncio.IncompleteReadError, OSError
            ):
                await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), self.config.hello_s)
                body = self._metrics().encode()
                head = (
                    f"HTTP/1.0 200 OK\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {len(body)}\r\n\r\n"
                )
                writer.write(head.encode() + body)
                await writer.drain()
            writer.close()

        try:
            return await asyncio.start_server(answer, "127.0.0.1", self.config.metrics_port)
        except OSError as exc:
            raise DaemonError(f"metrics cannot be served on port {self.config.metrics_port}: {exc.strerror}") from exc

    def _metrics(self) -> str:
        """Return the figures of `status` in Prometheus' text format."""
        report = self.status(_NOBODY, Status())
        assert isinstance(report, StatusReport)
        gauges = {name: getattr(report, name) for name in _GAUGES} | {
            f"cold_{key}": n for key, n in report.cold.items()
        }
        lines = [f"# TYPE tierkv_{name} gauge\ntierkv_{name} {value}" for name, value in gauges.items()]
        lines += [f"# TYPE tierkv_{key}_total counter\ntierkv_{key}_total {n}" for key, n in report.counters.items()]
        return "\n".join(lines) + "\n"


class _Nobody:
    """Who asks for the metrics."""


_NOBODY: Any = _Nobody()

_HANDLERS: dict[type[Message], Callable[[_Server, ClientConnection, Any], Answer | Coroutine[Any, Any, Answer]]] = {
    Hello: _Server.hello,
    Match: _Server.match,
    Fetch: _Server.fetch,
    Release: _Server.release,
    Reserve: _Server.reserve,
    Publish: _Server.publish,
    Abandon: _Server.abandon,
    Wait: _Server.wait,
    EndTicket: _Server.end_ticket,
    Pin: _Server.pin,
    Prefetch: _Server.prefetch,
    Evict: _Server.evict,
    Flush: _Server.flush,
    SaveState: _Server.save,
    LoadState: _Server.load,
    Status: _Server.status,
    Stop: _Server.stop,
    Compact: _Server.compact,
}


def _parse_description(message: Hello) -> tuple[dict[str, Any], BlockLayout]:
    """Return what a client says of its namespace. Raises DaemonError if it does not agree with itself."""
    try:
        description = json.loads(message.description)
        layout = BlockLayout.from_dict(description)
        if description.get("lossy_codec"):
            codec_by_name(description["lossy_codec"])
    except (ValueError, TypeError, ConfigError) as exc:
        raise ProtocolError(f"the namespace's description cannot be read: {exc}") from exc
    if len(message.namespace) != _HASH_BYTES:
        raise ProtocolError(f"a namespace has {_HASH_BYTES} bytes, not {len(message.namespace)}")
    if layout.block_bytes != message.block_bytes:
        raise DaemonError(
            f"the client's blocks have {message.block_bytes} bytes, those of its namespace {layout.block_bytes}",
            hint="the namespace must be that of the client's block size",
        )
    return description, layout


def _checked_path(text: str) -> Path:
    path = Path(text)
    if not path.is_absolute() or len(os.fsencode(text)) > MAX_PATH_BYTES or "\0" in text:
        raise ProtocolError("a path must be absolute, and a path")
    return path
