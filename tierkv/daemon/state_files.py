"""State files of the daemon's clients: those that are loaded as sources of blocks, and those that are being saved."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tierkv.daemon.messages import Saved
from tierkv.daemon.side_threads import SideThreads, result_of
from tierkv.daemon.values import Connection, Tenant
from tierkv.errors import CapacityError, DaemonError, NamespaceMismatchError, StoreError
from tierkv.storage.state_file import FileIdentity, StateFile, write_state_file
from tierkv.storage.state_format import StateEntry
from tierkv.values.block import BlockHash

__all__ = ["MAX_LOADED", "MAX_LOADED_OF_CLIENT", "LoadedFile", "StateFiles"]

_log = logging.getLogger(__name__)

MAX_LOADED = 256
MAX_LOADED_OF_CLIENT = 64
_NUM_READERS = 2  # threads of one file
_NUM_OPENERS = 16
_NUM_SAVERS = 4
_MAX_OPENING = 2  # of one client: its files that hang must not take all threads
_OPEN_S = 20.0
_LOOKUP_S = 0.5  # the loop waits so long for the token ids of a block
_SAVE_STALL_S = 60.0  # without a record that was read or written
_POLL_S = 1.0

Result = TypeVar("Result")


class LoadedFile:
    """An open state file with threads of its own: a file that hangs delays the reads of no other. A `BlockSource`.

    While one of its reads is overdue, every lookup in it finds nothing, so that no further thread hangs.
    """

    def __init__(self, state: StateFile) -> None:
        self.identity: FileIdentity = state.identity
        self.path: Path = state.path
        self._state = state
        self._threads = SideThreads(_NUM_READERS, name="tierkv-state-file")
        self._lock = threading.Lock()
        self._num_users = 1  # the opener; each read in work adds one
        self._overdue: Future[Any] | asyncio.Future[Any] | None = None

    def __len__(self) -> int:
        return len(self._state)

    @property
    def is_hanging(self) -> bool:
        """Whether a read that took too long has still not returned."""
        return self._overdue is not None and not self._overdue.done()

    @property
    def num_pending(self) -> int:
        """Reads that are queued or have not returned."""
        return self._threads.num_pending

    def submit(self, read: Callable[[StateFile], Result]) -> Future[Result]:
        """Have a thread of this file read something. The file stays open until the read has returned."""
        self._use()
        try:
            reading = self._threads.submit(read, self._state)
        except BaseException:
            self._end_use()
            raise
        reading.add_done_callback(lambda _: self._end_use())
        return reading

    def note_overdue(self, reading: Future[Any] | asyncio.Future[Any]) -> None:
        """Find nothing until this read returns."""
        self._overdue = reading

    @contextmanager
    def held(self) -> Iterator[StateFile]:
        """Keep the file open for a thread that is not of this file."""
        self._use()
        try:
            yield self._state
        finally:
            self._end_use()

    def close(self) -> None:
        """Close the file once its last read has returned. Does not wait for it."""
        self._threads.shutdown()
        self._end_use()

    def lookup(self, block_hash: BlockHash) -> StateEntry | None:
        """Return a block's small record, which is in memory, or None."""
        return None if self.is_hanging else self._state.lookup(block_hash)

    def read_tokens(self, block_hash: BlockHash) -> bytes | None:
        """Return a block's token ids; None if they cannot be read soon."""
        return self._read_soon(lambda state: state.read_tokens(block_hash))

    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None:
        """Return the block that shares most leading tokens, as `StateFile` does; None if that cannot be read soon."""
        if self.is_hanging or not self._state.children(parent):  # the table of children is in memory
            return None
        return self._read_soon(lambda state: state.find_longest_run(parent, token_bytes))

    def _read_soon(self, read: Callable[[StateFile], Result]) -> Result | None:
        if self.is_hanging:
            return None
        reading = self.submit(read)
        try:
            return reading.result(_LOOKUP_S)
        except (FutureTimeout, TimeoutError):
            if not reading.cancel():
                self.note_overdue(reading)
            return None
        except StoreError:
            return None

    def _use(self) -> None:
        with self._lock:
            self._num_users += 1

    def _end_use(self) -> None:
        with self._lock:
            self._num_users -= 1
            is_last = not self._num_users
        if is_last:
            self._state.close()


@dataclass(slots=True, eq=False)
class _Loaded:
    """One open file, the namespace that it belongs to, and the connections that have loaded it."""

    file: LoadedFile
    tenant: Tenant
    connections: set[Connection] = field(default_factory=set)


