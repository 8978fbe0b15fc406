"""Prefetcher: brings announced prompts into the warm tier, one after the other, before their requests come."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from dataclasses import dataclass

from tierkv.daemon.core import Core, Tenant
from tierkv.daemon.loader import Loader
from tierkv.daemon.messages import LimitStatus
from tierkv.daemon.protocol import split_hashes
from tierkv.daemon.usage import limit_status
from tierkv.values.block import HASH_BYTES, BlockHash

__all__ = ["Prefetcher"]

_log = logging.getLogger(__name__)

_PROMPT_BYTES = 512  # of the objects of one prompt


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
    """A bounded queue of prompts, and who works it off. Used on the loop alone.

    A prompt stays queued when the client that announced it goes: a command announces what others will ask.
    """

    def __init__(self, core: Core, loader: Loader) -> None:
        self._core = core
        self._loader = loader
        self._prompts: deque[_Prompt] = deque()
        self._bytes: Counter[BlockHash] = Counter()  # queued, by namespace
        self._has_work = asyncio.Event()

    def offer(self, tenant: Tenant, hashes: bytes, tokens: bytes) -> bool:
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
        """Work off the queue until cancelled. A prompt that fails is logged, and the next one follows."""
        while True:
            await self._has_work.wait()
            prompt = self._prompts.popleft()
            self._bytes[prompt.tenant.digest] -= prompt.num_bytes
            if not self._bytes[prompt.tenant.digest]:
                del self._bytes[prompt.tenant.digest]
            if not self._prompts:
                self._has_work.clear()
            try:
                await self._bring_up(prompt)
            except Exception:  # noqa: BLE001 - the outermost loop of its task: the next prompt is another one's
                _log.exception("an announced prompt of %d blocks failed", len(prompt.hashes) // HASH_BYTES)

    async def _bring_up(self, prompt: _Prompt) -> None:
        for task in self._core.loads.begin_prefetches(prompt.tenant, split_hashes(prompt.hashes), prompt.tokens):
            await self._loader.load(task)
            self._core.loads.end_fetch(None, task)
            self._core.counters["prefetched_blocks"] += sum(load.reason is None for load in task.fresh)
            if task.miss:
                break
