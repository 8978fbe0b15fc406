"""Server: one asyncio loop in front of the core, and the parts that work beside it, from start to stop."""

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
from pathlib import Path
from typing import Any

from tierkv.daemon.config import DaemonConfig
from tierkv.daemon.connection import Answer, ClientConnection
from tierkv.daemon.core import Connection, Core
from tierkv.daemon.ending import Ending
from tierkv.daemon.eviction_log import LOG_NAME, EvictionLog
from tierkv.daemon.evictor import Evictor
from tierkv.daemon.host import LockFile, check_memory, exclusive_file, listening_socket, memory_of_process
from tierkv.daemon.loader import Loader
from tierkv.daemon.messages import Message, StatusReport, TenantStatus
from tierkv.daemon.metrics import serve_metrics
from tierkv.daemon.prefetcher import Prefetcher
from tierkv.daemon.requests import Requests
from tierkv.daemon.state_loads import StateLoads
from tierkv.daemon.store_writer import StoreWriter
from tierkv.daemon.waiters import Waiters
from tierkv.policies import make_policy
from tierkv.storage.cold import ColdStore
from tierkv.storage.warm import Slab

__all__ = ["NOT_WRITTEN", "STORE_LOCK", "DaemonConfig", "serve"]

STORE_LOCK = "daemon.lock"
"""In a store's directory: held by the daemon that has the store; names its process and its socket."""

NOT_WRITTEN = "not written:"
"""Before a number of blocks, in the lock file of a daemon that has ended."""

_log = logging.getLogger(__name__)

_TICK_S = 0.5
_IDLE_S = 2.0  # at the end, for reads in work
_WRITE_WAIT_S = 5.0  # for other processes that write to the store; then blocks are skipped


def serve(config: DaemonConfig, *, started: Callable[[], None] = lambda: None) -> None:
    """Run a daemon until it is stopped by a message, SIGTERM or SIGINT. started: called when clients may come.

    Raises DaemonError if socket or store belong to another daemon, CapacityError if the slab does not fit.
    """
    check_memory(config.warm_bytes)
    with contextlib.ExitStack() as stack:
        listener, lock = stack.enter_context(listening_socket(config.socket))
        end = _End(config.socket, lock)
        ending = stack.enter_context(Ending(config.stop_s, last_words=end.say))
        store = None
        if config.store is not None:
            owner = stack.enter_context(exclusive_file(config.store / STORE_LOCK, f"the store {config.store}"))
            owner.note(os.fspath(config.socket))  # who wants the store knows whom to ask
            store = ColdStore(
                config.store,
                quota_bytes=config.cold_bytes,
                min_free_bytes=config.min_free_bytes,
                write_wait_s=_WRITE_WAIT_S,
            )
            stack.callback(store.close)
        slab = Slab(config.warm_bytes, num_threads=config.num_io_threads)
        threads = stack.enter_context(ThreadPoolExecutor(config.num_io_threads, thread_name_prefix="tierkv-io"))
        server = _Server(config, listener, store, slab, threads, ending)
        end.core = server.core
        if asyncio.run(server.run(started)):
            slab.close()  # else a thread may still write into it: it is unmapped with the process
        end.note_written()


class _End:
    """What is said of the daemon's end: in its log, and in its lock file for `tierkv daemon stop`."""

    def __init__(self, socket_path: Path, lock: LockFile) -> None:
        self.core: Core | None = None
        self._socket = socket_path
        self._lock = lock

    def note_written(self) -> None:
        """Say how many blocks the store has not got."""
        self._lock.note(f"{NOT_WRITTEN} {self.core.num_writes if self.core else 0}")

    def say(self, deadline_s: float) -> None:
        """Say that the daemon ends without what still hangs. Called by a thread of its own, right before the end."""
        lost = self.core.num_writes if self.core else 0
        self.note_written()
        self._socket.unlink(missing_ok=True)
        _log.error(
            "something has not ended within %g s, such as a disk that does not answer: "
            "the process exits, %d blocks were not written to the store",
            deadline_s,
            lost,
        )


