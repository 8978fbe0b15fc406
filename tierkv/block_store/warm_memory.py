"""The warm memory of a block store: slots, what lies in them, and the copies in flight."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tierkv.background.work_queue import PriorityThreadPool
from tierkv.block_store.config import BlockStoreConfig
from tierkv.block_store.engines import Engines
from tierkv.block_store.keys import BlockKey
from tierkv.block_store.warm_index import WarmIndex
from tierkv.errors import CapacityError
from tierkv.movers.ready import DONE, Ready
from tierkv.readers.pool import ReaderPool
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout
from tierkv.values.locks import OwnedCondition
from tierkv.values.stats import TierStats

if TYPE_CHECKING:
    from tierkv.movers.engine_memory import EngineMemory

__all__ = ["WarmMemory"]

_MIN_BLOCKS = 4
_MOST_SPARE = 16
_SPARE_SHARE = 8


@dataclass(slots=True)
class Payload:
    """What a slot holds as it lies on disk. is_forgotten: the store was cleared since; it enters no index any more.

    pinned_until: see `WarmEntry`.
    """

    key: BlockKey
    block: CodedBlock
    pinned_until: float = -math.inf
    is_forgotten: bool = False


class WarmMemory:
    """Slots of one block each. index: which blocks lie in them. spare: slots that only unread blocks pass through, so
    that a load of more blocks than there is room for never waits for another one's. threads: encode. read_threads: read
    and decode; the same ones without reader processes. num_readers: how many of these there are. coded: what lies in
    slots that hold a payload, which a GPU is to decode. Such a slot has one holder and is in no index then, because
    decoding overwrites it; without a holder it is cached as other blocks are. arriving: when a GPU has written decoded
    blocks into their slots, also of those that are in no index any more. decoding: the engine's memory whose GPU
    decodes; None where the CPU does.
    """

    def __init__(
        self,
        config: BlockStoreConfig,
        layout: BlockLayout,
        clock: Callable[[], float],
        changed: OwnedCondition,
        *,
        num_readers: int = 0,
    ) -> None:
        """Raises CapacityError for memory that holds fewer than four blocks, or that the machine does not have."""
        num_slots = config.warm_bytes // layout.block_bytes
        if num_slots < _MIN_BLOCKS:
            raise CapacityError(
                f"warm_bytes {config.warm_bytes} holds {num_slots} blocks of {layout.block_bytes} bytes",
                hint=f"at least {_MIN_BLOCKS} are needed: raise warm_bytes, or lower the block size",
            )
        machine_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if config.warm_bytes > machine_bytes:
            raise CapacityError(
                f"warm_bytes {config.warm_bytes} is more than the {machine_bytes} bytes of memory of this machine",
                hint="lower warm_bytes",
            )
        self.layout = layout
        self._changed = changed
        self._pool = WarmPool(layout.block_bytes, num_slots, num_threads=config.io_threads)
        self.slots: Bytes = self._pool.slots
        self.index: WarmIndex = WarmIndex(num_slots, clock, changed)
        with changed:
            self.spare: list[int] = self.index.take(max(1, min(_MOST_SPARE, num_slots // _SPARE_SHARE)))
        self.most_held: int = max(1, (num_slots - len(self.spare)) // 2)
        self.threads: PriorityThreadPool = PriorityThreadPool(config.io_threads, name="tierkv-io")
        self.read_threads: PriorityThreadPool = self.threads
        self.readers: ReaderPool | None = ReaderPool.of_slab(
            self._pool, num_processes=num_readers, num_in_process=config.io_threads
        )
        if self.readers:
            self.read_threads = PriorityThreadPool(max(config.io_threads, num_readers), name="tierkv-read")
        self.engines: Engines = Engines(layout)
        self.engines.open(self._pool)
        self.coded: dict[int, Payload] = {}
        self.arriving: dict[int, Ready] = {}
        self.decoding: EngineMemory | None = None
        self._in_flight: deque[tuple[Ready, list[int]]] = deque()

    def take(self, count: int) -> list[int]:
        """Return up to `count` slots, each pinned once, evicting if need be; the caller holds the lock."""
        assert self._changed.is_owned()
        self.reap()
        slots = self.index.take(count)
        self.forget_coded(slots)
        for slot in slots if self.arriving else ():
            self.arriving.pop(slot, None)
        return slots

    def hold(self, keys: Sequence[BlockKey]) -> list[int | None]:
        """Return the warm slots of blocks, each pinned; None where a block is not warm. The caller holds the lock."""
        assert self._changed.is_owned()
        slots: list[int | None] = []
        for key in keys:
            entry = self.index.get(key)
            slots.append(entry.slot if entry else None)
            if not entry:
                continue
            self.index.slots.pin(entry.slot)
            if payload := self.coded.get(entry.slot):
                payload.pinned_until = entry.pinned_until
                self.index.withdraw(entry)
        return slots

    def enter(self, slot: int, written: Ready) -> None:
        """Enter the block of a payload that is held, unless another slot has it. The caller holds the lock."""
        assert self._changed.is_owned()
        payload = self.coded[slot]
        is_known = self.index.get(payload.key) is not None or self.index.collides(payload.key)
        if not is_known and not payload.is_forgotten and slot not in self.spare:
            self.index.add(payload.key, slot, written).pinned_until = payload.pinned_until
        if not written.is_done():
            self.arriving[slot] = written

    def set_pinned(self, keys: Sequence[BlockKey], until: float) -> None:
        """Keep blocks until a time of the clock, or let them be evicted again. The caller holds the lock."""
        assert self._changed.is_owned()
        self.index.set_pinned(keys, until)
        if self.coded:
            wanted = set(keys)
            for payload in self.coded.values():
                if payload.key in wanted:
                    payload.pinned_until = until

    def clear(self) -> int:
        """Forget all blocks, those in use with their last user. Return how many. The caller holds the lock."""
        assert self._changed.is_owned()
        for payload in self.coded.values():
            payload.is_forgotten = True
        return self.index.clear()

    def forget_coded(self, slots: Iterable[int]) -> None:
        """Note that slots hold payloads no more. The caller holds the lock."""
        assert self._changed.is_owned()
        if self.coded:
            for slot in slots:
                self.coded.pop(slot, None)

    def open_frames(self, engine: EngineMemory) -> None:
        """Read blocks as they are stored from now on, if an engine's GPU can decode them."""
        with self._changed:
            slots = self.take(1)
        if not slots:
            return
        engine.open_frames(self.slots, slots[0])
        with self._changed:
            self.unpin(slots)
        if engine.blocks_decoded_at_once(self.slots):
            self.decoding = engine

    @property
    def num_decoded_at_once(self) -> int:
        """How many payloads the GPU decodes at once; 0 where blocks are decoded as they are read."""
        return self.decoding.blocks_decoded_at_once(self.slots) if self.decoding else 0

    def unpin(self, slots: Iterable[int]) -> None:
        """Lower the reference counts of slots, and wake threads that wait for room. The caller holds the lock."""
        assert self._changed.is_owned()
        slots = list(slots)
        for slot in reversed(slots) if self.coded else ():  # a chain goes from its end
            if slot in self.coded and self.index.slots.reference_count(slot) == 1:
                self.enter(slot, DONE)  # its holder leaves it
        self.index.unpin(slots)
        self._changed.notify_all()

    def unpin_after(self, copied: Ready, slots: Sequence[int]) -> None:
        """Lower the reference counts of slots once a copy has ended; the caller holds the lock."""
        assert self._changed.is_owned()
        if copied.is_done():
            self.unpin(slots)
        else:
            self._in_flight.append((copied, list(slots)))

    def reap(self) -> None:
        """Unpin the slots of copies that have ended; the caller holds the lock."""
        assert self._changed.is_owned()
        while self._in_flight and self._in_flight[0][0].is_done():
            self.unpin(self._in_flight.popleft()[1])

    def tier_stats(self) -> TierStats:
        """Return the numbers of the warm tier; the caller holds the lock."""
        assert self._changed.is_owned()
        blocks, size = len(self.index), self.layout.block_bytes
        return TierStats(
            blocks=blocks,
            used_bytes=blocks * size,
            stored_bytes=blocks * size,
            capacity_bytes=len(self.slots) * size,
            evictions=self.index.num_evicted,
        )

    def close_readers(self) -> None:
        """End the reader processes; threads read what is still wanted. Bounded. May be called twice."""
        if self.readers:
            self.readers.close()

    def close(self) -> None:
        """End copies, threads and reader processes, and free the memory."""
        self.read_threads.shutdown()
        self.threads.shutdown()
        self.close_readers()
        self.engines.close()
        with self._changed:
            self._in_flight.clear()
        self._pool.close()
