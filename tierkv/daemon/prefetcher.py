"""Prefetcher: brings announced prompts into the warm tier, one after the other, before their requests come."""

from __future__ import annotations

import asyncio

from tierkv.daemon.core import Core, Tenant
from tierkv.daemon.loader import Loader

__all__ = ["Prefetcher"]

_MAX_PROMPTS = 1024


class Prefetcher:
    """A bounded queue of prompts, and who works it off. Used on the loop alone."""

    def __init__(self, core: Core, loader: Loader) -> None:
        self._core = core
        self._loader = loader
        self._prompts: asyncio.Queue[tuple[Tenant, list[bytes], bytes]] = asyncio.Queue(_MAX_PROMPTS)

    def offer(self, tenant: Tenant, hashes: list[bytes], tokens: bytes) -> bool:
        """Queue a prompt: the hashes of its whole blocks, and its token ids. False if the queue is full."""
        try:
            self._prompts.put_nowait((tenant, hashes, tokens))
        except asyncio.QueueFull:
            return False
        return True

    async def run(self) -> None:
        """Work off the queue until cancelled."""
        while True:
            tenant, hashes, tokens = await self._prompts.get()
            for task in self._core.begin_prefetches(tenant, hashes, tokens):
                await self._loader.load(task)
                self._core.end_fetch(None, task)
                self._core.counters["prefetched_blocks"] += sum(load.reason is None for load in task.fresh)
                if task.miss:
                    break
