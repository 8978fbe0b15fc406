"""The blocks below the warm memory: where they lie, and reads of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tierkv.block_store.keys import BlockKey
from tierkv.block_store.load_or_compute import Origin
from tierkv.errors import StoreError
from tierkv.readers.pool import ReaderPool
from tierkv.remote_tiers.source import RemoteSource
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.values.block import TOKEN_BYTES, BlockHash
from tierkv.values.layout import BlockLayout

__all__ = ["StoredBlocks", "info_of"]

_log = logging.getLogger(__name__)

_LOOKUP_BLOCKS = 64
_LOOKED_AT = 8  # of a prompt's blocks, to say where they lie: some of an older prompt may have left the page cache


def info_of(key: BlockKey, root: BlockHash) -> BlockInfo:
    """Return the identity of a key's block in the store."""
    return BlockInfo(
        block_hash=key.block_hash,
        parent=key.parent_hash,
        namespace=root,
        content_digest=key.content_digest,
        token_bytes=key.token_bytes,
    )


class StoredBlocks:
    """The blocks below the warm memory: in a store on disk, then in remote tiers. Each of them may be missing."""

    def __init__(self, cold: ColdStore | None, remote: RemoteSource | None) -> None:
        self.cold = cold
        self.remote = remote

    def count(self, keys: Sequence[BlockKey]) -> int:
        """Return how many leading blocks are there. Waits for the network if the store lacks some of them."""
        found = 0
        while found < len(keys):
            before = found
            found += _count_cold(self.cold, keys[found:]) if self.cold else 0
            if found < len(keys) and self.remote and self.remote.may_answer(len(keys) - found):
                found += self.remote.find(keys[found:], first=found)
            if found == before or not (self.cold and self.remote):
                break
        return found

    def origin(self, keys: Sequence[BlockKey]) -> Origin:
        """Return where blocks lie that are not warm, judged by a few of them, the last among them; WARM for none."""
        if not keys or (self.cold is None and self.remote is None):
            return Origin.WARM
        looked_at = keys[:: -max(1, len(keys) // _LOOKED_AT)]
        if self.remote and any(self.is_remote(key) for key in looked_at):
            return Origin.REMOTE
        is_cached = self.cold is not None and all(self.cold.is_in_memory(key.block_hash) for key in looked_at)
        return Origin.PAGE_CACHE if is_cached else Origin.DISK

    def is_remote(self, key: BlockKey) -> bool:
        """Return whether a remote tier has a block, as far as is known, and the store does not."""
        if self.remote is None or self.remote.lookup(key.block_hash) is None:
            return False
        return self.cold is None or not _count_cold(self.cold, [key])

    def read_many_into(
        self,
        keys: Sequence[BlockKey],
        root: BlockHash,
        outs: Sequence[Bytes],
        *,
        layout: BlockLayout,
        coded: Sequence[CodedBlock | None] | None = None,
        decoders: ReaderPool | None = None,
    ) -> list[MissReason | None]:
        """Read blocks from the store, and what it lacks from remote tiers. Return None for each, or why not.

        coded, decoders: as `ColdStore.read_many_into` has them; what comes from a remote tier is decoded.
        """
        infos = [info_of(key, root) for key in keys]
        reasons: list[MissReason | None] = [MissReason.ABSENT] * len(keys)
        try:
            if self.cold:
                reasons = self.cold.read_many_into(infos, outs, layout=layout, coded=coded, decoders=decoders)
            if self.remote:
                for at, reason in enumerate(reasons):
                    if reason and self.remote.lookup(keys[at].block_hash):
                        reasons[at] = self.remote.read_into(infos[at], outs[at], layout=layout)
        except StoreError:
            return [MissReason.IO_ERROR] * len(keys)
        return reasons

    def read_ahead(self, keys: Sequence[BlockKey]) -> None:
        """Begin to fetch blocks from the disk."""
        if self.cold and keys:
            self.cold.read_ahead([key.block_hash for key in keys])

    def touch(self, keys: Sequence[BlockKey]) -> None:
        """Record a use of a prompt's leading blocks."""
        hashes = [key.block_hash for key in keys]
        if self.cold:
            self.cold.notes.touch(hashes)
        if self.remote:
            self.remote.touch(hashes)


def _count_cold(cold: ColdStore, keys: Sequence[BlockKey]) -> int:
    """Return how many leading blocks a store has, judged by its small records. A store that fails has none."""
    found = 0
    for start in range(0, len(keys), _LOOKUP_BLOCKS):
        some = keys[start : start + _LOOKUP_BLOCKS]
        try:
            entries = cold.lookup_many(key.block_hash for key in some)
        except StoreError as exc:
            _log.warning("a lookup failed and is a miss: %s", exc)
            return found
        for key, entry in zip(some, entries, strict=True):
            if entry is None or entry.parent != key.parent_hash:
                return found
            if entry.num_tokens * TOKEN_BYTES != len(key.token_bytes):
                return found
            found += 1
    return found