def _set_soon(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop, by another thread; of one that has ended nobody waits for it."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(event.set)


class _Server:
    """One running daemon. Satisfies `Host`: what each connection needs of it."""

    def __init__(
        self,
        config: DaemonConfig,
        listener: socket.socket,
        store: ColdStore | None,
        slab: Slab,
        threads: ThreadPoolExecutor,
        ending: Ending,
    ) -> None:
        self._ending = ending
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
        self._waiters = Waiters()
        self._loads = StateLoads()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self, started: Callable[[], None]) -> bool:
        """Serve until stopped. Return whether no thread may still write into the slab."""
        loop = asyncio.get_running_loop()
        stopping = asyncio.Event()
        self._ending.watch(partial(_set_soon, loop, stopping))
        loader = Loader(self.core, self._slab, self._threads, loaded=self.tell_news)
        prefetcher = Prefetcher(self.core, loader)
        writer = StoreWriter(self.core, self._store, self._slab, self._threads)
        self._requests = Requests(
            self.core,
            store=self._store,
            store_path=self.config.store,
            slab=self._slab,
            threads=self._threads,
            loader=loader,
            writer=writer,
            waiters=self._waiters,
            prefetcher=prefetcher,
            loads=self._loads,
            evictor=self._make_evictor(writer),
            stall_s=self.config.stall_s,
            report=self._report,
            stop=self._ending.begin,
        )
        server = await loop.create_unix_server(lambda: ClientConnection(self), sock=self._listener)
        metrics = await self._serve_metrics()
        background = [self.spawn(prefetcher.run()), self.spawn(self._tick_forever(writer))]
        started()
        _log.info("serving on %s, slab of %d bytes", self.config.socket, self._slab.size_bytes)
        try:
            await stopping.wait()
        finally:
            server.close()
            if metrics:
                metrics.close()
            for task in background:
                task.cancel()
            for client in list(self.clients):
                client.close()
            await loop.run_in_executor(None, writer.close)
            self._requests.close()
            is_quiet = await loader.wait_until_idle(_IDLE_S)
            if not is_quiet:
                _log.warning("%d reads hang and are left behind", loader.num_running)
        return is_quiet

    def _make_evictor(self, writer: StoreWriter) -> Evictor:
        path = self.config.socket.with_name(self.config.socket.name + ".evictions")
        if self.config.store is not None:
            path = self.config.store / LOG_NAME
        log = EvictionLog(path)
        log.save()  # the next daemon goes on with this log, also if nothing is evicted
        return Evictor(
            self.core,
            self._store,
            writer,
            log,
            engines=lambda: list(self.clients),
            stall_s=self.config.stall_s,
        )

    def answer(self, client: ClientConnection, message: Message) -> Answer | Coroutine[Any, Any, Answer]:
        """Return the answer to a message, or what will come up with it."""
        answer = self._requests.answer(client, message)
        self.tell_news()
        return answer

    def tell_news(self) -> None:
        """Wake who waits for a block that was published, or that nobody computes any more."""
        if self.core.news:
            self._waiters.tell(self.core.news)
            self.core.news.clear()

    def end_loads(self, connection: Connection) -> None:
        """Close the state files that this client alone had loaded."""
        self._loads.end_loads(connection)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something beside, and keep it alive."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _tick_forever(self, writer: StoreWriter) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            self.core.trim()
            writer.tend()
            for client in list(self.clients):
                client.check_alive()

    async def _serve_metrics(self) -> asyncio.Server | None:
        port = self.config.metrics_port
        return None if port is None else await serve_metrics(port, self._report, timeout_s=self.config.hello_s)

    def _report(self) -> StatusReport:
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
            warm_bytes=core.slab.size_bytes,
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
