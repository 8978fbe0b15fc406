"""Loader: reads blocks from the store and from state files into slots of the slab, on threads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tierkv.daemon.core import Core, FetchTask, Load
from tierkv.daemon.loaded_file import LoadedFile
from tierkv.daemon.sealer import Sealer
from tierkv.errors import StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.storage.state_file import StateFile
from tierkv.storage.warm import Slab

__all__ = ["Loader"]

_log = logging.getLogger(__name__)

_AHEAD_BLOCKS = 4
_LOAD_S = 25.0  # of one fetch; the client waits 30


@dataclass(slots=True)
class _Reading:
    """A read in work. ended: set on the loop."""

    call: Future[MissReason | None]
    ended: asyncio.Future[None]


class Loader:
    """Runs the loads that the core has started. Used on the loop; `loaded` is called there when one has ended.

    Blocks of the store are read on `threads`, those of a state file on the file's own. load_s: a fetch whose reads take
    longer is answered without them; what they still write into stays theirs.
    """

    def __init__(
        self,
        core: Core,
        slab: Slab,
        threads: ThreadPoolExecutor,
        *,
        loaded: Callable[[], None],
        load_s: float = _LOAD_S,
    ) -> None:
        self._core = core
        self._slab = slab
        self._threads = threads
        self._loaded = loaded
        self._load_s = load_s
        self._sealer = Sealer()
        self._running: dict[Load, _Reading] = {}

    @property
    def num_running(self) -> int:
        """Reads that have not returned: each may still write into its slot."""
        return len(self._running)

    async def load(self, task: FetchTask) -> None:
        """Read what a task started, and wait for that and for what others are reading already."""
        for at, load in enumerate(task.fresh):
            ahead = task.fresh[at + _AHEAD_BLOCKS : at + _AHEAD_BLOCKS + 1]
            self._start(load, ahead)
        deadline = time.monotonic() + self._load_s
        for load in task.loads.values():
            reading = self._running.get(load)
            if reading is None:
                continue
            is_hanging = isinstance(load.source, LoadedFile) and load.source.is_hanging
            left = 0.0 if is_hanging else max(0.0, deadline - time.monotonic())
            await asyncio.wait({reading.ended}, timeout=left)
            if not (load.is_done or is_hanging) and isinstance(load.source, LoadedFile):
                load.source.note_overdue(reading.call)

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait for the reads in work, for a time; return whether none is left."""
        if self._running:
            await asyncio.wait({reading.ended for reading in self._running.values()}, timeout=timeout_s)
        return not self._running

    def _start(self, load: Load, ahead: Sequence[Load]) -> None:
        source = load.source
        info = self._sealer.identify(load.tenant, load.entry)
        if isinstance(source, LoadedFile):
            if source.is_hanging:
                self._core.finish_load(load, MissReason.IO_ERROR)
                return
            call = source.submit(lambda state: self._read(load, state, info, ahead))
        else:
            assert isinstance(source, ColdStore)
            call = self._threads.submit(self._read, load, source, info, ahead)
        ended = asyncio.get_running_loop().create_future()
        self._running[load] = _Reading(call, ended)
        asyncio.wrap_future(call).add_done_callback(partial(self._finish, load, ended))

    def _finish(self, load: Load, ended: asyncio.Future[None], result: asyncio.Future[MissReason | None]) -> None:
        failure = result.exception()
        if failure is not None:
            _log.error("reading block %s failed", load.entry.block_hash.hex(), exc_info=failure)
        self._core.finish_load(load, MissReason.IO_ERROR if failure else result.result())
        del self._running[load]
        ended.set_result(None)
        self._loaded()

    def _read(
        self, load: Load, source: ColdStore | StateFile, info: BlockInfo, ahead: Sequence[Load]
    ) -> MissReason | None:
        layout = load.tenant.layout
        for later in ahead:
            source.read_ahead([later.entry.block_hash])
        try:
            reason = source.read_into(info, self._slab.slots(layout.block_bytes)[load.slot], layout=layout)
            if reason in (MissReason.CORRUPT, MissReason.TRUNCATED):
                source.note_damaged(info.block_hash)
            return reason
        except StoreError:
            return MissReason.IO_ERROR
