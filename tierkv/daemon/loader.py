"""Loader and Prefetcher: read blocks from the store and from state files into slots of the slab, on threads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from tierkv.daemon.core import Core
from tierkv.daemon.messages import LimitStatus
from tierkv.daemon.protocol import split_hashes
from tierkv.daemon.remote_blocks import RemoteBlocks
from tierkv.daemon.state_files import LoadedFile
from tierkv.daemon.status import limit_status
from tierkv.daemon.values import BlockIdentifier, FetchTask, Load, Tenant
from tierkv.errors import StoreError
from tierkv.readers.pool import ReaderPool
from tierkv.remote_tiers.source import RemoteSource
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.storage.state_file import StateFile
from tierkv.storage.warm import Slab
from tierkv.values.block import HASH_BYTES, BlockHash

__all__ = ["Loader", "Prefetcher"]

_log = logging.getLogger(__name__)

_AHEAD_BLOCKS = 4
_LOAD_S = 25.0  # of one fetch; the client waits 30
_PROMPT_BYTES = 512  # of the objects of one prompt


class Loader:
    """Runs the loads that the core has started. Used on the loop, which calls `loaded` when a load has ended.

    Blocks of the store are read on `threads`, those of a state file on the file's own threads, those of a remote tier
    on threads of `remote`. readers: decode blocks of the store in place of its threads. load_s: a fetch whose
    reads take longer is answered without them; a slot that a read may still write into stays pinned.
    """

    def __init__(
        self,
        core: Core,
        slab: Slab,
        threads: ThreadPoolExecutor,
        *,
        loaded: Callable[[], None],
        load_s: float = _LOAD_S,
        remote: RemoteBlocks | None = None,
        readers: ReaderPool | None = None,
    ) -> None:
        self._core = core
        self._slab = slab
        self._threads = threads
        self._loaded = loaded
        self._load_s = load_s
        self._remote = remote
        self._readers = readers
        self._identifier = BlockIdentifier()
        self._running: dict[Load, asyncio.Future[MissReason | None]] = {}

    @property
    def num_running(self) -> int:
        """Reads that have not returned: each may still write into its slot."""
        return len(self._running)

    async def load(self, task: FetchTask) -> None:
        """Run a task's own loads; wait for these and for those that it shares with other tasks."""
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
            await asyncio.wait({reading}, timeout=left)
            if not (load.is_done or is_hanging) and isinstance(load.source, LoadedFile):
                load.source.note_overdue(reading)

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait for the reads in work, for a time; return whether none is left."""
        if self._running:
            await asyncio.wait(set(self._running.values()), timeout=timeout_s)
        return not self._running

    def _start(self, load: Load, ahead: Sequence[Load]) -> None:
        source = load.source
        info = self._identifier.identify(load.tenant, load.entry)
        if isinstance(source, LoadedFile):
            if source.is_hanging:
                self._core.finish_load(load, MissReason.IO_ERROR)
                return
            call = source.submit(lambda state: self._read(load, state, info, ahead))
        else:
            assert isinstance(source, ColdStore | RemoteSource)
            threads = self._remote.threads if self._remote and isinstance(source, RemoteSource) else self._threads
            call = threads.submit(self._read, load, source, info, ahead)
        self._running[load] = reading = asyncio.wrap_future(call)
        reading.add_done_callback(partial(self._finish, load))  # before those of the tasks that wait for it

    def _finish(self, load: Load, reading: asyncio.Future[MissReason | None]) -> None:
        failure = reading.exception()
        if failure is not None:
            _log.error("reading block %s failed", load.entry.block_hash.hex(), exc_info=failure)
        self._core.finish_load(load, MissReason.IO_ERROR if failure else reading.result())
        del self._running[load]
        self._loaded()

    def _read(
        self, load: Load, source: ColdStore | StateFile | RemoteSource, info: BlockInfo, ahead: Sequence[Load]
    ) -> MissReason | None:
        layout = load.tenant.layout
        for later in ahead:
            source.read_ahead([later.entry.block_hash])
        try:
            out = self._slab.slots(layout.block_bytes)[load.slot]
            if isinstance(source, ColdStore):
                reason = source.read_into(info, out, layout=layout, decoders=self._readers)
            else:
                reason = source.read_into(info, out, layout=layout)
            if reason in (MissReason.CORRUPT, MissReason.TRUNCATED):
                source.note_damaged(info.block_hash)
            return reason
        except StoreError:
            return MissReason.IO_ERROR


@dataclass(frozen=True, slots=True)
class _Prompt:
    """One announced prompt. hashes: of its whole blocks, 16 bytes each."""

    tenant: Tenant
    hashes: bytes
    tokens: bytes

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return len(self.hashes) + len(self.tokens) + _PROMPT_BYTES


class Prefetcher:
    """A bounded queue of announced prompts, and the task that loads them one after the other. Used on the loop.

    A prompt stays queued when its client disconnects: a command announces what other clients will ask for.
    """

    def __init__(self, core: Core, loader: Loader, remote: RemoteBlocks | None = None) -> None:
        self._core = core
        self._loader = loader
        self._remote = remote
        self._prompts: deque[_Prompt] = deque()
        self._bytes: Counter[BlockHash] = Counter()  # queued, by namespace
        self._has_work = asyncio.Event()

    def submit(self, tenant: Tenant, hashes: bytes, tokens: bytes) -> bool:
        """Queue a prompt: the hashes of its whole blocks, and its token ids. False if the queue is full."""
        prompt, limits = _Prompt(tenant, hashes, tokens), self._core.limits
        size = prompt.num_bytes
        if (
            len(self._prompts) >= limits.prompts
            or self._bytes.total() + size > limits.prompt_bytes
            or self._bytes[tenant.digest] + size > limits.prompt_bytes_of_namespace
        ):
            return False
        self._prompts.append(prompt)
        self._bytes[tenant.digest] += size
        self._has_work.set()
        return True

    def usage(self) -> list[LimitStatus]:
        """Return how much is queued, and how much may be."""
        limits = self._core.limits
        return [
            limit_status("prompts", limits.prompts, [len(self._prompts)]),
            limit_status("prompt_bytes", limits.prompt_bytes, self._bytes.values(), limits.prompt_bytes_of_namespace),
        ]

    async def run(self) -> None:
        """Load the queued prompts until cancelled. The failure of a prompt is logged, and the next one follows."""
        while True:
            await self._has_work.wait()
            prompt = self._prompts.popleft()
            self._bytes[prompt.tenant.digest] -= prompt.num_bytes
            if not self._bytes[prompt.tenant.digest]:
                del self._bytes[prompt.tenant.digest]
            if not self._prompts:
                self._has_work.clear()
            try:
                await self._load(prompt)
            except Exception:  # noqa: BLE001 - the outermost loop of its task: the next prompt may load
                _log.exception("an announced prompt of %d blocks failed", len(prompt.hashes) // HASH_BYTES)

    async def _load(self, prompt: _Prompt) -> None:
        if self._remote:
            await self._remote.look(prompt.tenant, split_hashes(prompt.hashes), prompt.tokens)
        for task in self._core.loads.begin_prefetches(prompt.tenant, split_hashes(prompt.hashes), prompt.tokens):
            await self._loader.load(task)
            self._core.loads.end_fetch(None, task)
            self._core.counters["prefetched_blocks"] += sum(load.reason is None for load in task.fresh)
            if task.miss:
                break
