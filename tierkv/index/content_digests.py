"""The seals of entries: computed when asked for, kept for some."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

from tierkv.index.entry import Entry
from tierkv.values.block import BlockHash, Seal, seal_block

__all__ = ["KEPT_EVERY", "Seals"]

KEPT_EVERY = 16


class Seals:
    """What proves the entries of one tree.

    trunk: what all chains hang on. root: its seal, the namespace digest. known: the index's table.
    Only every 16th of a chain is kept (KEPT_EVERY), for each would cost its entry a fifth of its memory, and the newest
    one of all, so that a chain that is sealed block by block costs one digest a block.
    """

    def __init__(self, trunk: Entry, root: Seal, known: Mapping[BlockHash, Entry]) -> None:
        self._trunk = trunk
        self._root = root
        self._known = known
        self._kept: dict[Entry, Seal] = {trunk: root}
        self._newest = (trunk, root)

    def of(self, entry: Entry) -> Seal:
        """Return the seal of an entry, computed from the nearest one above it of which it is known."""
        chain: list[Entry] = []
        newest, seal = self._newest
        at = entry
        while at is not newest:
            if kept := self._kept.get(at):
                seal = kept
                break
            chain.append(at)
            at = at.parent
        for each in reversed(chain):
            seal = seal_block(seal, each.token_bytes)
            self.keep(each, seal)
        return seal

    def keep(self, entry: Entry, seal: Seal) -> None:
        """Note a seal that was computed, if it is one of those to be kept; of what has gone from the index none is."""
        self._newest = entry, seal
        if entry.depth % KEPT_EVERY == KEPT_EVERY - 1 and self._known.get(entry.block_hash) is entry:
            self._kept[entry] = seal

    def forget(self, entry: Entry) -> None:
        """Let go of what is kept for an entry that leaves the index."""
        self._kept.pop(entry, None)

    def check(self) -> None:
        """Raise AssertionError unless what is kept is right, and of entries that the index has."""
        for entry, seal in self._kept.items():
            is_there = entry is self._trunk or self._known.get(entry.block_hash) is entry
            assert is_there, "a seal outlived its entry"
            assert seal == self._computed_anew(entry), "a seal is not that of its chain"

    def _computed_anew(self, entry: Entry) -> Seal:
        chain: list[Entry] = []
        while entry is not self._trunk:
            chain.append(entry)
            entry = entry.parent
        return reduce(lambda seal, each: seal_block(seal, each.token_bytes), reversed(chain), self._root)
