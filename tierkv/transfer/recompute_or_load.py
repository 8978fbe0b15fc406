"""Recompute or load: decides what becomes of a prompt's cold blocks, from what each way took in earlier requests.

Bandwidths predict neither way: decoding, copies and a forward pass slow each other down. A cost is no line through the
origin either: a pass of few tokens takes as long as its launch, and a few blocks are read side by side.
The ranks of a split model decide by the costs of the slowest one, so all of them take the same way.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import takewhile
from typing import NamedTuple

from tierkv.transfer.lookup import Hit, Lookup, are_in_memory, are_remote
from tierkv.values.block import Tier

__all__ = [
    "ColdCosts",
    "ColdLoad",
    "ColdPlan",
    "CostBySize",
    "Decision",
    "LoadKind",
    "RecomputeOrLoad",
    "Way",
    "decide",
]

_MEMORY = 5
_FORGOTTEN = 0.98
_UNKNOWN = -1


class LoadKind(NamedTuple):
    """in_memory: the blocks lie in the page cache. overlaps: the engine computes the first of them meanwhile.

    is_remote: some of the blocks lie in a remote tier.
    """

    in_memory: bool
    overlaps: bool = False
    is_remote: bool = False


class ColdLoad(NamedTuple):
    """Cold blocks that a request loads, and how many tokens the pass that waits for them computes."""

    kind: LoadKind
    num_blocks: int
    num_rest: int


class Way(Enum):
    """What becomes of cold blocks: load them all, compute them all, or compute the first ones while the last load."""

    LOAD = "load"
    COMPUTE = "compute"
    OVERLAP = "overlap"


class ColdCosts(NamedTuple):
    """What one rank knows of the cold blocks at the end of a lookup, as whole numbers, so that ranks can exchange it.

    first, end: the blocks of the prompt that are cold. in_memory: 1 if the page cache has them. is_remote: 1 if some
    lie in a remote tier. may_overlap: 1 if the caller can compute some while others load.
    Times are microseconds to the first token, -1 where not measured: of loading, of computing, of both side by side,
    and of the pass that follows a load.
    """

    first: int
    end: int
    in_memory: int
    is_remote: int
    may_overlap: int
    loading_us: int = _UNKNOWN
    computing_us: int = _UNKNOWN
    overlapping_us: int = _UNKNOWN
    rest_us: int = _UNKNOWN


class Decision(NamedTuple):
    """first, end: the blocks that OVERLAP divides between engine and loader. is_trial: this way is not measured yet."""

    way: Way
    first: int
    end: int
    is_trial: bool = False


@dataclass(frozen=True, slots=True)
class ColdPlan:
    """later: blocks to load while the engine computes those before them. dropped: blocks not to load at all.

    At most one of the two has blocks; if neither has, all blocks are loaded first. load: how the load is recorded.
    num_kept: blocks of the lookup that are loaded first; None for all. num_surplus: those after `later` that other
    ranks lack.
    """

    later: list[Hit] = field(default_factory=list)
    dropped: list[Hit] = field(default_factory=list)
    load: ColdLoad | None = None
    num_kept: int | None = None
    num_surplus: int = 0


class CostBySize:
    """Medians of the last works of about each size (a power of two); in between, straight lines. Thread-safe.

    is_pass: the works are forward passes, of which the faster one counts where there are two: the first of its size may
    have compiled a kernel. Of loads their mean counts: one that was slow may be so again, and computing is safe.
    """

    def __init__(self, *, is_pass: bool = False) -> None:
        self._median: Callable[[list[float]], float] = statistics.median_low if is_pass else statistics.median
        self._works: dict[int, deque[tuple[int, float]]] = {}
        self._beliefs: dict[int, float] = {}
        self._points: list[tuple[int, float]] | None = None

    @property
    def is_measured(self) -> bool:
        """Whether any work was recorded."""
        return bool(self._works)

    def add(self, size: int, seconds: float) -> None:
        """Record a work of that size, such as a pass of so many new tokens."""
        if size > 0:
            self._works.setdefault(size.bit_length(), deque(maxlen=_MEMORY)).append((size, seconds))
            self._beliefs.pop(size.bit_length(), None)
            self._points = None

    def estimate(self, size: int) -> float | None:
        """Return the seconds that a work of that size takes, as far as believed; None before anything is measured.

        Below the smallest size measured it costs what that costs; above the largest, in proportion.
        """
        seconds = self._interpolate(size)
        return None if seconds is None else seconds * self._beliefs.get(size.bit_length(), 1.0)

    def forget(self, size: int) -> None:
        """Lower the estimate of that size a little, until a work of it is measured again: it may be faster now.

        Works of other sizes do not restore it: they may be frequent and say nothing about this size.
        """
        self._beliefs[size.bit_length()] = _FORGOTTEN * self._beliefs.get(size.bit_length(), 1.0)

    def points(self) -> list[tuple[int, float]]:
        """Return (size, seconds) of the median work of about each size."""
        works_by_size = [list(works) for works in list(self._works.values())]  # other threads may be adding
        return sorted(
            (statistics.median_low([n for n, _ in works]), self._median([s for _, s in works]))
            for works in works_by_size
        )

    def _interpolate(self, size: int) -> float | None:
        points = self._points
        if points is None:
            points = self._points = self.points()
        if not points:
            return None
        if size >= points[-1][0]:
            return points[-1][1] * size / points[-1][0]
        before = points[0]
        for at, seconds in points:
            if size <= at:
                span = at - before[0]
                share = (size - before[0]) / span if span > 0 else 1.0
                return before[1] + max(share, 0.0) * (seconds - before[1])
            before = (at, seconds)
        raise AssertionError("the largest size was compared first")


class RecomputeOrLoad:
    """What loading and computing took in one cache, and the choice that follows from it.

    Until both are measured all blocks are loaded; then an overlap of both is tried. The estimate of a way that is not
    chosen falls a little each time, until that way is tried again. Blocks of up to `piece_tokens` tokens never overlap.
    pass_costs: seconds of a forward pass, by new tokens. load_costs: seconds that loads add to a request, by blocks.
    """

    def __init__(self, *, block_size: int, piece_tokens: int) -> None:
        self.pass_costs: CostBySize = CostBySize(is_pass=True)
        self.load_costs: defaultdict[LoadKind, CostBySize] = defaultdict(CostBySize)
        self.piece_blocks: int = max(1, piece_tokens // block_size)
        self._piece_tokens = piece_tokens
        self._block_size = block_size

    def record_load(self, load: ColdLoad, seconds: float) -> None:
        """Record how long it took from `acquire` to the first token of a request with that load."""
        rest_s = self.pass_costs.estimate(load.num_rest) or 0.0
        self.load_costs[load.kind].add(load.num_blocks, max(0.0, seconds - rest_s))

    def pass_s(self, num_blocks: int) -> float | None:
        """Return the seconds that so many blocks take in one forward pass; None if unknown."""
        return self.pass_costs.estimate(num_blocks * self._block_size)

    def is_worth_asking(self, num_blocks: int, num_rest: int) -> bool:
        """Return whether remote tiers may give blocks sooner than they are computed; True until both are measured.

        num_blocks: as many as they may have. num_rest: tokens behind those. To ask costs a round trip.
        """
        alone = LoadKind(in_memory=False, is_remote=True)
        num_tokens = num_blocks * self._block_size
        kinds = [alone, alone._replace(overlaps=True)] if num_tokens > self._piece_tokens else [alone]
        computing, rest = self.pass_costs.estimate(num_tokens + num_rest), self.pass_costs.estimate(num_rest)
        if computing is None or rest is None:
            return True
        for kind in kinds:
            loading = self.load_costs[kind].estimate(num_blocks)
            if loading is None or loading + rest <= computing:
                return True
        for kind in kinds:
            self.load_costs[kind].forget(num_blocks)
        return False

    def costs(self, found: Lookup, num_tokens: int, *, overlap: bool) -> ColdCosts | None:
        """Return the costs of the cold blocks at the end of a lookup for a prompt of so many tokens; None without any.

        overlap: whether the caller can compute blocks while others load.
        """
        cold = _cold_of(found)
        if not cold:
            return None
        end = len(found.hot) + len(found.blocks)
        first, num_rest = end - len(cold), num_tokens - found.num_tokens
        alone = LoadKind(are_in_memory(cold), is_remote=are_remote(cold))
        if not overlap:
            return ColdCosts(first, end, int(alone.in_memory), int(alone.is_remote), 0)
        both = self.load_costs[alone._replace(overlaps=True)].estimate(len(cold))
        return ColdCosts(
            first,
            end,
            int(alone.in_memory),
            int(alone.is_remote),
            int(not (found.partial_block and found.partial_block.tier is not Tier.COLD)),
            loading_us=_us(self.load_costs[alone].estimate(len(cold))),
            computing_us=_us(self.pass_costs.estimate(len(cold) * self._block_size + num_rest)),
            overlapping_us=_us(both),
            rest_us=_us(self.pass_costs.estimate(num_rest)),
        )

    def decide(self, costs: Sequence[ColdCosts], *, are_all: bool = True) -> Decision:
        """Return the decision for the costs of all ranks that have cold blocks; see `decide`."""
        return decide(costs, are_all=are_all, min_overlap=self._piece_tokens // self._block_size)

    def plan(self, found: Lookup, num_tokens: int, own: ColdCosts, decision: Decision) -> ColdPlan:
        """Return what to do with the cold blocks at the end of a lookup. Estimates of other ways fall a little.

        own: the costs of this lookup. decision: for them, and for those of other ranks.
        """
        cold, num_rest = _cold_of(found), num_tokens - found.num_tokens
        alone = LoadKind(bool(own.in_memory), is_remote=bool(own.is_remote))
        both = alone._replace(overlaps=True)
        chosen = {Way.LOAD: alone, Way.OVERLAP: both}.get(decision.way)
        for kind in (alone, both):
            if kind is not chosen and not decision.is_trial:  # a trial is not always measured: it lowers no estimate
                self.load_costs[kind].forget(len(cold))
        if decision.way is Way.COMPUTE:
            return ColdPlan(dropped=cold, num_kept=len(found.blocks) - len(cold))
        if decision.way is Way.LOAD:
            return ColdPlan(load=ColdLoad(alone, len(cold), num_rest))
        first, end = decision.first - len(found.hot), decision.end - len(found.hot)
        later = found.blocks[first:end]
        return ColdPlan(
            later=later,
            load=ColdLoad(both, len(later), num_rest),
            num_kept=first,
            num_surplus=len(found.blocks) - end,
        )


def decide(costs: Sequence[ColdCosts], *, are_all: bool, min_overlap: int) -> Decision:
    """Return one decision for all ranks, by the slowest one's times.

    costs: of the ranks with cold blocks. are_all: whether every rank has some; else nothing can overlap on all of them.
    min_overlap: overlaps are of more blocks. The blocks that overlap are cold on every rank. Until both ways are
    measured everywhere all blocks are loaded; then an overlap is tried.
    """
    first, end = max(each.first for each in costs), min(each.end for each in costs)
    loading, computing, rest = (
        _slowest(each) for each in zip(*((c.loading_us, c.computing_us, c.rest_us) for c in costs), strict=True)
    )
    if loading is None or computing is None or rest is None:
        return Decision(Way.LOAD, first, end, is_trial=True)
    ways = [(loading + rest, Way.LOAD), (computing, Way.COMPUTE)]
    if are_all and all(each.may_overlap for each in costs) and end - first > min_overlap:
        overlapping = _slowest([each.overlapping_us for each in costs])
        if overlapping is None:
            return Decision(Way.OVERLAP, first, end, is_trial=True)
        ways.append((overlapping + rest, Way.OVERLAP))
    return Decision(min(ways, key=lambda each: each[0])[1], first, end)


def _cold_of(found: Lookup) -> list[Hit]:
    """Return the cold blocks at the end of a lookup."""
    return list(takewhile(lambda hit: hit.tier is Tier.COLD, reversed(found.blocks)))[::-1]


def _us(seconds: float | None) -> int:
    return _UNKNOWN if seconds is None else round(seconds * 1e6)


def _slowest(times_us: Sequence[int]) -> int | None:
    return None if min(times_us) < 0 else max(times_us)
