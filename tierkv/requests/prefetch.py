"""Prefetcher: reads announced prompts from the cold tier into the warm one, at a lower priority than requests."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from tierkv.background.handle import Handle
from tierkv.background.work_queue import Priority, QueueEntry, WorkQueue
from tierkv.errors import CapacityError
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.cold_reading import ColdReading
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.lookup import Hit
from tierkv.transfer.remote_lookup import find_everywhere
from tierkv.transfer.tiers import Place, Tiers
from tierkv.values.block import TOKEN_BYTES, Tier
from tierkv.values.events import EventKind

__all__ = ["PrefetchHandle", "Prefetcher"]

_log = logging.getLogger(__name__)

_MAX_PROMPTS = 1024
_SHARE = 4  # a wave takes at most one raw place in four: a request that needs some must find them


class PrefetchHandle(Handle[int]):
    """One announced prompt. `result()` is how many blocks were read into the warm tier; it raises nothing.

    With a daemon: how many blocks it will look for, known at once. To cancel it drops what no thread reads yet.

    >>> cache.prefetch(token_ids).result()  # nothing to do: the blocks are in memory
    0
    """


class _Prompt(NamedTuple):
    token_bytes: bytes
    handle: PrefetchHandle


class Prefetcher:
    """A bounded queue of prompts, and one thread that works it off, started with the first.

    Blocks are read by the cache's own threads, at a priority below that of requests, a few at a time.
    """

    def __init__(self, tiers: Tiers, reading: ColdReading, daemon: DaemonTiers | None) -> None:
        self._tiers = tiers
        self._reading = reading
        self._daemon = daemon
        self._queue: WorkQueue[_Prompt] = WorkQueue(max_entries=_MAX_PROMPTS)
        self._is_closing = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def submit(self, token_bytes: bytes) -> PrefetchHandle:
        """Queue a prompt; returns at once. A full queue drops it, which is counted. Raises ClosedError once closed."""
        handle = PrefetchHandle()
        if self._daemon:
            handle.succeed(self._daemon.prefetch(token_bytes))
            return handle
        try:
            with self._starting:
                entry = self._queue.put(_Prompt(token_bytes, handle), Priority.PREFETCH, timeout_s=0)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._work, name="tierkv-prefetch", daemon=True)
                    self._thread.start()
        except CapacityError:
            self._count(MissReason.NO_ROOM)
            handle.succeed(0)
            return handle
        handle.on_cancel(partial(self._drop, entry))
        return handle

    def close(self) -> None:
        """Drop the queued prompts; reads that have begun end. May be called twice."""
        self._is_closing.set()
        with self._starting:  # a thread that starts later would outlive this
            self._queue.close()
        if self._thread:
            self._thread.join()

    def _drop(self, entry: QueueEntry[_Prompt]) -> None:
        if self._queue.cancel(entry):
            entry.item.handle.succeed(0)

    def _work(self) -> None:
        while entry := self._queue.take():
            prompt = entry.item
            num_blocks = 0
            try:
                with self._tiers.span("prefetch") as detail:
                    detail["blocks"] = num_blocks = self._load(prompt)
            except Exception:  # noqa: BLE001 - the outermost loop of its thread
                _log.exception("a prompt was not prefetched")
                self._count(MissReason.IO_ERROR)
            prompt.handle.succeed(num_blocks)
            del entry, prompt

    def _load(self, prompt: _Prompt) -> int:
        """Read a prompt's cold blocks, wave by wave, until one cannot be had. Return how many were read."""
        tiers = self._tiers
        found = find_everywhere(tiers, prompt.token_bytes, len(prompt.token_bytes) // TOKEN_BYTES)
        most = tiers.index.warm.capacity // 2  # more would evict the first ones
        hits = [hit for hit in found.rest() if hit.tier is Tier.COLD][:most]
        if found.miss is MissReason.IO_ERROR:
            self._count(found.miss)
        size = max(1, min(tiers.memory.read_threads.num_threads, len(tiers.memory.raw.slots) // _SHARE))
        num_blocks = 0
        for start in range(0, len(hits), size):
            if prompt.handle.is_cancelled or self._is_closing.is_set():
                break
            wave = hits[start : start + size]
            num_good = self._load_wave(wave)
            num_blocks += num_good
            if num_good < len(wave):
                break
        return num_blocks

    def _load_wave(self, wave: Sequence[Hit]) -> int:
        """Read blocks at once and enter the leading good ones. Return how many those are."""
        tiers = self._tiers
        places = tiers.try_take_raw(len(wave))
        held = list(places)
        try:
            slots = [place.slot for place in places]
            if tiers.memory.compression:
                slots = tiers.try_take_warm(len(places))
                held += [Place(Tier.WARM, slot) for slot in slots]
            outcomes = tiers.memory.read_threads.map(Priority.PREFETCH, self._read, wave, places, slots)
            for num_good, (hit, slot, reason) in enumerate(zip(wave, slots, outcomes, strict=False)):
                reason = reason or self._enter(hit, slot)
                if reason:
                    self._count(reason)
                    return num_good
        finally:
            tiers.unpin(held)
        if len(outcomes) < len(wave):
            self._count(MissReason.NO_ROOM)
        return len(outcomes)

    def _read(self, hit: Hit, place: Place, slot: int) -> MissReason | None:
        """Read a block into its raw place, and from there into its slot if the warm tier is compressed."""
        tiers = self._tiers
        outcome = self._reading.read_one(hit, place, may_stay_coded=False)
        if isinstance(outcome, MissReason):
            self._reading.fail(hit, outcome)
            return outcome
        if not tiers.memory.compression:
            return None
        num_tokens = len(hit.token_bytes) // TOKEN_BYTES
        block, target = tiers.memory.raw.slots[place.slot], tiers.memory.warm.slots[slot]
        fits = tiers.memory.compression.form.compress(block, target, num_tokens=num_tokens)
        return None if fits else MissReason.NO_ROOM

    def _enter(self, hit: Hit, slot: int) -> MissReason | None:
        """Let a block be found where it lies now. Return why it cannot be."""
        tiers = self._tiers
        with tiers.changed:
            entry = tiers.insert(hit)
            if entry is None:  # its hash is taken by now, or its parent has been evicted
                return MissReason.COLLISION
            entry.in_cold = True
            tiers.stats.bytes_out[Tier.COLD] += tiers.layout.token_bytes * (len(hit.token_bytes) // TOKEN_BYTES)
            if entry.warm_slot is None:
                tiers.attach(entry, Tier.WARM, slot, EventKind.PROMOTE)
                tiers.stats.prefetched_blocks += 1
        return None

    def _count(self, reason: MissReason) -> None:
        with self._tiers.changed:
            self._tiers.stats.prefetch_misses[reason.value] += 1
