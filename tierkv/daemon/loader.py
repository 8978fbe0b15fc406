"""Loader: reads blocks from the store and from state files into slots of the slab, on threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tierkv.daemon.core import Core, FetchTask, Load
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


class Loader:
    """Runs the loads that the core has started. Used on the loop; `loaded` is called there when one has ended."""

    def __init__(self, core: Core, slab: Slab, threads: ThreadPoolExecutor, *, loaded: Callable[[], None]) -> None:
        self._core = core
        self._slab = slab
        self._threads = threads
        self._loaded = loaded
        self._sealer = Sealer()
        self._running: dict[Load, asyncio.Future[None]] = {}

    async def load(self, task: FetchTask) -> None:
        """Read what a task started, and wait for that and for what others are reading already."""
        loop = asyncio.get_running_loop()
        for at, load in enumerate(task.fresh):
            ahead = task.fresh[at + _AHEAD_BLOCKS : at + _AHEAD_BLOCKS + 1]
            info = self._sealer.identify(load.tenant, load.entry)
            reading = loop.run_in_executor(self._threads, self._read, load, info, ahead)
            done = loop.create_future()
            self._running[load] = done
            reading.add_done_callback(partial(self._finish, load, done))
        for load in task.loads.values():
            if not load.is_done:
                await asyncio.shield(self._running[load])

    def _finish(self, load: Load, done: asyncio.Future[None], result: asyncio.Future[MissReason | None]) -> None:
        failure = result.exception()
        if failure is not None:
            _log.error("reading block %s failed", load.entry.block_hash.hex(), exc_info=failure)
        self._core.finish_load(load, MissReason.IO_ERROR if failure else result.result())
        del self._running[load]
        done.set_result(None)
        self._loaded()

    def _read(self, load: Load, info: BlockInfo, ahead: Sequence[Load]) -> MissReason | None:
        source, layout = load.source, load.tenant.layout
        assert isinstance(source, ColdStore | StateFile)
        for later in ahead:
            source.read_ahead([later.entry.block_hash])
        try:
            reason = source.read_into(info, self._slab.slots(layout.block_bytes)[load.slot], layout=layout)
            if reason in (MissReason.CORRUPT, MissReason.TRUNCATED):
                source.note_damaged(info.block_hash)
            return reason
        except StoreError:
            return MissReason.IO_ERROR