class StateFiles:
    """Opens and saves state files on threads of its own. Used on the loop.

    A file is open once, however many clients load it, and is closed with the last of them.
    """

    def __init__(self, *, open_s: float = _OPEN_S, open_file: Callable[[Path], StateFile] = StateFile) -> None:
        self._open_s = open_s
        self._open_file = open_file
        self._openers = SideThreads(_NUM_OPENERS, name="tierkv-open")
        self._savers = SideThreads(_NUM_SAVERS, name="tierkv-save")
        self._loaded: dict[FileIdentity, _Loaded] = {}
        self._opening: Counter[Connection] = Counter()
        self._saving: set[Connection] = set()

    async def load(self, connection: Connection, path: Path) -> int:
        """Make a state file a source of the connection's namespace; return how many blocks it has.

        A file that the client has loaded from that path before, and that another file has replaced, is unloaded.

        Raises StoreError for what is no regular file or no state file, NamespaceMismatchError, CapacityError where
        too many are open, DaemonError where the file cannot be opened in time.
        """
        tenant = connection.require_tenant()
        if sum(connection in each.connections for each in self._loaded.values()) >= MAX_LOADED_OF_CLIENT:
            raise CapacityError(f"one client may load {MAX_LOADED_OF_CLIENT} state files")
        if self._opening[connection] >= _MAX_OPENING:
            raise DaemonError(f"{_MAX_OPENING} files of this client are being opened, and do not answer")
        state = await self._open(connection, path)
        loaded = self._loaded.get(state.identity)
        if loaded is not None:
            state.close()  # it is open already
        if connection.is_closed:
            if loaded is None:
                state.close()
            raise DaemonError("the connection was closed meanwhile")
        if loaded is None:
            if state.namespace != tenant.digest:
                state.close()
                raise NamespaceMismatchError(f"{path} was saved for another model or setting")
            if len(self._loaded) >= MAX_LOADED:
                state.close()
                raise CapacityError(f"{MAX_LOADED} state files are loaded already")
            loaded = self._loaded[state.identity] = _Loaded(LoadedFile(state), tenant)
            tenant.sources.append(loaded.file)
        elif loaded.tenant is not tenant:
            raise NamespaceMismatchError(f"{path} was saved for another model or setting")
        loaded.connections.add(connection)
        for other in list(self._loaded.values()):  # the file that was at this path before
            if other is not loaded and other.file.path == loaded.file.path and connection in other.connections:
                self._leave(other, connection)
        return len(loaded.file)

    async def save(
        self, connection: Connection, path: Path, records: Iterator[bytes], *, ended: Callable[[], None]
    ) -> Saved:
        """Write a state file of the connection's namespace. ended: called when no thread reads the records any more.

        That may be after this raises. Raises DaemonError where no record moves for too long.
        """
        if connection in self._saving:
            ended()
            raise DaemonError("this client saves a state file already")
        tenant = connection.require_tenant()
        moved_at = time.monotonic()

        def timed() -> Iterator[bytes]:
            nonlocal moved_at
            for record in records:
                moved_at = time.monotonic()
                yield record
                moved_at = time.monotonic()

        def end(_: object) -> None:
            self._saving.discard(connection)
            ended()

        self._saving.add(connection)
        call = self._savers.submit(
            lambda: write_state_file(path, namespace=tenant.digest, description=tenant.description, records=timed())
        )
        waiting = asyncio.wrap_future(call)
        waiting.add_done_callback(end)
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=_POLL_S)
            if time.monotonic() - moved_at > _SAVE_STALL_S and not waiting.done():
                waiting.add_done_callback(lambda late: late.exception())
                raise DaemonError(f"{path} was not written: nothing has moved for {_SAVE_STALL_S:g} s")
        saved = waiting.result()
        return Saved(blocks=saved.blocks, file_bytes=saved.file_bytes)

    def unload(self, connection: Connection) -> None:
        """Close the files that this connection alone had loaded: it has ended."""
        for loaded in list(self._loaded.values()):
            self._leave(loaded, connection)

    def close(self) -> None:
        """Close every file as soon as its reads have returned. Does not wait for them."""
        for loaded in list(self._loaded.values()):
            self._end(loaded)
        self._openers.shutdown()
        self._savers.shutdown()

    def _leave(self, loaded: _Loaded, connection: Connection) -> None:
        loaded.connections.discard(connection)
        if not loaded.connections:
            self._end(loaded)

    def _end(self, loaded: _Loaded) -> None:
        del self._loaded[loaded.file.identity]
        loaded.tenant.sources.remove(loaded.file)
        loaded.file.close()

    async def _open(self, connection: Connection, path: Path) -> StateFile:
        self._opening[connection] += 1
        opening = self._openers.submit(self._open_file, path)
        asyncio.wrap_future(opening).add_done_callback(partial(self._end_opening, connection))
        try:
            return await result_of(opening, timeout_s=self._open_s)
        except TimeoutError as exc:
            if opening.done():
                raise
            _log.warning("a state file was not opened within %g s: %s", self._open_s, path)
            opening.cancel()
            opening.add_done_callback(_close_late)
            raise DaemonError(f"{path} was not opened within {self._open_s:g} s") from exc

    def _end_opening(self, connection: Connection, opened: asyncio.Future[StateFile]) -> None:
        self._opening[connection] -= 1
        if self._opening[connection] <= 0:
            del self._opening[connection]
        if not opened.cancelled():
            opened.exception()  # else asyncio logs it


def _close_late(opening: Future[StateFile]) -> None:
    """Close a file that was opened after its request had been answered."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
