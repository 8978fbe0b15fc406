"""The content digests of the entries of one tree, of which only some are kept."""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.index.entry import Entry
from tierkv.index.entry_table import EntryTable
from tierkv.values.block import BlockHash, ContentDigest, chain_content_digest

__all__ = ["ContentDigests"]

_KEPT_EVERY = 16


class ContentDigests:
    """Computes the content digests of one tree's entries.

    Every 16th digest of a chain is kept : all of them would add a fifth to the memory of an entry.
    The newest is kept too, so that to digest a chain block by block costs one sha256 a block.
    root_digest: the namespace digest. entries: the index's table, which this reads only.
    """

    def __init__(self, root_entry: Entry, root_digest: ContentDigest, entries: EntryTable) -> None:
        self._entries = entries
        self._root = (root_entry, root_digest)
        self._newest = self._root
        self._kept: dict[BlockHash, ContentDigest] = {}  # by hash, since no garbage collection visits bytes

    def of(self, entry: Entry) -> ContentDigest:
        """Return an entry's content digest, computed from the nearest kept one above it."""
        chain: list[Entry] = []
        newest, content_digest = self._newest
        root_entry, root_digest = self._root
        at = entry
        while at is not newest:
            if at is root_entry:
                content_digest = root_digest
                break
            if self._may_keep(at) and (kept := self._kept.get(at.block_hash)):
                content_digest = kept
                break
            chain.append(at)
            at = at.parent
        for each in reversed(chain):
            content_digest = chain_content_digest(content_digest, each.token_bytes)
            self.keep(each, content_digest)
        return content_digest

    def keep(self, entry: Entry, content_digest: ContentDigest) -> None:
        """Keep a computed digest as the newest, and as a 16th one if its entry is in the index."""
        self._newest = entry, content_digest
        if self._may_keep(entry):
            self._kept[entry.block_hash] = content_digest

    def forget_all(self, entries: Sequence[Entry]) -> None:
        """Drop the digests of entries that leave the index."""
        for entry in entries:
            if entry.depth % _KEPT_EVERY == _KEPT_EVERY - 1:
                self._kept.pop(entry.block_hash, None)

    def _may_keep(self, entry: Entry) -> bool:
        """Return whether an entry is a 16th one and in the index; a later block may have the hash of one that left."""
        return entry.depth % _KEPT_EVERY == _KEPT_EVERY - 1 and self._entries.get(entry.block_hash) is entry

    def check(self) -> None:
        """Raise AssertionError unless each kept digest is right and its entry is in the index."""
        root_entry, root_digest = self._root
        for block_hash, kept in self._kept.items():
            chain: list[Entry] = []
            at = self._entries.get(block_hash)
            assert at is not None, "a content digest outlived its entry"
            while at is not root_entry:
                chain.append(at)
                at = at.parent
            computed = root_digest
            for each in reversed(chain):
                computed = chain_content_digest(computed, each.token_bytes)
            assert computed == kept, "a content digest is not that of its chain"
