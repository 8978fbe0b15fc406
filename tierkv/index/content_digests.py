"""The content digests of entries: computed when asked for, kept for some."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

from tierkv.index.entry import Entry
from tierkv.values.block import BlockHash, ContentDigest, chain_content_digest

__all__ = ["KEPT_EVERY", "ContentDigests"]

KEPT_EVERY = 16


class ContentDigests:
    """What proves the entries of one tree.

    trunk: what all chains hang on. root: its content digest, the namespace digest. known: the index's table.
    Only every 16th of a chain is kept (KEPT_EVERY), for each would cost its entry a fifth of its memory, and the newest
    one of all, so that a chain that is sealed block by block costs one digest a block.
    """

    def __init__(self, trunk: Entry, root: ContentDigest, known: Mapping[BlockHash, Entry]) -> None:
        self._trunk = trunk
        self._root = root
        self._known = known
        self._kept: dict[Entry, ContentDigest] = {trunk: root}
        self._newest = (trunk, root)

    def of(self, entry: Entry) -> ContentDigest:
        """Return the content digest of an entry, computed from the nearest one above it of which it is known."""
        chain: list[Entry] = []
        newest, content_digest = self._newest
        at = entry
        while at is not newest:
            if kept := self._kept.get(at):
                content_digest = kept
                break
            chain.append(at)
            at = at.parent
        for each in reversed(chain):
            content_digest = chain_content_digest(content_digest, each.token_bytes)
            self.keep(each, content_digest)
        return content_digest

    def keep(self, entry: Entry, content_digest: ContentDigest) -> None:
        """Note a digest that was computed, if it is one of those to be kept; of entries that have gone none is."""
        self._newest = entry, content_digest
        if entry.depth % KEPT_EVERY == KEPT_EVERY - 1 and self._known.get(entry.block_hash) is entry:
            self._kept[entry] = content_digest

    def forget(self, entry: Entry) -> None:
        """Let go of what is kept for an entry that leaves the index."""
        self._kept.pop(entry, None)

    def check(self) -> None:
        """Raise AssertionError unless what is kept is right, and of entries that the index has."""
        for entry, content_digest in self._kept.items():
            is_there = entry is self._trunk or self._known.get(entry.block_hash) is entry
            assert is_there, "a content digest outlived its entry"
            assert content_digest == self._computed_anew(entry), "a content digest is not that of its chain"

    def _computed_anew(self, entry: Entry) -> ContentDigest:
        chain: list[Entry] = []
        while entry is not self._trunk:
            chain.append(entry)
            entry = entry.parent
        return reduce(
            lambda content_digest, each: chain_content_digest(content_digest, each.token_bytes),
            reversed(chain),
            self._root,
        )
