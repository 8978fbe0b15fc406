"""The server: an asyncio loop that serves the clients, and the start and the end of its parts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.connection import Answer, ClientConnection
from tierkv.daemon.core import Core
from tierkv.daemon.end_report import EndReport
from tierkv.daemon.ending import Ending
from tierkv.daemon.eviction_log import LOG_NAME, EvictionLog
from tierkv.daemon.evictor import Evictor
from tierkv.daemon.host import (
    STORE_LOCK,
    check_memory,
    connections_that_fit,
    exclusive_file,
    listening_socket,
    memory_of_process,
)
from tierkv.daemon.loader import Loader, Prefetcher
from tierkv.daemon.log_lines import LogLines
from tierkv.daemon.members import read_only_descriptor
from tierkv.daemon.messages import LimitStatus, Message, StatusReport
from tierkv.daemon.metrics import serve_metrics
from tierkv.daemon.operation import NO_MANAGER, Operation
from tierkv.daemon.peers import Peers
from tierkv.daemon.reading import Reading, open_reading
from tierkv.daemon.remote_blocks import RemoteBlocks
from tierkv.daemon.requests import Requests
from tierkv.daemon.service_manager import ServiceManager
from tierkv.daemon.state_files import StateFiles
from tierkv.daemon.status import limit_status, share_statuses, tenant_statuses, usage_of
from tierkv.daemon.store_writer import QUEUE_BLOCKS, StoreWriter
from tierkv.daemon.values import Connection
from tierkv.errors import CapacityError, DaemonError, StoreError
from tierkv.metrics.exposition import load_prometheus
from tierkv.policies import make_policy
from tierkv.remote_tiers.remotes import Remotes
from tierkv.remote_tiers.urls import remote_urls
from tierkv.storage.cold import ColdStore
from tierkv.storage.warm import Slab
from tierkv.values.log_event import LogEvent
from tierkv.values.users import group_name

__all__ = ["serve"]

_log = logging.getLogger(__name__)

_TICK_S = 0.5
_IDLE_S = 2.0  # at the end, for reads in work
_WRITE_WAIT_S = 5.0  # for other processes that write to the store; then blocks are skipped


def serve(
    config: DaemonConfig,
    *,
    started: Callable[[], None] = lambda: None,
    reload: Callable[[], None] | None = None,
    manager: ServiceManager = NO_MANAGER,
    version: str = "",
) -> None:
    """Run a daemon until a message, SIGTERM or SIGINT stops it. started: called when clients may connect.

    reload: called at SIGHUP; without it, that signal ends the process. manager: gets the states of the daemon.
    version: for the metrics. Raises DaemonError if socket or store belong to another daemon, CapacityError if the slab
    does not fit, ConfigError for a metrics port without prometheus-client.
    """
    check_memory(config.warm_bytes)
    if config.metrics_port is not None:
        load_prometheus()
    with contextlib.ExitStack() as stack:
        listener, lock = stack.enter_context(listening_socket(config.socket, group=config.group))
        end = EndReport(config.socket, lock)
        ending = stack.enter_context(Ending(config.stop_s, report_loss=end.report_loss))
        store = None
        if config.store is not None:
            owner = stack.enter_context(exclusive_file(config.store / STORE_LOCK, f"the store {config.store}"))
            owner.note(os.fspath(config.socket))  # other processes that want the store find its daemon here
            store = ColdStore(
                config.store,
                quota_bytes=config.cold_bytes,
                min_free_bytes=config.min_free_bytes,
                write_wait_s=_WRITE_WAIT_S,
            )
            stack.callback(store.close)
        remotes = None
        if urls := remote_urls(config.remote):
            remotes = stack.enter_context(Remotes(urls, store=store))
        slab = Slab(config.warm_bytes, num_threads=config.num_io_threads)
        threads = stack.enter_context(ThreadPoolExecutor(config.num_io_threads, thread_name_prefix="tierkv-io"))
        reading = Reading(threads, None)
        if store is not None:
            reading = stack.enter_context(open_reading(slab, threads, config))
        operation = Operation(reload, manager, version)
        server = _Server(config, listener, store, slab, threads, reading, ending, operation, remotes)
        end.core = server.core
        is_quiet = asyncio.run(server.run(started))
        if reading.readers:
            reading.readers.close()
        if is_quiet:
            slab.close()  # else a thread may still write into it: it is unmapped with the process
        end.note_written()
        _log.info(LogEvent("stopped", not_written=server.core.num_writes))


def _set_soon(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop, from another thread. A loop that has ended is no error."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


class _Server:
    """One running daemon. Satisfies `Host`."""

    def __init__(
        self,
        config: DaemonConfig,
        listener: socket.socket,
        store: ColdStore | None,
        slab: Slab,
        threads: ThreadPoolExecutor,
        reading: Reading,
        ending: Ending,
        operation: Operation,
        remotes: Remotes | None,
    ) -> None:
        self._ending = ending
        self._operation = operation
        self.log_lines = LogLines(refusals_per_minute=config.limits.log_lines_per_minute, clock=time.monotonic)
        self.config = config
        self.limits = config.limits
        self.hello_s = config.hello_s
        self.group = config.group
        self.boot = secrets.randbits(63) | 1
        self.core = Core(
            slab.size_bytes,
            clock=time.monotonic,
            store=store,
            make_policy=partial(make_policy, config.eviction_policy),
            pin_share=config.pin_share,
            limits=config.limits,
        )
        self.core.tenants.remotes = remotes
        self._remote = RemoteBlocks(self.core, remotes) if remotes else None
        self.clients: set[ClientConnection] = set()
        self.bytes_received = 0
        self.bytes_sent = 0
        self.incomplete_bytes = 0
        self.num_requests = 0
        self._most_connections = min(config.limits.connections, connections_that_fit())
        self._peers: Peers[ClientConnection] = Peers(
            ended=ClientConnection.close, most=config.limits.connections_of_process
        )
        self._listener = listener
        self._store = store
        self._slab = slab
        self._threads = threads
        self._reading = reading
        self._started_at = time.monotonic()
        self._files = StateFiles()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._counting: asyncio.Task[Any] | None = None  # asks the store, which may hang, what it has evicted

    async def run(self, started: Callable[[], None]) -> bool:
        """Serve until stopped. Return whether no thread may still write into the slab."""
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        self._ending.handle_signals(partial(_set_soon, loop, stopping), reload=self._operation.reload_at_signal)
        loader = Loader(
            self.core,
            self._slab,
            self._reading.threads,
            loaded=self.notify_waiters,
            remote=self._remote,
            readers=self._reading.readers,
        )
        self._prefetcher = prefetcher = Prefetcher(self.core, loader, self._remote)
        writer = StoreWriter(self.core, self._store, self._slab, self._threads)
        self._requests = Requests(
            self.core,
            config=self.config,
            store=self._store,
            slab=self._slab,
            loader=loader,
            writer=writer,
            prefetcher=prefetcher,
            files=self._files,
            evictor=self._make_evictor(writer),
            members_descriptor=self._descriptor_of_members(),
            remote=self._remote,
            report=self._report,
            stop=self._ending.begin,
        )
        server = await loop.create_unix_server(lambda: ClientConnection(self), sock=self._listener)
        metrics = await self._serve_metrics()
        self._read_tenants()
        background = [self.spawn(prefetcher.run()), self.spawn(self._tick_forever(writer))]
        started()
        if self.group is not None:
            _log.info("members of group %s may read", group_name(self.group))
        port = metrics.sockets[0].getsockname()[1] if metrics else None
        self._operation.note_start(self.config, metrics_port=port)
        try:
            await stopping.wait()
        finally:
            self._operation.note_stop(self._ending.reason, uptime_s=time.monotonic() - self._started_at)
            server.close()
            if metrics:
                metrics.close()
            for task in background:
                task.cancel()
            self._peers.close()
            for client in list(self.clients):
                client.close()
            await loop.run_in_executor(None, writer.close)
            self._requests.close()
            if self._remote:
                self._remote.close()
            is_quiet = await loader.wait_until_idle(_IDLE_S)
            if not is_quiet:
                _log.warning("%d reads hang and are abandoned", loader.num_running)
        return is_quiet

    def _descriptor_of_members(self) -> int | None:
        """Return a descriptor of the slab for members of the group; None where there is no group."""
        if self.group is None or self._slab.fd is None:
            return None
        try:
            return read_only_descriptor(self._slab.fd)
        except OSError as exc:
            raise DaemonError(f"the warm tier cannot be shared with a group: {exc.strerror}") from exc

    def _make_evictor(self, writer: StoreWriter) -> Evictor:
        path = self.config.socket.with_name(self.config.socket.name + ".evictions")
        if self.config.store is not None:
            path = self.config.store / LOG_NAME
        log = EvictionLog(path)
        log.save()  # the next daemon continues this log, also if nothing is evicted
        return Evictor(
            self.core,
            self._store,
            writer,
            log,
            engines=lambda: list(self.clients),
            stall_s=self.config.stall_s,
        )

    def answer(self, client: ClientConnection, message: Message) -> Answer | Coroutine[Any, Any, Answer]:
        """Return the answer to a message, or a coroutine that returns it."""
        try:
            return self._requests.answer(client, message)
        finally:
            self.notify_waiters()

    def accept(self, client: ClientConnection, pid: int) -> None:
        """Accept a connection. If there are too many, an idle one without a namespace is closed. Raises TierKVError."""
        if len(self.clients) >= self._most_connections:
            idle = min((each for each in self.clients if each.is_idle), key=lambda each: each.heard_at, default=None)
            if idle is None:
                raise CapacityError(f"the daemon has {len(self.clients)} connections already")
            idle.close()
            self.clients.discard(idle)
        self._peers.add(client, pid)
        self.clients.add(client)

    def leave(self, client: ClientConnection) -> None:
        """Forget a connection that has ended."""
        self.clients.discard(client)
        self._peers.remove(client)
        self.notify_waiters()

    def notify_waiters(self) -> None:
        """Answer the requests that wait for blocks which were published, or which no client computes any more."""
        if self.core.claims.news:
            self._requests.notify(self.core.claims.news)
            self.core.claims.news.clear()

    def unload_files(self, connection: Connection) -> None:
        """Close the state files that this client alone had loaded."""
        self._files.unload(connection)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine as a task, and keep a reference to it."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _tick_forever(self, writer: StoreWriter) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            try:
                self._tick(writer)
            except Exception:  # noqa: BLE001 - the outermost loop of its task: the next tick comes
                _log.exception("the daemon's maintenance failed")

    def _read_tenants(self) -> None:
        """Read the shares and limits of tenants from the store: another process may have changed them."""
        if self._store is not None:
            try:
                self.core.tenants.shares.settings = self._store.tenants()
            except StoreError as exc:
                _log.debug("the shares of tenants stay as they are: %s", exc)

    def _tick(self, writer: StoreWriter) -> None:
        self._operation.manager.alive()
        self._read_tenants()
        self.core.trim()
        if self.log_lines.are_evictions_due and (self._counting is None or self._counting.done()):
            self._counting = self.spawn(self._log_evictions())
        self.notify_waiters()
        writer.maintain()
        for client in list(self.clients):
            client.check_alive()
            if self.core.flag_leases.is_exceeded(client.connection):
                client.refuse_and_close("it sets more lease flags than it may", reason="capacity")
        unsent = sum(client.num_unsent_bytes for client in self.clients)
        for client in sorted(self.clients, key=lambda each: -each.num_unsent_bytes):
            if unsent <= self.limits.unsent_bytes:
                break
            if client.is_unread_for(0) and client.may_be_ended():
                unsent -= client.num_unsent_bytes
                client.close()

    async def _log_evictions(self) -> None:
        totals = {"warm": self.core.slab.evictions}
        if self._store is not None:
            with contextlib.suppress(StoreError):
                stats = await asyncio.get_running_loop().run_in_executor(None, self._store.stats)
                totals["cold"] = stats.evicted_blocks
        self.log_lines.evicted(totals)

    async def _serve_metrics(self) -> asyncio.Server | None:
        port = self.config.metrics_port
        return None if port is None else await serve_metrics(port, self._report, timeout_s=self.config.hello_s)

    def _report(self) -> StatusReport:
        core = self.core
        cold = None
        tenant_bytes: dict[str | None, int] = {}
        if self._store is not None:
            with contextlib.suppress(StoreError):  # a damaged store must not hide the rest
                cold = self._store.stats()
                tenant_bytes = self._store.tenant_bytes()
        return StatusReport(
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._started_at,
            socket=str(self.config.socket),
            store=str(self.config.store or ""),
            warm_bytes=core.slab.size_bytes,
            warm_free_bytes=core.slab.free_bytes,
            rss_bytes=memory_of_process(),
            clients=len(self.clients),
            leased_slots=core.leases.count + sum(map(core.flag_leases.count, core.connections)),
            reserved_slots=len(core.reservations),
            claims=core.claims.num_blocks,
            pending_writes=core.num_writes,
            bytes_received=self.bytes_received,
            bytes_sent=self.bytes_sent,
            counters={
                **core.counters,
                "evicted_blocks": core.slab.evictions,
                **(self._remote.counters() if self._remote else {}),
                **self._reading.counters(),
            },
            tenants=tenant_statuses(core),
            cold={
                "blocks": cold.blocks,
                "live_bytes": cold.live_bytes,
                "quota_bytes": cold.quota_bytes,
                "evicted_blocks": cold.evicted_blocks,
            }
            if cold
            else {},
            limits=self._usage(),
            reasons={name: dict(counts) for name, counts in core.counters.reasons.items()},
            version=self._operation.version,
            shares=share_statuses(core, tenant_bytes),
        )

    def _usage(self) -> list[LimitStatus]:
        limits, clients = self.limits, self.clients
        return [
            limit_status("connections", self._most_connections, self._peers.counts(), limits.connections_of_process),
            limit_status(
                "requests",
                limits.requests,
                (each.num_requests for each in clients),
                limits.requests_of_client,
                used=self.num_requests,
            ),
            limit_status("waiting_requests", limits.requests, [self._requests.num_waiting]),
            limit_status("incomplete_bytes", limits.incomplete_bytes, [self.incomplete_bytes]),
            limit_status("unsent_bytes", limits.unsent_bytes, (each.num_unsent_bytes for each in clients)),
            limit_status("pending_writes", QUEUE_BLOCKS, [self.core.num_writes]),
            *self._prefetcher.usage(),
            *usage_of(self.core),
        ]
