"""StateLoads: the state files that clients of the daemon have loaded: each open once, closed with its last client."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

from tierkv.daemon.core import Connection, Tenant
from tierkv.daemon.loaded_file import LoadedFile
from tierkv.daemon.side_threads import SideThreads
from tierkv.errors import CapacityError, DaemonError, NamespaceMismatchError
from tierkv.storage.state_file import FileIdentity, StateFile

__all__ = ["MAX_LOADS", "MAX_LOADS_OF_CLIENT", "StateLoads"]

_log = logging.getLogger(__name__)

MAX_LOADS = 256
MAX_LOADS_OF_CLIENT = 64
_NUM_THREADS = 16
_MAX_OPENING = 2  # of one client: its files that hang must not take all threads
_OPEN_S = 20.0


@dataclass(slots=True, eq=False)
class _Load:
    """One open file, the namespace that it belongs to, and the connections that have loaded it."""

    file: LoadedFile
    tenant: Tenant
    connections: set[Connection] = field(default_factory=set)


class StateLoads:
    """Opens state files on threads of its own, each with a deadline. Used on the loop alone."""

    def __init__(self, *, open_s: float = _OPEN_S, open_file: Callable[[Path], StateFile] = StateFile) -> None:
        self._open_s = open_s
        self._open_file = open_file
        self._threads = SideThreads(_NUM_THREADS, name="tierkv-open")
        self._loads: dict[FileIdentity, _Load] = {}
        self._opening: Counter[Connection] = Counter()

    @property
    def num_hanging(self) -> int:
        """Reads and openings that have not returned."""
        return self._threads.num_pending + sum(load.file.num_pending for load in self._loads.values())

    async def load(self, connection: Connection, path: Path) -> int:
        """Make a state file a source of the connection's namespace; return how many blocks it has.

        What the client has loaded from that path before, and another file has replaced, is no longer loaded for it.

        Raises StoreError for what is no regular file or no state file, NamespaceMismatchError, CapacityError where
        too many are open, DaemonError where the file cannot be opened in time.
        """
        tenant = connection.require_tenant()
        if sum(connection in load.connections for load in self._loads.values()) >= MAX_LOADS_OF_CLIENT:
            raise CapacityError(f"one client may load {MAX_LOADS_OF_CLIENT} state files")
        if self._opening[connection] >= _MAX_OPENING:
            raise DaemonError(f"{_MAX_OPENING} files of this client are being opened, and do not answer")
        state = await self._open(connection, path)
        load = self._loads.get(state.identity)
        if load is not None:
            state.close()  # it is open already
        if connection.is_closed:
            if load is None:
                state.close()
            raise DaemonError("the connection was closed meanwhile")
        if load is None:
            if state.namespace != tenant.digest:
                state.close()
                raise NamespaceMismatchError(f"{path} was saved for another model or setting")
            if len(self._loads) >= MAX_LOADS:
                state.close()
                raise CapacityError(f"{MAX_LOADS} state files are loaded already")
            load = self._loads[state.identity] = _Load(LoadedFile(state), tenant)
            tenant.sources.append(load.file)
        elif load.tenant is not tenant:
            raise NamespaceMismatchError(f"{path} was saved for another model or setting")
        load.connections.add(connection)
        for other in list(self._loads.values()):  # what was at this path before
            if other is not load and other.file.path == load.file.path and connection in other.connections:
                self._leave(other, connection)
        return len(load.file)

    def end_loads(self, connection: Connection) -> None:
        """The connection has ended: close the files that no other one has loaded."""
        for load in list(self._loads.values()):
            self._leave(load, connection)

    def close(self) -> None:
        """Close every file as soon as its reads have returned. Waits for nothing."""
        for load in list(self._loads.values()):
            self._end(load)
        self._threads.shutdown()

    def _leave(self, load: _Load, connection: Connection) -> None:
        load.connections.discard(connection)
        if not load.connections:
            self._end(load)

    def _end(self, load: _Load) -> None:
        del self._loads[load.file.identity]
        load.tenant.sources.remove(load.file)
        load.file.close()

    async def _open(self, connection: Connection, path: Path) -> StateFile:
        loop = asyncio.get_running_loop()
        self._opening[connection] += 1
        opening = self._threads.submit(self._open_file, path)
        opening.add_done_callback(lambda _: _call_soon(loop, self._end_opening, connection))
        waiting = asyncio.wrap_future(opening)
        done, _ = await asyncio.wait({waiting}, timeout=self._open_s)
        if not done:
            _log.warning("a state file was not opened within %g s: %s", self._open_s, path)
            waiting.add_done_callback(lambda late: late.cancelled() or late.exception())
            opening.cancel()
            opening.add_done_callback(_close_late)
            raise DaemonError(f"{path} was not opened within {self._open_s:g} s")
        return waiting.result()

    def _end_opening(self, connection: Connection) -> None:
        self._opening[connection] -= 1
        if self._opening[connection] <= 0:
            del self._opening[connection]


def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[Connection], None], connection: Connection) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and with it what is counted
        loop.call_soon_threadsafe(call, connection)


def _close_late(opening: Future[StateFile]) -> None:
    """Close what was opened when nobody waited for it any more."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
