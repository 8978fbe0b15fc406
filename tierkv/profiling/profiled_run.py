"""Everything that a profiler recorded of one run, as one value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tierkv.profiling.advice import Measured, Suggestion
from tierkv.profiling.ledger import MemoryAllocation
from tierkv.profiling.prefixes import PrefixUse
from tierkv.profiling.profile import HeatMap, Iteration, MemorySnapshot
from tierkv.values.block import Tier
from tierkv.values.events import Span

__all__ = ["ProfiledRun", "TokenShare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShare:
    """Where the prompt tokens of a stretch of the run came from. computed: needed prefill."""

    name: str
    tokens: Mapping[Tier, int]
    computed: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.tokens.values()) + self.computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledRun:
    """A run. started, ended: seconds of the profiler's clock; about and notes are for readers.

    allocations: the tracker's summary. pools: what it tracks besides blocks.
    """

    title: str
    about: Mapping[str, str]
    started: float
    ended: float
    measured: Measured
    snapshots: Sequence[MemorySnapshot]
    iterations: Sequence[Iteration]
    spans: Sequence[Span]
    heat: HeatMap
    allocations: Mapping[str, Any]
    pools: Sequence[MemoryAllocation]
    prefixes: Sequence[PrefixUse]
    suggestions: Sequence[Suggestion]
    notes: Sequence[str]

    @property
    def seconds(self) -> float:
        """How long it was watched."""
        return self.ended - self.started

    def token_shares(self, *, most: int = 60) -> list[TokenShare]:
        """Return where the tokens came from: an iteration each, or so many together that at most `most` are left.

        Without iterations: from one snapshot to the next.
        """
        shares = list(self._shares_of_iterations() if self.iterations else self._shares_of_snapshots())
        step = -(-len(shares) // most) or 1
        return [_joined(shares[at : at + step]) for at in range(0, len(shares), step)]

    def _shares_of_iterations(self) -> Iterator[TokenShare]:
        for each in self.iterations:
            if each.requests:
                found = sum(each.hit_tokens.values())
                name = each.label or f"{each.number + 1}"
                yield TokenShare(name=name, tokens=each.hit_tokens, computed=each.prompt_tokens - found)

    def _shares_of_snapshots(self) -> Iterator[TokenShare]:
        for before, after in zip(self.snapshots, self.snapshots[1:], strict=False):
            if after.stats.requests == before.stats.requests:
                continue
            tokens = {
                tier: each.hit_tokens - before.stats.of(tier).hit_tokens for tier, each in after.stats.tiers.items()
            }
            computed = after.stats.prompt_tokens - before.stats.prompt_tokens - sum(tokens.values())
            yield TokenShare(name=f"{after.timestamp - self.started:.2f} s", tokens=tokens, computed=computed)


def _joined(shares: Sequence[TokenShare]) -> TokenShare:
    names = [share.name for share in shares]
    return TokenShare(
        name=names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
        tokens={tier: sum(share.tokens.get(tier, 0) for share in shares) for tier in Tier},
        computed=sum(share.computed for share in shares),
    )
