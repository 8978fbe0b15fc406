"""StoreWriter: encodes published blocks and writes them into the store, in the background."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias, TypeVar

from tierkv.background.work_queue import WriteBehind
from tierkv.daemon.core import Core
from tierkv.daemon.state_files import LoadedFile
from tierkv.daemon.values import BlockIdentifier, Tenant, Write
from tierkv.errors import StoreError
from tierkv.index.index import Entry
from tierkv.storage.codecs import codec_by_name, default_codec
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.storage.warm import Slab

__all__ = ["QUEUE_BLOCKS", "StoreWriter"]

_log = logging.getLogger(__name__)

Action: TypeAlias = Callable[[], None]
Result = TypeVar("Result")

QUEUE_BLOCKS = 4096
_BATCH_BLOCKS = 8


class StoreWriter:
    """A queue of blocks with a write thread. Made on the loop that the core runs on.

    The slots of queued blocks stay pinned until the core is notified, on that loop, that they are written or skipped.
    """

    def __init__(self, core: Core, store: ColdStore | None, slab: Slab, threads: ThreadPoolExecutor) -> None:
        self._core = core
        self._store = store
        self._slab = slab
        self._threads = threads
        self._identifier = BlockIdentifier()
        self._loop = asyncio.get_running_loop()
        self._queue: WriteBehind[Write | Tenant | Action | None] = WriteBehind(
            self._work_off, capacity=QUEUE_BLOCKS, batch_size=_BATCH_BLOCKS, name="tierkv-daemon-write"
        )

    def submit(self, write: Write) -> None:
        """Queue a published block. If the queue is full, the block is skipped."""
        if not self._queue.try_put(write):
            self._core.finish_write(write, is_stored=False, reason="queue_full")

    def note_use(self, tenant: Tenant) -> None:
        """Have the store note, in the background, that a namespace is in use, if it has blocks of it.

        The store keeps no description without blocks: a client can send as many as it likes.
        """
        if self._store is not None and not tenant.is_registered:
            self._queue.try_put(tenant)

    def call(self, action: Callable[[ColdStore], Result]) -> Future[Result]:
        """Have the write thread call `action` after what is queued. Raises StoreError if the queue is full."""
        future: Future[Result] = Future()

        def act() -> None:
            assert self._store is not None
            try:
                future.set_result(action(self._store))
            except BaseException as exc:  # noqa: BLE001 - the caller gets it
                future.set_exception(exc)

        if not self._queue.try_put(act):
            raise StoreError("too many blocks are queued for the store")
        return future

    def maintain(self) -> None:
        """Have the write thread maintain the store, if that is due and no block is queued: blocks do it too."""
        if self._store is not None and self._store.notes.are_due and not self._queue.pending:
            self._queue.try_put(None)

    def flush(self, *, stall_s: float) -> None:
        """Wait until all blocks queued so far are on the disk. The loop's thread must not call this.

        Raises StoreError where one batch takes longer than `stall_s`.
        """
        if not self._queue.flush(stall_s=stall_s):
            raise StoreError(f"nothing was written to the store for {stall_s:g} s")
        if self._store is not None:
            self._store.flush()

    def close(self) -> None:
        """Write the queued blocks and stop. The loop's thread must not call this."""
        self._queue.close()

    def iter_records(self, tenant: Tenant, blocks: Sequence[Write]) -> Iterator[bytes]:
        """Yield the record of every block of a namespace once: from the store, the warm tier, and state files.

        blocks: those in the warm tier, pinned.
        """
        seen: set[bytes] = set()
        if self._store is not None:
            for block_hash, _ in list(self._store.iter_entries(tenant.digest)):
                record = self._store.read_record(block_hash)
                if record is not None:
                    seen.add(block_hash)
                    yield record
        identifier = BlockIdentifier()
        for block in blocks:
            if block.entry.block_hash not in seen:
                seen.add(block.entry.block_hash)
                yield self._encode(block, identifier.identify(tenant, block.entry)).data.tobytes()
        for source in list(tenant.sources):
            if isinstance(source, LoadedFile):
                with source.held() as state:
                    yield from state.iter_records(seen)

    def _work_off(self, work: list[Write | Tenant | Action | None]) -> None:
        """Process a batch, in order, on the write thread. None stands for a call of `maintain`."""
        for is_action, group in itertools.groupby(work, callable):
            if is_action:
                for action in group:
                    assert callable(action)
                    action()
            else:
                self._write([each for each in group if each is None or isinstance(each, Write | Tenant)])

    def _write(self, work: list[Write | Tenant | None]) -> None:
        """Encode and store published blocks that were not evicted meanwhile. Maintain the store if that is due."""
        store = self._store
        assert store is not None
        published = [write for write in work if isinstance(write, Write)]
        skipped = dict.fromkeys(published, "evicted")  # write -> why it is not stored; "" if it is
        writes = [write for write in published if not self._core.is_marked(write)]
        skipped |= dict.fromkeys(writes, PutOutcome.IO_ERROR.value)
        try:
            if store.notes.are_due and not writes:  # else `put` does it, and would wait twice for a busy store
                store.maintain()
        except StoreError as exc:
            _log.warning("damage and uses that readers have noted are not written yet: %s", exc)
        try:
            missing: list[Write] = []
            lost: set[Entry] = set()  # the store removes what follows a damaged block when it is written again
            for write in writes:
                if write.entry.parent in lost or not store.contains(write.entry.block_hash):
                    missing.append(write)
                    lost.add(write.entry)
                else:
                    skipped[write] = ""
            for tenant in {write.tenant: None for write in missing}:
                self._register(tenant)
            infos = [self._identifier.identify(write.tenant, write.entry) for write in missing]
            records = list(self._threads.map(self._encode, missing, infos))
            for write, record in zip(missing, records, strict=True):
                if write.tenant.remote:
                    write.tenant.remote.write(record)
            outcomes = store.put(records)
            for write, outcome in zip(missing, outcomes, strict=True):
                skipped[write] = "" if outcome in (PutOutcome.STORED, PutOutcome.EXISTS) else outcome.value
            self._note_used([tenant for tenant in work if isinstance(tenant, Tenant)])
        except StoreError as exc:
            _log.warning("%d blocks were not stored: %s", len(writes), exc)
        finally:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the core with it
                self._loop.call_soon_threadsafe(self._wrote, skipped)

    def _note_used(self, tenants: Sequence[Tenant]) -> None:
        store = self._store
        assert store is not None
        try:
            known = {each.digest for each in store.namespaces() if each.blocks} if tenants else set()
            for tenant in tenants:
                if tenant.digest in known:
                    self._register(tenant)
        except StoreError as exc:
            _log.warning("the use of a namespace is not noted yet: %s", exc)

    def _register(self, tenant: Tenant) -> None:
        """Store the description of a namespace, once."""
        if self._store is not None and not tenant.is_registered:
            self._store.register_namespace(tenant.digest, tenant.description)
            tenant.is_registered = True

    def _wrote(self, skipped: dict[Write, str]) -> None:
        for write, reason in skipped.items():
            self._core.finish_write(write, is_stored=not reason, reason=reason)

    def _encode(self, write: Write, info: BlockInfo) -> EncodedRecord:
        layout, name = write.tenant.layout, write.tenant.codec
        block = self._slab.slots(layout.block_bytes)[write.slot]
        codec = codec_by_name(name) if name else default_codec(layout.dtype)
        return encode_record(info, block, layout=layout, codec=codec)
