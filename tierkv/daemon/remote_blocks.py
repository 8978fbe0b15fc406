"""RemoteBlocks: what remote tiers have of the prompts that clients ask for. All engines of a host share them."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from tierkv.daemon.core import Core
from tierkv.daemon.messages import Match
from tierkv.daemon.values import Connection, Tenant, is_in_some, parent_hash, whole_hashes
from tierkv.remote_tiers.remotes import Remotes
from tierkv.remote_tiers.source import RemoteSource
from tierkv.values.events import BlockName

__all__ = ["RemoteBlocks"]

_NUM_THREADS = 8
_LOOK_S = 1.0  # a client waits two seconds for an answer


class RemoteBlocks:
    """Asks remote tiers for the daemon. Used on the loop; calls to the network run on threads of their own.

    threads: also for reads, so that a slow network keeps no thread from the disk.
    """

    def __init__(self, core: Core, remotes: Remotes) -> None:
        self.remotes = remotes
        self.threads = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="tierkv-remote")
        self._core = core

    async def look_before(self, connection: Connection, message: Match) -> None:
        """Ask for the blocks that a match will not find on this machine, if there are any. Raises ProtocolError."""
        tenant = connection.require_tenant()
        if tenant.remote is None or not tenant.remote.may_answer(1):
            return
        hashes = whole_hashes(tenant, message.hashes, message.tokens, most=self._core.limits.blocks_of_message)
        await self.look(tenant, hashes, message.tokens)

    async def look(self, tenant: Tenant, hashes: Sequence[bytes], tokens: bytes) -> None:
        """Ask for the blocks of a prompt that are missing here; return without an answer after a second.

        tokens: the prompt's token ids, perhaps more than those of the whole blocks that `hashes` name.
        """
        remote = tenant.remote
        if remote is None:
            return
        step = tenant.step
        whole = tokens[: len(hashes) * step]
        known = self._core.tenants.walk(tenant, hashes, whole)
        first = 0
        for at, block_hash in enumerate(hashes):
            entry = known[at] if at < len(known) else None
            is_warm = entry is not None and entry.warm_slot is not None
            parent = parent_hash(tenant, hashes, at)
            if not (is_warm or is_in_some(tenant.sources, block_hash, parent, tenant.layout.block_size)[0]):
                break
            first = at + 1
        if not remote.may_answer(len(hashes) - first):
            return
        chain = [
            BlockName(hashes[at], parent_hash(tenant, hashes, at), whole[at * step : (at + 1) * step])
            for at in range(first, len(hashes))
        ]
        await self._find(remote, chain, first)

    def touch(self, tenant: Tenant, hashes: Sequence[bytes]) -> None:
        """Have remote tiers keep a prompt's blocks longer."""
        if tenant.remote is not None:
            tenant.remote.touch(hashes)

    def counters(self) -> dict[str, int]:
        """Return the counters of all remote tiers together, and how many of them are up."""
        counters: Counter[str] = Counter()
        for stats in self.remotes.stats():
            counters.update({f"remote_{name}": count for name, count in stats.counters.items()})
            counters["remotes_up"] += stats.is_up
        return dict(counters)

    def close(self) -> None:
        """Let the threads end. Their calls have deadlines."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    async def _find(self, remote: RemoteSource, chain: Sequence[BlockName], first: int) -> None:
        loop = asyncio.get_running_loop()
        finding = loop.run_in_executor(self.threads, partial(remote.find, chain, first=first))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(finding), _LOOK_S)
