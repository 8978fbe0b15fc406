"""Compute or load: what becomes of the cold blocks at the end of what was found, by what each way took before."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile

from tierkv.transfer.costs import ColdLoad, LoadKind
from tierkv.transfer.lookup import Hit, Lookup, are_in_memory
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import Tier

__all__ = ["ColdPlan", "ColdPlanner"]


@dataclass(frozen=True, slots=True)
class ColdPlan:
    """later: blocks to load while those before them are computed. dropped: blocks not to load at all.

    One of them is empty. If both are, all is loaded before anything is computed. load: what loading them is counted as.
    """

    later: list[Hit] = field(default_factory=list)
    dropped: list[Hit] = field(default_factory=list)
    load: ColdLoad | None = None


class ColdPlanner:
    """Chooses between loading cold blocks, computing them, and both at once.

    Nothing is foretold from bandwidths: copies, decoding and a forward pass slow each other down. Until loading and
    computing are measured all is loaded; then sharing the work is tried. A load that is not chosen is believed in a
    little less each time, until it is tried again. piece_tokens: only of more tokens than that the work is shared.
    """

    def __init__(self, tiers: Tiers, *, piece_tokens: int) -> None:
        self._tiers = tiers
        self._piece_tokens = piece_tokens
        self._block_size = tiers.layout.block_size

    def plan(self, found: Lookup, num_tokens: int, *, may_split: bool) -> ColdPlan:
        """Return what to do with the cold blocks at the end of a lookup for a prompt of so many tokens."""
        cold = list(takewhile(lambda hit: hit.tier is Tier.COLD, reversed(found.blocks)))[::-1]
        if not cold:
            return ColdPlan()
        num_rest = num_tokens - found.num_tokens
        alone = LoadKind(are_in_memory(cold))
        to_load = ColdPlan(load=ColdLoad(alone, len(cold), num_rest))
        if not may_split:
            return to_load
        costs, loads = self._tiers.step_costs, self._tiers.load_costs
        num_cold = len(cold) * self._block_size
        computing, rest = costs.estimate(num_cold + num_rest), costs.estimate(num_rest)
        loading = loads[alone].estimate(len(cold))
        if loading is None or computing is None or rest is None:
            return to_load
        plans = [(loading + rest, to_load), (computing, ColdPlan(dropped=cold))]
        if num_cold > self._piece_tokens and not (found.partial_block and found.partial_block.tier is not Tier.COLD):
            split = LoadKind(alone.in_memory, is_split=True)
            sharing = loads[split].estimate(len(cold))
            to_share = ColdPlan(later=cold, load=ColdLoad(split, len(cold), num_rest))
            if sharing is None:
                return to_share  # a trial, which is not always measured, makes no other way less believed
            plans.append((sharing + rest, to_share))
        chosen = min(plans, key=lambda each: each[0])[1]
        for _, plan in plans:
            if plan is not chosen and plan.load:
                loads[plan.load.kind].forget(len(cold))
        return chosen
