"""What a cache of another size would have answered: LRU stack distances of the blocks that were asked for.

One pass gives the hits at every capacity at once, because what an LRU cache of n blocks holds is among what one of
n + 1 holds. Source: Mattson, Gecsei, Slutz, Traiger, "Evaluation techniques for storage hierarchies", 1970.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tierkv.values.block import BlockHash

__all__ = ["ReuseRecorder", "hits_at"]


@dataclass(frozen=True, slots=True)
class _Marks:
    """Ones at the times of last use, counted by prefix: a Fenwick tree."""

    tree: list[int]

    def add(self, time: int, change: int) -> None:
        time += 1
        while time < len(self.tree):
            self.tree[time] += change
            time += time & -time

    def count_up_to(self, time: int) -> int:
        time += 1
        total = 0
        while time:
            total += self.tree[time]
            time -= time & -time
        return total


class ReuseRecorder:
    """Keeps which blocks were asked for, in order, and which came without being asked for.

    max_uses bounds what is kept; `dropped_requests` says how many requests came too late to be.
    """

    def __init__(self, *, max_uses: int = 1_000_000) -> None:
        self.dropped_requests = 0
        self._max_uses = max_uses
        self._numbers: dict[BlockHash, int] = {}
        self._uses: list[tuple[tuple[int, ...], bool]] = []
        self._num_uses = 0

    def request(self, block_hashes: Sequence[BlockHash]) -> None:
        """Record that a request asked for these blocks, first to last."""
        self._record(block_hashes, is_request=True)

    def arrival(self, block_hash: BlockHash) -> None:
        """Record that a block was computed and kept."""
        self._record([block_hash], is_request=False)

    def distances(self) -> list[int | None]:
        """Return, for each block asked for, how many blocks were used since its last use; None if never used.

        An LRU cache of n blocks answers where the distance is below n. Of one request's blocks the later one is
        older, as the index has it: children are evicted before parents.
        """
        marks = _Marks([0] * (self._num_uses + 2))
        last_use: dict[int, int] = {}
        found: list[int | None] = []
        now = 0
        for blocks, is_request in self._uses:
            if is_request:
                for block in blocks:
                    used = last_use.get(block)
                    found.append(None if used is None else len(last_use) - marks.count_up_to(used))
            for block in reversed(blocks):
                if block in last_use:
                    marks.add(last_use[block], -1)
                marks.add(now, 1)
                last_use[block] = now
                now += 1
        return found

    def _record(self, block_hashes: Sequence[BlockHash], *, is_request: bool) -> None:
        if self._num_uses + len(block_hashes) > self._max_uses:
            self.dropped_requests += is_request
            return
        numbers = tuple(self._numbers.setdefault(each, len(self._numbers)) for each in block_hashes)
        self._uses.append((numbers, is_request))
        self._num_uses += len(numbers)


def hits_at(distances: Iterable[int | None], capacities: Sequence[int]) -> list[int]:
    """Return how many of the blocks asked for an LRU cache of each capacity (in blocks) would have held."""
    known = sorted(distance for distance in distances if distance is not None)
    return [bisect_left(known, capacity) for capacity in capacities]
