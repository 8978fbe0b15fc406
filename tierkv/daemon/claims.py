"""Claims: which connection computes which of the blocks that no tier has."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

from tierkv.daemon.limits import Limits
from tierkv.daemon.values import Claim, Connection, Tenant
from tierkv.values.block import BlockHash

__all__ = ["Claims"]


class Claims:
    """A claim ends when its blocks are published, when its connection ends or ends it, or when it expires.

    news: hashes of blocks that were published, or that no client computes any more. The server empties it.
    num_blocks: blocks of all claims.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float]) -> None:
        self.news: list[BlockHash] = []
        self.num_blocks: int = 0
        self._limits = limits
        self._clock = clock
        self._numbers = itertools.count(1)

    def is_computing(self, connection: Connection, block_hash: BlockHash) -> bool:
        """Return whether another connection has claimed this block and has not published it yet."""
        claim = connection.require_tenant().claims.get(block_hash)
        return claim is not None and claim.connection is not connection and claim.expires_at > self._clock()

    def claim(self, connection: Connection, missing: Sequence[BlockHash]) -> tuple[int, bool]:
        """Claim missing blocks; return (claim, whether another connection computes the first of them).

        The claim is 0 where none was given. A connection with a claim never waits for another one. Blocks beyond the
        limits are not claimed.
        """
        if self.is_computing(connection, missing[0]) and not connection.claims:
            return 0, True
        tenant, now = connection.require_tenant(), self._clock()
        room = self._limits.claimed_blocks_of_client - connection.num_claimed
        room = min(room, self._limits.claimed_blocks - self.num_blocks)
        free: set[BlockHash] = set()
        for block_hash in missing:
            if len(free) >= room:
                break
            other = tenant.claims.get(block_hash)
            if other is None or other.expires_at <= now:
                free.add(block_hash)
        if not free:
            return 0, False
        claim = Claim(next(self._numbers), connection, free, now + self._limits.claim_s)
        for block_hash in free:
            if (old := tenant.claims.get(block_hash)) is not None:
                self._remove(tenant, old, block_hash)
            tenant.claims[block_hash] = claim
        connection.claims[claim.number] = claim
        connection.num_claimed += len(free)
        self.num_blocks += len(free)
        return claim.number, False

    def fulfil(self, tenant: Tenant, block_hash: BlockHash) -> None:
        """Note that a block was published: its claim has one block less, and more time for the others."""
        claim = tenant.claims.get(block_hash)
        if claim:
            self._remove(tenant, claim, block_hash)
            if claim.hashes:
                claim.expires_at = self._clock() + self._limits.claim_s
                held = claim.connection.claims
                held[claim.number] = held.pop(claim.number)  # the claim that expires first stays in front
        self.news.append(block_hash)

    def end(self, connection: Connection, number: int) -> None:
        """End a claim. A claim that has ended already is no error."""
        claim = connection.claims.get(number)
        tenant = connection.tenant
        if claim is None or tenant is None:
            return
        for block_hash in list(claim.hashes):
            self._remove(tenant, claim, block_hash)
            self.news.append(block_hash)

    def end_expired(self, connections: Iterable[Connection]) -> None:
        """End the claims of which no block was published for too long."""
        now = self._clock()
        for connection in connections:
            while connection.claims and (first := next(iter(connection.claims.values()))).expires_at <= now:
                self.end(connection, first.number)

    def check(self, tenants: Iterable[Tenant], connections: set[Connection]) -> None:
        """Raise AssertionError unless all claims are those of these tenants and connections, and are counted."""
        num_blocks = 0
        for tenant in tenants:
            num_blocks += len(tenant.claims)
            for block_hash, claim in tenant.claims.items():
                assert block_hash in claim.hashes and claim.connection.claims.get(claim.number) is claim
                assert claim.connection in connections and claim.connection.tenant is tenant
        for connection in connections:
            assert connection.num_claimed == sum(len(claim.hashes) for claim in connection.claims.values())
        assert self.num_blocks == num_blocks == sum(connection.num_claimed for connection in connections)

    def _remove(self, tenant: Tenant, claim: Claim, block_hash: BlockHash) -> None:
        """Remove a block from its claim. A claim ends with its last block."""
        del tenant.claims[block_hash]
        claim.hashes.discard(block_hash)
        claim.connection.num_claimed -= 1
        self.num_blocks -= 1
        if not claim.hashes:
            del claim.connection.claims[claim.number]
