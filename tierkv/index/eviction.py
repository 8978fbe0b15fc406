"""The blocks of one tier that may be evicted: in the order of a policy's scores, and the queue that skips others."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from tierkv.index.eviction_heap import EvictionHeap
from tierkv.index.eviction_policy import (
    FAR_AWAY_S,
    CacheBlock,
    ChainOrder,
    EvictionOrder,
    EvictionPolicy,
    OrderingPolicy,
)
from tierkv.index.slots import SlotPool
from tierkv.index.tree import PINNED, Entry
from tierkv.values.block import Tier

__all__ = ["EvictionQueue", "ScoreOrder"]

_log = logging.getLogger(__name__)
_MIN_PUSHED = 64
_LONGEST_RUN = 64
Block = TypeVar("Block", bound=CacheBlock)


class ScoreOrder(Generic[Block]):
    """The order of a policy's scores: the highest first, of equals the deepest block."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._has_failed = False
        self._heap: EvictionHeap[Block] = EvictionHeap()

    def add(self, block: Block) -> None:
        """Do nothing: the score is read at the push."""

    def remove_all(self, blocks: Sequence[Block]) -> None:
        """Do nothing."""

    def score(self, block: Block) -> float:
        """Return the block's score of now."""
        return self._policy.score_block(block)

    def push(self, block: Block, stamp: int) -> None:
        """Add a block with its score of now."""
        self._heap.push(self._key(block), block, stamp)

    def goes_first(self, block: Block) -> bool:
        """Return whether all pushed scores are lower."""
        return self._heap.is_before_all(self._key(block))

    def pop(self) -> tuple[Block, int] | None:
        """Take the block with the highest score."""
        return self._heap.pop()

    def clear(self) -> None:
        """Forget every push."""
        self._heap.clear()

    def __iter__(self) -> Iterator[tuple[Block, int]]:
        return iter(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def _key(self, block: Block) -> float:
        """Return the negated score. Where a policy fails, it is that of LRU: a block without a key would never go."""
        try:
            key = -self.score(block)
            if key == key:  # not nan
                return key
            problem = "a score that is no number"
        except Exception as exc:  # noqa: BLE001 - a user's policy may raise anything
            problem = f"{type(exc).__name__}: {exc}"
        if not self._has_failed:
            self._has_failed = True
            _log.error("the eviction policy failed, and the least recently used blocks go meanwhile: %s", problem)
        return block.last_access - FAR_AWAY_S


class EvictionQueue:
    """The evictable entries of a tier, in the order of a policy.

    A use or a pin takes nothing out of the order. An item is outdated if its entry was used since the push, and is
    skipped while the entry is not evictable. The index pushes each entry that becomes evictable.
    """

    def __init__(self, tier: Tier, pool: SlotPool[Entry], policy: EvictionPolicy) -> None:
        self._tier = tier
        self._is_hot = tier is Tier.HOT
        self._pool = pool
        self.set_policy(policy)

    @property
    def num_pushed(self) -> int:
        """Items in the order, outdated ones included: at most twice the evictable entries and 64."""
        return len(self._order) + len(self._taken)

    def set_policy(self, policy: EvictionPolicy) -> None:
        """Order all evictable entries by another policy."""
        self._policy = policy
        self._order: EvictionOrder[CacheBlock] = (
            policy.new_order() if isinstance(policy, OrderingPolicy) else ScoreOrder(policy)
        )
        self._count_first = self._order.count_first if isinstance(self._order, ChainOrder) else self._count_each
        self._taken: list[Entry] = []  # by the last selection
        for owner in self._pool.owners:
            if owner is not None:
                self._order.add(owner)
                if self.is_evictable(owner):
                    self._order.push(owner, owner.access_count)
        self._most_pushed = 2 * len(self._order) + _MIN_PUSHED

    def is_evictable(self, entry: Entry) -> bool:
        """Return whether an entry is a leaf of the tier, not in use and not pinned."""
        if self._is_hot:
            slot, num_children = entry.block_id, entry.hot_children
        else:
            slot, num_children = entry.warm_slot, entry.warm_children
        return slot is not None and not num_children and not entry.flags & PINNED and not self._pool.pins[slot]

    def add(self, entry: Entry) -> None:
        """Add an entry whose bytes the tier now has."""
        self._order.add(entry)
        self.push(entry)

    def add_in_use(self, entries: Sequence[Entry]) -> None:
        """Add entries whose bytes the tier now has, and whose places are in use: none is evictable yet."""
        add = self._order.add
        for entry in entries:
            add(entry)

    def remove_all(self, entries: Sequence[Entry]) -> None:
        """Remove entries that left the tier."""
        self._order.remove_all(entries)

    def push(self, entry: Entry) -> None:
        """Push an entry, if it is evictable."""
        if self.is_evictable(entry):
            self._order.push(entry, entry.access_count)
            if self.num_pushed > self._most_pushed:
                self._drop_outdated()

    def put_back(self) -> None:
        """Push again the entries that the last selection took and the caller did not evict."""
        if self._taken:
            taken, self._taken = self._taken, []
            for entry in taken:
                if self.is_evictable(entry):
                    self._order.push(entry, entry.access_count)

    def select(self, count: int) -> list[Entry]:
        """Return up to `count` entries, children before parents, chosen by the policy. Nothing changes yet."""
        self.put_back()
        yielded: list[Entry] = []
        chosen = self._policy.select_evictions(count, self._iter_leaves(yielded, count))[:count]
        if self.num_pushed > self._most_pushed:
            self._drop_outdated()
        if chosen == yielded:  # the policy took all leaves in order, so each child comes before its parent
            return yielded
        selected: list[Entry] = []
        chosen_children: dict[Entry, int] = {}
        for block in chosen:
            assert isinstance(block, Entry), "a policy returns blocks that it was given"
            if block.tier_children(self._tier) == chosen_children.get(block, 0):
                selected.append(block)
                chosen_children[block.parent] = chosen_children.get(block.parent, 0) + 1
        return selected

    def check(self, entries: Iterable[Entry]) -> None:
        """Raise AssertionError unless every evictable entry is in the order and outdated items are few."""
        assert self.num_pushed <= self._most_pushed, "outdated items pile up"
        pushed: set[CacheBlock] = {entry for entry, stamp in self._order if stamp == entry.access_count}
        pushed.update(self._taken)
        for entry in entries:
            assert not self.is_evictable(entry) or entry in pushed, "an evictable entry is not in the order"

    def _drop_outdated(self) -> None:
        """Drop outdated and repeated items, which may be half of all."""
        self.put_back()
        order = self._order
        kept = dict.fromkeys(e for e, stamp in order if isinstance(e, Entry) and stamp == e.access_count)
        order.clear()
        for entry in kept:
            if self.is_evictable(entry):
                order.push(entry, entry.access_count)
        self._most_pushed = 2 * len(order) + _MIN_PUSHED

    def _iter_leaves(self, yielded: list[Entry], count: int) -> Iterator[CacheBlock]:
        """Yield evictable entries in order, `count` or more, as if each yielded entry were already evicted.

        Popped entries go to `_taken`. The caller will evict most of them, so only the next call puts the rest back.
        Parents that would be popped next follow a leaf in runs. A parent that becomes a leaf and would not be is pushed
        at once; the next selection skips it if its children stay.
        """
        order, is_hot, pins, taken = self._order, self._is_hot, self._pool.pins, self._taken
        gone: set[Entry] = set()
        freed: set[Entry] = set()
        gone_children: dict[Entry, int] = {}
        while item := order.pop():
            entry, stamp = item
            assert isinstance(entry, Entry), "an order returns what was pushed"
            if stamp != entry.access_count or entry in gone:  # outdated, or pushed twice
                continue
            if entry not in freed:
                if not self.is_evictable(entry):
                    continue
                taken.append(entry)
            run: Sequence[Entry] = (entry,)
            while True:
                for entry in run:
                    gone.add(entry)
                    yielded.append(entry)
                    yield entry
                parent = entry.parent
                num_children = parent.hot_children if is_hot else parent.warm_children
                if num_children > 1:
                    gone_children[parent] = num_gone = gone_children.get(parent, 0) + 1
                    if num_gone < num_children:
                        break
                slot = parent.block_id if is_hot else parent.warm_slot
                if slot is None or parent.flags & PINNED or pins[slot]:
                    break
                if not order.goes_first(parent):
                    order.push(parent, parent.access_count)
                    freed.add(parent)
                    break
                run = self._run_from(parent, min(count - len(yielded), _LONGEST_RUN))

    def _run_from(self, entry: Entry, count: int) -> list[Entry]:
        """Return an entry that goes next, and up to `count` - 1 ancestors that follow it: each is its only child's."""
        is_hot, pins = self._is_hot, self._pool.pins
        run = [entry]
        while len(run) < count and (entry.parent.hot_children if is_hot else entry.parent.warm_children) == 1:
            entry = entry.parent
            slot = entry.block_id if is_hot else entry.warm_slot
            if slot is None or entry.flags & PINNED or pins[slot]:
                break
            run.append(entry)
        if len(run) > 1:
            del run[1 + self._count_first(run[1:]) :]
        return run

    def _count_each(self, blocks: Sequence[CacheBlock]) -> int:
        """Return how many leading blocks go first, one after the other."""
        for number, block in enumerate(blocks):
            if not self._order.goes_first(block):
                return number
        return len(blocks)
