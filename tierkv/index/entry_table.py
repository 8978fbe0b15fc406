"""The entries of one tree by their block hashes, in containers that no garbage collection visits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tierkv.index.entry import Entry
from tierkv.values.block import BlockHash
from tierkv.values.untracked import untrack

__all__ = ["EntryTable"]


class EntryTable:
    """Entries by hash, in the order of their insertion.

    A dict from hashes to entries is visited by every full garbage collection. So the dict has numbers, which are not,
    and the entries lie by number in a list that is untracked, as they are themselves. An entry, its parent and its
    children are a cycle: `clear` breaks it, and is called when the table is no longer used.

    numbers: ints to number the entries by, shared with others to save memory; more are made when they do not suffice.
    """

    def __init__(self, numbers: Sequence[int] = ()) -> None:
        self._numbers = numbers
        self.numbers_by_hash: dict[BlockHash, int] = {}
        self._by_number: list[Entry | None] = []
        self._free: list[int] = []
        untrack(self._by_number)
        untrack(self._free)

    def __len__(self) -> int:
        return len(self.numbers_by_hash)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self.numbers_by_hash

    def __iter__(self) -> Iterator[Entry]:
        for number in self.numbers_by_hash.values():
            entry = self._by_number[number]
            assert entry is not None, "a number without its entry"
            yield entry

    def get(self, block_hash: BlockHash) -> Entry | None:
        """Return the entry with this hash."""
        number = self.numbers_by_hash.get(block_hash)
        return None if number is None else self._by_number[number]

    def add(self, entry: Entry) -> None:
        """Add an entry whose hash is not in the table."""
        untrack(entry)
        if self._free:
            number = self._free.pop()
            self._by_number[number] = entry
        else:
            number = len(self._by_number)
            if number < len(self._numbers):
                number = self._numbers[number]
            self._by_number.append(entry)
        self.numbers_by_hash[entry.block_hash] = number

    def remove_all(self, entries: Sequence[Entry]) -> None:
        """Remove entries that are in the table."""
        pop, by_number = self.numbers_by_hash.pop, self._by_number
        numbers = [pop(entry.block_hash) for entry in entries]
        for number in numbers:
            by_number[number] = None
        self._free += numbers

    def clear(self) -> None:
        """Remove all entries, and break their cycles. An entry that is still referred to keeps its parent."""
        for entry in self._by_number:
            if entry is not None:
                entry.child_or_children = None
        self.numbers_by_hash.clear()
        self._by_number.clear()
        self._free.clear()
