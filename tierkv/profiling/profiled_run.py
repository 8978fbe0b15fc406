"""A profiled run as one value: everything that was recorded of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tierkv.profiling.first_tokens import FirstTokens
from tierkv.profiling.measured import Measured
from tierkv.profiling.prefixes import PrefixUse
from tierkv.profiling.tracker import MemoryAllocation
from tierkv.values.block import Tier
from tierkv.values.events import Span
from tierkv.values.stats import CacheStats

__all__ = ["HeatMap", "Iteration", "MemorySnapshot", "ProfiledRun", "Suggestion", "TokenShare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySnapshot:
    """The memory of a cache at one moment. timestamp: seconds of the profiler's clock; bytes as CacheStats has them."""

    timestamp: float
    total_allocated: int
    stats: CacheStats

    @property
    def block_distribution(self) -> dict[Tier, int]:
        """Blocks by the tier that has them."""
        return {tier: each.blocks for tier, each in self.stats.tiers.items()}

    @property
    def fragmentation_ratio(self) -> float:
        """0 where the hot pool's free blocks are one run, towards 1 where they are scattered."""
        return self.stats.fragmentation_ratio

    @property
    def cache_hit_rate(self) -> float:
        """Share of the blocks asked for so far that some tier answered."""
        return self.stats.hit_rate


@dataclass(slots=True, kw_only=True)
class Iteration:
    """One pass of the caller's loop, and the requests that began in it.

    hits and misses count blocks. label: the caller's name for the pass, or empty.
    """

    number: int
    label: str
    thread: str
    started: float
    ended: float = 0.0
    requests: int = 0
    prompt_tokens: int = 0
    misses: int = 0
    hits: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))
    hit_tokens: dict[Tier, int] = field(default_factory=lambda: dict.fromkeys(Tier, 0))


class HeatMap:
    """Uses of hot blocks over time, in at most `max_bins` bins: where these do not reach, pairs of bins are merged.

    bin_s: seconds of a bin now. `cells` maps (block id, bin) to uses.
    """

    def __init__(self, started: float, *, bin_s: float = 0.01, max_bins: int = 96) -> None:
        self.started = started
        self.bin_s: float = bin_s
        self.cells: dict[tuple[int, int], int] = {}
        self._max_bins = max_bins

    def add(self, block_ids: Iterable[int], now: float, count: int) -> None:
        """Count uses of blocks."""
        at = int(max(now - self.started, 0.0) / self.bin_s)
        while at >= self._max_bins:
            self._merge_bins()
            at = int((now - self.started) / self.bin_s)
        cells = self.cells
        for block_id in block_ids:
            cell = block_id, at
            cells[cell] = cells.get(cell, 0) + count

    def _merge_bins(self) -> None:
        merged: dict[tuple[int, int], int] = {}
        for (block_id, at), count in self.cells.items():
            merged[block_id, at // 2] = merged.get((block_id, at // 2), 0) + count
        self.cells = merged
        self.bin_s *= 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestion:
    """One setting to change. now, proposed: its values, readable. effect: what this run would have had of it.

    evidence: the figures that it follows from.
    """

    setting: str
    now: str
    proposed: str
    effect: str
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenShare:
    """Where the prompt tokens of a stretch of the run came from. computed: needed prefill."""

    name: str
    tokens: Mapping[Tier, int]
    computed: int

    @property
    def total(self) -> int:
        """Prompt tokens, found or computed."""
        return sum(self.tokens.values()) + self.computed


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledRun:
    """A run. started, ended: seconds of the profiler's clock; about and notes are texts for the report's reader.

    allocations: the tracker's summary. pools: its allocations that are no blocks. first_tokens: of the requests whose
    times the caller recorded.
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
    first_tokens: FirstTokens = field(default_factory=FirstTokens)

    @property
    def seconds(self) -> float:
        """How long it was recorded."""
        return self.ended - self.started

    def token_shares(self, *, most: int = 60) -> list[TokenShare]:
        """Return where the tokens came from, for each iteration; without iterations, between snapshots.

        Neighbours are merged until at most `most` are left.
        """
        shares = list(self._shares_of_iterations() if self.iterations else self._shares_of_snapshots())
        step = -(-len(shares) // most) or 1
        return [_merged(shares[at : at + step]) for at in range(0, len(shares), step)]

    def _shares_of_iterations(self) -> Iterator[TokenShare]:
        for each in self.iterations:
            if each.requests:
                computed = each.prompt_tokens - sum(each.hit_tokens.values())
                yield TokenShare(name=each.label or f"{each.number + 1}", tokens=each.hit_tokens, computed=computed)

    def _shares_of_snapshots(self) -> Iterator[TokenShare]:
        for before, after in zip(self.snapshots, self.snapshots[1:], strict=False):
            if after.stats.requests == before.stats.requests:
                continue
            tokens = {
                tier: each.hit_tokens - before.stats.of(tier).hit_tokens for tier, each in after.stats.tiers.items()
            }
            computed = after.stats.prompt_tokens - before.stats.prompt_tokens - sum(tokens.values())
            yield TokenShare(name=f"{after.timestamp - self.started:.2f} s", tokens=tokens, computed=computed)


def _merged(shares: Sequence[TokenShare]) -> TokenShare:
    names = [share.name for share in shares]
    return TokenShare(
        name=names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}",
        tokens={tier: sum(share.tokens.get(tier, 0) for share in shares) for tier in Tier},
        computed=sum(share.computed for share in shares),
    )
