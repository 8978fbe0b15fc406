"""The children of one block, sorted by token ids: bisection finds the child that has most in common with a prompt."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

from tierkv.values.block import TOKEN_BYTES, Tier, common_run
from tierkv.values.untracked import untrack

__all__ = ["Children", "nearest_in_memory"]

_RUN_LENGTH = 256
_NEAREST = 32


class HasTokens(Protocol):
    """An item of the collection; its token ids do not change."""

    @property
    def token_bytes(self) -> bytes: ...


class HasPlaces(HasTokens, Protocol):
    """An item that may have bytes in the hot tier, in the warm tier, or in both."""

    @property
    def block_id(self) -> int | None: ...
    @property
    def warm_slot(self) -> int | None: ...


Child = TypeVar("Child", bound=HasTokens)
Placed = TypeVar("Placed", bound=HasPlaces)
_token_bytes = attrgetter("token_bytes")


class Children(Generic[Child]):
    """A collection sorted by token ids as bytes; no two children have the same.

    The first blocks of all prompts are children of the root, so there may be 100,000. Sorted runs of at most 512 keep
    an addition or a removal at microseconds. Source: the lists of lists of sortedcontainers (Jenks).
    No garbage collection visits it: children that refer to their collection are a cycle that the index breaks.
    num_warm: children with bytes in the warm tier, counted by the index.
    """

    __slots__ = ("_runs", "num_warm")

    def __init__(self, *children: Child, num_warm: int = 0) -> None:
        self.num_warm: int = num_warm
        self._runs: list[list[Child]] = []
        untrack(self)
        untrack(self._runs)
        if children:
            self._runs.append(_untracked(sorted(children, key=_token_bytes)))

    def __len__(self) -> int:
        return sum(map(len, self._runs))

    def __bool__(self) -> bool:
        return bool(self._runs)

    def __iter__(self) -> Iterator[Child]:
        return chain.from_iterable(self._runs)

    def add(self, child: Child) -> None:
        """Add a child that is not in the collection."""
        if not self._runs:
            self._runs.append(_untracked([child]))
            return
        at = self._run_of(child.token_bytes)
        run = self._runs[at]
        insort(run, child, key=_token_bytes)
        if len(run) > 2 * _RUN_LENGTH:
            self._runs.insert(at + 1, _untracked(run[_RUN_LENGTH:]))
            del run[_RUN_LENGTH:]

    def remove(self, child: Child) -> None:
        """Remove a child that is in the collection."""
        at = self._run_of(child.token_bytes)
        run = self._runs[at]
        position = bisect_left(run, child.token_bytes, key=_token_bytes)
        assert run[position] is child, "a child is out of order"
        del run[position]
        if not run:
            del self._runs[at]

    def find(self, token_bytes: bytes) -> Child | None:
        """Return the child with exactly these token ids."""
        runs = self._runs
        if not runs:
            return None
        run = runs[0] if len(runs) == 1 else runs[self._run_of(token_bytes)]
        at = bisect_left(run, token_bytes, key=_token_bytes)
        child = run[at] if at < len(run) else None
        return child if child is not None and child.token_bytes == token_bytes else None

    def only(self) -> Child | None:
        """Return the child if there is exactly one."""
        return self._runs[0][0] if len(self._runs) == 1 and len(self._runs[0]) == 1 else None

    def around(self, token_bytes: bytes) -> tuple[Iterator[Child], Iterator[Child]]:
        """Return iterators of the children from these token ids on, and of those before them, nearest first.

        The common prefix with these token ids never grows from one to the next.
        """
        if not self._runs:
            return iter(()), iter(())
        at = self._run_of(token_bytes)
        position = bisect_left(self._runs[at], token_bytes, key=_token_bytes)
        return self._iter_from(at, position), self._iter_before(at, position)

    def _iter_from(self, at: int, position: int) -> Iterator[Child]:
        for run in islice(self._runs, at, None):
            for number in range(position, len(run)):  # a slice would touch every entry of it
                yield run[number]
            position = 0

    def _iter_before(self, at: int, position: int) -> Iterator[Child]:
        for number in range(position - 1, -1, -1):
            yield self._runs[at][number]
        for before in range(at - 1, -1, -1):
            yield from reversed(self._runs[before])

    def _run_of(self, token_bytes: bytes) -> int:
        """Return the last run that begins at or before these token ids, or the first."""
        return max(bisect_right(self._runs, token_bytes, key=_first_tokens) - 1, 0)


def _untracked(run: list[Child]) -> list[Child]:
    untrack(run)
    return run


def _first_tokens(run: list[Child]) -> bytes:
    return run[0].token_bytes


def nearest_in_memory(children: Children[Placed], token_bytes: bytes) -> tuple[Placed, Tier, int] | None:
    """Return the child that has most leading tokens in common with these, its tier, and their number.

    The child has bytes in the hot or the warm tier, and at least one token in common. Of equals a hot one is taken, if
    the 32 nearest on either side have one: there may be 100,000 children.
    """
    best: tuple[Placed, Tier, int] | None = None
    for side in children.around(token_bytes):
        best = _nearest(islice(side, _NEAREST), token_bytes, best)
    return best


def _nearest(
    children: Iterable[Placed], token_bytes: bytes, best: tuple[Placed, Tier, int] | None
) -> tuple[Placed, Tier, int] | None:
    """Return the best of `best` and some children; their common prefixes with the tokens never grow in this order."""
    has_warm = False
    for child in children:
        if best and not child.token_bytes.startswith(token_bytes[: best[2] * TOKEN_BYTES]):
            break
        if child.block_id is None and (has_warm or child.warm_slot is None):
            continue
        if child.token_bytes[:TOKEN_BYTES] != token_bytes[:TOKEN_BYTES]:
            break
        run = common_run(child.token_bytes, token_bytes)
        tier = Tier.WARM if child.block_id is None else Tier.HOT
        if best is None or run > best[2] or (tier is Tier.HOT and best[1] is Tier.WARM):
            best = (child, tier, run)
        if best[1] is Tier.HOT:
            break
        has_warm = True
    return best
