"""Sealer: says of blocks in the daemon's index who they are, their content digests included."""

from __future__ import annotations

from tierkv.daemon.values import Tenant
from tierkv.index.index import Entry
from tierkv.storage.record import BlockInfo
from tierkv.values.block import ContentDigest, chain_content_digest

__all__ = ["Sealer"]


class Sealer:
    """Makes content digests of the token ids of a block's chain, the namespace first.

    A block that follows the one sealed before costs one digest; any other, one for each block before it. Not
    thread-safe: whoever content digests has one of his own.
    """

    def __init__(self) -> None:
        self._newest: tuple[Entry, ContentDigest] | None = None

    def identify(self, tenant: Tenant, entry: Entry) -> BlockInfo:
        """Return the identity of a block of this namespace, for reading or storing it."""
        return BlockInfo(
            block_hash=entry.block_hash,
            parent=entry.parent_hash if entry.depth > 1 else tenant.digest,  # the root's own hash is the daemon's
            namespace=tenant.digest,
            content_digest=self._content_digest_of(tenant, entry),
            token_bytes=entry.token_bytes,
        )

    def _content_digest_of(self, tenant: Tenant, entry: Entry) -> ContentDigest:
        newest, newest_content_digest = self._newest or (None, tenant.digest)
        chain: list[Entry] = []
        at = entry
        while at.depth > 0 and at is not newest:
            chain.append(at)
            at = at.parent
        content_digest = newest_content_digest if at is newest else tenant.digest
        for each in reversed(chain):
            content_digest = chain_content_digest(content_digest, each.token_bytes)
        self._newest = entry, content_digest
        return content_digest
