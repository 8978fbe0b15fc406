"""DaemonTiers: the warm and cold tiers that the daemon has, lent slot by slot, copied to and from directly.

The daemon's slab is mapped here, and registered with CUDA. What the socket carries is hashes, token ids and slot
numbers. Nothing in here raises at a request: without the daemon the blocks are misses, and a thread of its own
looks for it again.

The daemon takes back what it lent when the connection ends. So a connection that has failed is closed only after
the last copy from or to a lent slot has ended: until then nobody else can get that slot.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from tierkv.daemon.messages import (
    Count,
    Done,
    Evict,
    EvictBlocks,
    EvictedBlocks,
    Flush,
    LoadState,
    Pin,
    Prefetch,
    Saved,
    SaveState,
    Status,
    StatusReport,
)
from tierkv.errors import DaemonError
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.daemon_connection import LinkKeeper
from tierkv.transfer.daemon_evictions import RemoteEvictions
from tierkv.transfer.daemon_reader import RemoteReader
from tierkv.transfer.daemon_writer import RemoteWriter
from tierkv.transfer.lookup import Hit
from tierkv.transfer.single_flight import SingleFlight
from tierkv.transfer.tiers import Job, Place, Tiers
from tierkv.values.block import HashFunction, Tier, iter_chain
from tierkv.values.namespace import Namespace
from tierkv.values.stats import TierStats

__all__ = ["DaemonTiers"]

_log = logging.getLogger(__name__)

_WARM_TIMEOUT_S = 30.0  # of pin and evict, which may have to wait for the store
_UPKEEP_TIMEOUT_S = 600.0  # of flush, save and load, which write to disks


class DaemonTiers:
    """The daemon's tiers as one cache sees them. Thread-safe; satisfies `LowerTiers`.

    keeper, flight, reader: the connection, who computes what nobody has, and what requests find and borrow.
    wait_s: how long a request waits for blocks that another process is computing. timeout_s: of short calls.
    Raises DaemonError if the daemon refuses this namespace or speaks another version; one that cannot be reached is
    no error: it is looked for in the background.
    """

    def __init__(
        self,
        tiers: Tiers,
        *,
        path: Path,
        namespace: Namespace,
        block_size: int,
        hash_function: HashFunction,
        wait_s: float,
        timeout_s: float,
        min_partial_tokens: int,
    ) -> None:
        self._tiers = tiers
        self._namespace = namespace
        self._block_size = block_size
        self._hash = hash_function
        self.keeper = LinkKeeper(tiers, path=path, namespace=namespace, timeout_s=timeout_s)
        self.flight = SingleFlight(self.keeper, wait_s=wait_s)
        self.reader = RemoteReader(
            tiers,
            self.keeper,
            self.flight,
            block_size=block_size,
            min_partial_tokens=min_partial_tokens,
            hash_function=hash_function,
        )
        self._writer = RemoteWriter(tiers, self.keeper)
        self.evictions = RemoteEvictions(tiers, self.keeper)
        self.keeper.maintain = self._tend

    def read(self, hits: Sequence[Hit]) -> tuple[list[Place], MissReason | None]:
        """Have cold hits, neighbours of one lookup, brought into the warm tier, and borrow them there."""
        return self.reader.read(hits)

    def write(self, jobs: Sequence[Job]) -> None:
        """Write blocks down, with those ancestors that the daemon has lost or never had."""
        self._writer.write(jobs)

    def close(self) -> None:
        """End the connection when copies in flight have ended. May be called twice."""
        self.keeper.close()

    def set_pinned(self, token_bytes: bytes, pinned: bool) -> int:
        """Pin or unpin a prompt's blocks there. Raises DaemonError if the tenant's share is used up."""
        hashes, tokens = self._chain(token_bytes)
        return self.keeper.call(
            Pin(hashes=hashes, tokens=tokens, pinned=pinned), Count, timeout_s=_WARM_TIMEOUT_S
        ).count

    def prefetch(self, token_bytes: bytes) -> int:
        """Announce a prompt. Return how many blocks the daemon will look for; 0 if it cannot."""
        hashes, tokens = self._chain(token_bytes)
        try:
            return self.keeper.call(Prefetch(hashes=hashes, tokens=tokens), Count).count
        except DaemonError:
            return 0

    def evict(self, count: int | None) -> int:
        """Evict blocks of this namespace from the warm tier. Raises DaemonError."""
        return self.keeper.call(Evict(count=-1 if count is None else count), Count, timeout_s=_WARM_TIMEOUT_S).count

    def evict_everywhere(self, token_bytes: bytes, older_than_s: float | None) -> EvictedBlocks:
        """Evict a prompt's blocks, or all of this namespace, from every tier of the daemon and of its other clients.

        Raises DaemonError.
        """
        hashes, tokens = self._chain(token_bytes)
        message = EvictBlocks(
            namespace=self._namespace.digest,
            hashes=hashes,
            tokens=tokens,
            older_than_s=-1.0 if older_than_s is None else older_than_s,
        )
        return self.keeper.call_long(message, EvictedBlocks, timeout_s=_UPKEEP_TIMEOUT_S)

    def flush(self) -> None:
        """Wait until everything written down is on the disk; without the daemon there is nothing to wait for."""
        try:
            self.keeper.call_long(Flush(), Done, timeout_s=_UPKEEP_TIMEOUT_S)
        except DaemonError as exc:
            _log.warning("not flushed: %s", exc)

    def save(self, path: Path) -> Saved:
        """Have the namespace's blocks written into a state file. Raises DaemonError."""
        return self.keeper.call_long(SaveState(path=os.fspath(path.absolute())), Saved, timeout_s=_UPKEEP_TIMEOUT_S)

    def load(self, path: Path) -> int:
        """Have a state file's blocks found from now on. Raises DaemonError."""
        return self.keeper.call_long(
            LoadState(path=os.fspath(path.absolute())), Count, timeout_s=_UPKEEP_TIMEOUT_S
        ).count

    def sizes(self) -> dict[Tier, TierStats]:
        """Return the sizes of the daemon's tiers; of the warm one, what this namespace has of it."""
        try:
            report = self.keeper.call(Status(), StatusReport)
        except DaemonError:
            return {Tier.WARM: TierStats(), **({Tier.COLD: TierStats()} if self.keeper.has_cold else {})}
        mine = [tenant for tenant in report.tenants if tenant.namespace == self._namespace.digest.hex()]
        blocks = sum(tenant.warm_blocks for tenant in mine)
        used = blocks * self._tiers.layout.block_bytes
        warm = TierStats(blocks=blocks, used_bytes=used, stored_bytes=used, capacity_bytes=report.warm_bytes)
        if not report.cold:
            return {Tier.WARM: warm}
        cold = TierStats(
            blocks=report.cold["blocks"],
            stored_bytes=report.cold["live_bytes"],
            capacity_bytes=report.cold["quota_bytes"],
        )
        return {Tier.WARM: warm, Tier.COLD: cold}

    def _tend(self) -> None:
        self.evictions.catch_up()
        self.evictions.retry()

    def _chain(self, token_bytes: bytes) -> tuple[bytes, bytes]:
        chain = iter_chain(self._tiers.index.root, token_bytes, self._block_size, self._hash)
        return b"".join(block_hash for block_hash, _ in chain), token_bytes
