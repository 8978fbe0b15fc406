"""Evictor: evicts blocks on demand from the warm tier, the store, and the hot tiers of connected engines."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from tierkv.daemon.core import Core
from tierkv.daemon.eviction_log import EvictionLog
from tierkv.daemon.eviction_messages import EngineEvicted, EvictBlocks, EvictedBlocks, Eviction, EvictionNotice
from tierkv.daemon.messages import Message
from tierkv.daemon.protocol import ProtocolError, split_hashes
from tierkv.daemon.state_files import LoadedFile
from tierkv.daemon.store_writer import StoreWriter
from tierkv.daemon.values import Connection
from tierkv.errors import DaemonError
from tierkv.index.chosen_eviction import IN_USE, Choice
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_eviction import EvictionReport, StoredPrompt
from tierkv.storage.cold_notes import ColdStats
from tierkv.values.block import HASH_BYTES, TOKEN_BYTES, BlockHash, Tier
from tierkv.values.log_event import LogEvent

__all__ = ["Engine", "Evictor"]

_log = logging.getLogger(__name__)

_ENGINES_S = 2.0  # for all engines together to report what they have dropped
_STORE_S = 540.0  # of one eviction from the store, once it has begun; the client waits 600
_POLL_S = 0.05


class Engine(Protocol):
    """One connected client."""

    connection: Connection

    def push(self, message: Message) -> None:
        """Send a message that is no answer."""


class Evictor:
    """Evicts blocks on demand. Used on the loop. engines: those connected now. stall_s: for the store to begin."""

    def __init__(
        self,
        core: Core,
        store: ColdStore | None,
        writer: StoreWriter,
        log: EvictionLog,
        *,
        engines: Callable[[], Iterable[Engine]],
        stall_s: float,
    ) -> None:
        self.log = log
        self._core = core
        self._store = store
        self._writer = writer
        self._engines = engines
        self._stall_s = stall_s

    async def evict(self, asker: Connection, message: EvictBlocks) -> EvictedBlocks:
        """Evict matching blocks from every tier; return what was evicted and what stayed.

        First from the warm tier, so that no engine loads such a block again; then from the store, after what is queued
        for it; then from the engines; at last what the engines have written again meanwhile.
        """
        _check(message)
        is_all = message.to_bytes == 0
        has_filter = bool(message.namespace or message.tokens or message.older_than_s >= 0)
        namespace = b"" if is_all else message.namespace
        choice: Choice | None = None
        if is_all:
            choice = Choice()
        elif has_filter:
            now = self._core.clock()
            since = now - message.older_than_s if message.older_than_s >= 0 else None
            choice = Choice(tokens=message.tokens, unused_since=since)
        warm = self._core.evict_chosen(namespace, choice).blocks[Tier.WARM] if choice else 0
        report, stats = await self._evict_stored(message)
        by_size: Sequence[BlockHash] = ()
        if message.to_bytes > 0:
            by_size = report.hashes if self._store else list(self._core.tenants.least_recent(message.to_bytes))
            warm += self._core.evict_chosen(b"", Choice(hashes=frozenset(by_size))).blocks[Tier.WARM]
        now_s = time.time()
        if choice:
            tokens, older_than_s = (b"", -1.0) if is_all else (message.tokens, message.older_than_s)
            self.log.add(Eviction(0, now_s, namespace, tokens, older_than_s))
        if by_size:
            self.log.add(Eviction(0, now_s, block_hashes=b"".join(by_size)))
        engines = await self._notify_engines(asker, namespace)
        stayed = {}
        cold, freed = report.blocks, report.freed_bytes
        if choice:
            again = self._core.evict_chosen(namespace, choice)
            warm += again.blocks[Tier.WARM]
            if again.blocks[Tier.WARM]:
                more, stats = await self._evict_stored(message)
                cold, freed = cold + more.blocks, freed + more.freed_bytes
            stayed = {f"warm, {reason}": count for reason, count in again.stayed.items() if reason != IN_USE}
            stayed |= self._core.count_marked()
        stayed |= _kept_in_store(report) | self._count_files(namespace)
        live = stats.live_bytes if stats else self._core.slab.size_bytes - self._core.slab.free_bytes
        left = stats.blocks if stats else sum(tenant.warm_blocks for tenant in self._core.tenants.by_digest.values())
        what = "everything" if is_all else namespace.hex()[:12] or "all namespaces"
        _log.info(
            LogEvent(
                "evicted on demand",
                client=asker.client,
                namespace=what,
                warm_blocks=warm,
                cold_blocks=cold,
                bytes=freed,
            )
        )
        return EvictedBlocks(warm, cold, freed, left, live, {k: v for k, v in stayed.items() if v}, engines)

    async def _evict_stored(self, message: EvictBlocks) -> tuple[EvictionReport, ColdStats | None]:
        if self._store is None:
            return EvictionReport(blocks=0, freed_bytes=0), None
        began: list[float] = []

        def act(store: ColdStore) -> tuple[EvictionReport, ColdStats]:
            began.append(time.monotonic())
            prompt = None
            if message.tokens:
                prompt = StoredPrompt(message.namespace, split_hashes(message.hashes), message.tokens)
            report = store.evict(
                to_bytes=message.to_bytes if message.to_bytes >= 0 else None,
                namespace=message.namespace or None,
                older_than_s=message.older_than_s if message.older_than_s >= 0 else None,
                prompt=prompt,
            )
            self.log.save()
            return report, store.stats()

        asked_at = time.monotonic()
        evicting = asyncio.wrap_future(self._writer.call(act))
        while not evicting.done():
            await asyncio.wait({evicting}, timeout=_POLL_S)
            waited = time.monotonic() - (began[0] if began else asked_at)
            if not evicting.done() and waited > (_STORE_S if began else self._stall_s):
                evicting.add_done_callback(lambda late: late.cancelled() or late.exception())
                raise DaemonError(
                    f"nothing was written to the store for {waited:.0f} s: its disk does not answer",
                    hint="blocks were evicted from memory alone; try again",
                )
        return evicting.result()

    async def _notify_engines(self, asker: Connection, namespace: BlockHash) -> list[EngineEvicted]:
        """Have engines drop their hot copies; return the report of each, or that it has not answered in time."""
        await asyncio.get_running_loop().run_in_executor(None, self.log.save)
        number = self.log.number
        notified = [
            engine
            for engine in self._engines()
            if (tenant := engine.connection.tenant)
            and engine.connection is not asker
            and namespace in (b"", tenant.digest)
        ]
        for engine in notified:
            engine.push(EvictionNotice(number))
        asking = [engine.connection for engine in notified if engine.connection.asks_for_evictions]
        deadline = time.monotonic() + _ENGINES_S
        while time.monotonic() < deadline and any(not (c.is_closed or _has_applied(c, number)) for c in asking):
            await asyncio.sleep(_POLL_S / 5)
        found = []
        for engine in notified:
            connection = engine.connection
            if connection.is_closed:
                continue
            if _has_applied(connection, number) and connection.evicted:
                found.append(connection.evicted)
            else:
                found.append(EngineEvicted(connection.client, False))
        return found

    def _count_files(self, namespace: BlockHash) -> dict[str, int]:
        files = {
            source
            for tenant in self._core.tenants.by_digest.values()
            if namespace in (b"", tenant.digest)
            for source in tenant.sources
            if isinstance(source, LoadedFile)
        }
        return {"blocks of state files that clients have loaded": sum(len(file) for file in files)}


def _has_applied(connection: Connection, number: int) -> bool:
    return connection.evicted_number >= number


def _kept_in_store(report: EvictionReport) -> dict[str, int]:
    return {
        "stored, pinned": report.num_pinned,
        "stored, continued by others that stay": report.num_continued,
    }


def _check(message: EvictBlocks) -> None:
    if message.namespace and len(message.namespace) != HASH_BYTES:
        raise ProtocolError(f"a namespace has {HASH_BYTES} bytes, not {len(message.namespace)}")
    if message.tokens and (not message.namespace or len(message.tokens) % TOKEN_BYTES):
        raise ProtocolError("a prompt is whole token ids of a namespace")
    if not math.isfinite(message.older_than_s):
        raise ProtocolError(f"an age of {message.older_than_s} s")
    split_hashes(message.hashes)
    if not (message.namespace or message.older_than_s >= 0 or message.to_bytes >= 0):
        raise ProtocolError("an eviction needs a namespace, an age or a size")
