"""Defragments the hot pool: what belongs together lies together, and what is free is one run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from tierkv.errors import CapacityError, StoreError
from tierkv.movers.mover import Move
from tierkv.requests.sequence import BlockUsers, Sequence
from tierkv.transfer.offload import Offloader
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import Tier
from tierkv.values.events import EventKind

__all__ = ["Defragmenter", "LayoutReport", "Shift", "count_breaks", "plan_places", "plan_shifts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutReport:
    """What a defragmentation did. moved: old block id -> new one; num_fixed: blocks in use that had to stay.

    num_copies: blocks copied, detours included. breaks: blocks that do not lie right after their predecessor, when the
    index is read chain by chain. fragmentation: as `CacheStats.fragmentation_ratio`.
    """

    moved: Mapping[int, int] = field(default_factory=dict)
    num_fixed: int = 0
    num_copies: int = 0
    breaks_before: int = 0
    breaks_after: int = 0
    fragmentation_before: float = 0.0
    fragmentation_after: float = 0.0


class Defragmenter:
    """Moves unused blocks inside the hot pool; each copy is compared with its source before the source is freed."""

    def __init__(self, tiers: Tiers, offloader: Offloader, users: BlockUsers) -> None:
        self._tiers = tiers
        self._offloader = offloader
        self._users = users

    def run(self, sequences: Collection[Sequence]) -> LayoutReport:
        """Lay chains of the index in contiguous runs from block 0 on and rewrite what names a block by its id.

        sequences: running ones whose owners neither compute nor call the cache meanwhile; their block tables are
        rewritten in place. A block with another user (a sequence, a copy, a write) stays where it is. A full pool
        evicts one block to have room to move. Raises StoreError when a copy fails or differs; earlier moves stay valid.
        """
        tiers, pool = self._tiers, self._tiers.index.hot
        self._offloader.flush()  # what is queued to be written could not be moved
        with tiers.changed:
            if pool.used_count == pool.capacity:
                self._free_one()
            tiers.memory.mover.drain()
            tiers.reap()
            fragmentation = pool.fragmentation()
            users = Counter(block_id for sequence in sequences for block_id in sequence.block_table)
            order = list(dict.fromkeys(self._iter_order(sequences)))
            fixed = {block_id for block_id in pool.used() if self._is_fixed(block_id, users)}
            places = plan_places([block_id for block_id in order if block_id not in fixed], fixed, pool.capacity)
            done: list[Shift] = []
            try:
                self._copy(places, done)
            finally:
                moved = _ends(done)
                tiers.index.rearrange_hot(moved)
                for sequence in sequences:
                    sequence.block_table[:] = [moved.get(block_id, block_id) for block_id in sequence.block_table]
                self._users.rename(moved)
                tiers.memory.mover.drain()
                tiers.changed.notify_all()
            return LayoutReport(
                moved=moved,
                num_fixed=len(fixed),
                num_copies=len(done),
                breaks_before=count_breaks(order),
                breaks_after=count_breaks(order, moved),
                fragmentation_before=fragmentation,
                fragmentation_after=pool.fragmentation(),
            )

    def _free_one(self) -> None:
        """Evict the block that is next in order, written down first; without such a block nothing is evicted.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        try:
            self._tiers.index.unpin_all(Tier.HOT, self._offloader.take_hot(1))
        except CapacityError:
            return

    def _is_fixed(self, block_id: int, users: Counter[int]) -> bool:
        """Return whether a block has users other than the given sequences. The caller holds the lock."""
        assert self._tiers.changed.is_owned()
        return self._tiers.index.hot.pins[block_id] != users[block_id] or block_id in self._tiers.copies.arriving

    def _iter_order(self, sequences: Collection[Sequence]) -> Iterator[int]:
        """Yield hot blocks chain by chain; a private block of a sequence, after the block that it follows there.

        The caller holds the lock.
        """
        assert self._tiers.changed.is_owned()
        index = self._tiers.index
        private: dict[int, list[int]] = {}
        for sequence in sequences:
            last = -1
            for block_id in sequence.block_table:
                if index.hot.owners[block_id] is None:
                    private.setdefault(last, []).append(block_id)
                else:
                    last = block_id
        for entry in index.depth_first():
            if entry.block_id is not None:
                yield entry.block_id
                yield from private.get(entry.block_id, ())
        yield from private.get(-1, ())

    def _copy(self, places: Mapping[int, int], done: list[Shift]) -> None:
        """Carry out a plan, block by block; `done` collects the shifts. The caller holds the lock."""
        assert self._tiers.changed.is_owned()
        tiers, pool = self._tiers, self._tiers.index.hot
        final = {places.get(block_id, block_id) for block_id in pool.used()}
        spare = next((place for place in range(pool.capacity) if place not in final), None)
        owners = {block_id: pool.owners[block_id] for block_id in places}
        with tiers.span("defragment") as detail:
            for shift in plan_shifts(places, spare):
                move = Move(shift.source, shift.target)
                tiers.memory.mover.copy([move])
                if not tiers.memory.mover.is_same(move):
                    raise StoreError(f"block {shift.source} changed on its way to {shift.target}")
                done.append(shift)
                owners[shift.target] = owner = owners.pop(shift.source)
                if owner:
                    tiers.observers.block(EventKind.MOVE, Tier.HOT, owner, slot=shift.target, moved_from=shift.source)
            detail["blocks"] = len(done)


def _ends(shifts: Collection[Shift]) -> dict[int, int]:
    """Return where blocks are after these shifts, old place -> new, without those that are back where they were."""
    began: dict[int, int] = {}  # place -> where the block that is there now came from
    for shift in shifts:
        began[shift.target] = began.pop(shift.source, shift.source)
    return {old: new for new, old in began.items() if old != new}


class Shift(NamedTuple):
    """One block on its way: `target` is free when its turn comes."""

    source: int
    target: int


def plan_places(order: Several[int], fixed: Collection[int], capacity: int) -> dict[int, int]:
    """Return where blocks go, old place -> new, that they lie in this order from place 0 on; without those that stay.

    fixed: taken places that are not to be touched: the others step over them.
    """
    taken = set(fixed)
    targets = (place for place in range(capacity) if place not in taken)
    return {old: new for old, new in zip(order, targets, strict=False) if old != new}


def plan_shifts(places: Mapping[int, int], spare: int | None) -> Iterator[Shift]:
    """Yield shifts that move every block from its old place to its new one, none over another.

    spare: a place that is free once all is done, by way of which blocks change places in a circle; without one such
    blocks stay where they are.
    """
    comes_from = {new: old for old, new in places.items()}
    for end in sorted(comes_from):
        if end in places:
            continue
        at = end
        while (source := comes_from.pop(at, None)) is not None:
            yield Shift(source, at)
            at = source
    while comes_from and spare is not None:  # circles are all that is left
        first = at = next(iter(comes_from))
        yield Shift(first, spare)
        while (source := comes_from.pop(at)) != first:
            yield Shift(source, at)
            at = source
        yield Shift(spare, at)


def count_breaks(order: Several[int], moved: Mapping[int, int] | None = None) -> int:
    """Return how many blocks do not lie right after their predecessor in this order, after a move if given."""
    places = [moved.get(block, block) for block in order] if moved else list(order)
    return sum(after != before + 1 for before, after in pairwise(places))
