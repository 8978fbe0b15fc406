"""Moves the blocks of the hot pool together: those of a sequence or a chain side by side, the free ones in one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tierkv.block import Tier
from tierkv.demotion import Demoter
from tierkv.events import EventKind
from tierkv.index import Entry
from tierkv.mover import Move
from tierkv.sequence import Sequence
from tierkv.tiers import Tiers

__all__ = ["LayoutReport", "defragment"]


@dataclass(frozen=True, slots=True)
class LayoutReport:
    """What a defragmentation did. moved: block ids before and after. fragmentation: as in `CacheStats`."""

    moved: dict[int, int]
    fragmentation_before: float
    fragmentation_after: float


def defragment(tiers: Tiers, demoter: Demoter, sequences: Iterable[Sequence]) -> LayoutReport:
    """Give related blocks neighbouring ids; block tables of the sequences are rewritten, contents unchanged.

    Call it between steps: no forward pass may read the pool meanwhile. Blocks that are still being loaded or written
    down stay where they are. Raises StoreError where a copy fails; then running sequences must be released.
    """
    demoter.flush()
    with tiers.changed:
        while tiers.in_flight:
            tiers.in_flight[0][0].synchronize()
            tiers.reap()
        running = list(sequences)
        pool = tiers.index.hot
        before = _fragmentation(pool.free_runs())
        targets = _targets(tiers, running)
        if not targets:
            return LayoutReport({}, before, before)
        tiers.wait_for_users(list(targets))
        tiers.mover.copy(list(_moves(targets, tiers.hot.scratch_block))).synchronize()
        _rename(tiers, running, targets)
        return LayoutReport(targets, before, _fragmentation(pool.free_runs()))


def _targets(tiers: Tiers, running: list[Sequence]) -> dict[int, int]:
    """Return the new block id of each block that moves."""
    pool = tiers.index.hot
    users = [0] * pool.capacity
    for sequence in running:
        for block_id in sequence.block_table:
            users[block_id] += 1
    loading = {block_id for sequence in running if sequence.split for block_id in sequence.block_table}
    order = dict.fromkeys(_in_order(tiers, running))  # each block once, where it is first met
    movable = [block_id for block_id in order if pool.pins[block_id] == users[block_id] and block_id not in loading]
    held = {i for i in range(pool.capacity) if pool.pins[i] or pool.owners[i] is not None} - set(movable)
    places = (block_id for block_id in range(pool.capacity) if block_id not in held)
    return {old: new for old, new in zip(movable, places, strict=False) if old != new}


def _in_order(tiers: Tiers, running: list[Sequence]) -> Iterator[int]:
    """Yield block ids: sequence after sequence, then chain after chain of what is cached."""
    for sequence in running:
        yield from sequence.block_table
    stack = tiers.index.children(tiers.index.root)
    while stack:
        entry = stack.pop()
        if entry.block_id is not None:
            yield entry.block_id
        stack += tiers.index.children(entry.block_hash)


def _moves(targets: dict[int, int], scratch: int) -> Iterator[Move]:
    """Yield copies in an order in which none overwrites what another still has to read; `scratch` breaks circles."""
    source_of = {new: old for old, new in targets.items()}
    for last in [new for new in source_of if new not in targets]:  # nobody reads that place any more
        new = last
        while new in source_of:
            old = source_of.pop(new)
            yield Move(old, new)
            new = old
    while source_of:  # what is left are circles
        first = new = next(iter(source_of))
        yield Move(first, scratch)
        while (old := source_of.pop(new)) != first:
            yield Move(old, new)
            new = old
        yield Move(scratch, new)


def _rename(tiers: Tiers, running: list[Sequence], targets: dict[int, int]) -> None:
    """Let everybody know the new ids."""
    pool = tiers.index.hot
    owners: list[tuple[Entry, int]] = [
        (owner, new) for old, new in targets.items() if (owner := pool.owners[old]) is not None
    ]
    pool.rename(targets)
    for entry, _ in owners:
        tiers.watch.block(EventKind.FREE, Tier.HOT, entry, slot=entry.block_id)
    for entry, new in owners:
        entry.block_id = new
        tiers.watch.block(EventKind.ALLOCATE, Tier.HOT, entry, slot=new)
    for sequence in running:
        sequence.block_table[:] = [targets.get(block_id, block_id) for block_id in sequence.block_table]


def _fragmentation(free_runs: list[int]) -> float:
    return 1 - max(free_runs) / sum(free_runs) if free_runs else 0.0
