"""The entries of one tree by their block hashes, in containers that no garbage collection visits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tierkv.index.entry import Entry
from tierkv.values.block import BlockHash
from tierkv.values.untracked import untrack, untrack_all

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

    def has_any(self, block_hashes: Iterable[BlockHash]) -> bool:
        """Return whether the table has one of these hashes."""
        return not self.numbers_by_hash.keys().isdisjoint(block_hashes)

    def add_all(self, entries: Sequence[Entry]) -> None:
        """Add entries whose hashes are not in the table and differ: as `add`, at a third of the time for each."""
        free, by_number, count = self._free, self._by_number, len(entries)
        at = max(0, len(free) - count)
        numbers = free[at:]
        del free[at:]
        for number, entry in zip(numbers, entries, strict=False):
            by_number[number] = entry
        if len(numbers) < count:
            start = len(by_number)
            by_number += entries[len(numbers) :]
            shared = self._numbers[start : len(by_number)]
            numbers += shared
            numbers += range(start + len(shared), len(by_number))
        untrack_all(entries)
        self.numbers_by_hash.update(zip([entry.block_hash for entry in entries], numbers, strict=True))

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
