"""Where blocks should lie, and in which order they get there: planned over plain numbers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

__all__ = ["Shift", "count_breaks", "plan_places", "plan_shifts"]


class Shift(NamedTuple):
    """One block on its way: `target` is free when its turn comes."""

    source: int
    target: int


def plan_places(order: Sequence[int], fixed: Collection[int], capacity: int) -> dict[int, int]:
    """Return where blocks go, old place -> new, that they lie in this order from place 0 on; without those that stay.

    fixed: taken places that are not to be touched: the others step over them.
    """
    taken = set(fixed)
    targets = (place for place in range(capacity) if place not in taken)
    return {old: new for old, new in zip(order, targets, strict=False) if old != new}


def plan_shifts(places: Mapping[int, int], spare: int | None) -> Iterator[Shift]:
    """Yield shifts that bring every block from its old place to its new one, none over another.

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


def count_breaks(order: Sequence[int], moved: Mapping[int, int] | None = None) -> int:
    """Return how many blocks do not lie right behind the one before them in this order, after a move if given."""
    places = [moved.get(block, block) for block in order] if moved else list(order)
    return sum(behind != before + 1 for before, behind in pairwise(places))
