"""Eviction policies on traffic of many kinds: hit rates and seconds of prefill saved, beside Belady's bound.

The trace families are generated (`benchmarks.policy_traffic`); `--trace FILE` adds recorded ones. A `*` marks a family
that was not looked at while the default was built. `lead`: how far its hit rate is above the best of the other three.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.policy_traffic import FAMILIES, HELD_OUT, make_trace
from tierkv.policies import DEFAULT_POLICY, make_policy
from tierkv.policies.replay import Outcome, replay_trace
from tierkv.policies.traces import Trace, belady_hits, read_trace
from tierkv.values.prefill import MEASURED_PREFILL

__all__ = ["main"]

_OTHERS = ("lru", "adaptive-lru", "cost-aware")
_CAPACITIES = ("1%", "2%", "5%", "10%", "20%")
_ALLOWED = -0.01
"""How far the default may be below the best other one, as a share of its hit rate."""


def main() -> None:
    """Replay every trace at every capacity and print a table; `--out FILE` keeps it."""
    parser = argparse.ArgumentParser(prog="benchmarks.policies", description=__doc__)
    parser.add_argument("--family", action="append", choices=[*FAMILIES, *HELD_OUT], help="all of them if left out")
    parser.add_argument("--trace", action="append", type=Path, default=[], help="a request trace as for tierkv replay")
    parser.add_argument("--seeds", type=int, default=1, help="traces of each family")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--out", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    sources: list[Path | tuple[str, int]] = [*arguments.trace]
    families = arguments.family or [*FAMILIES, *HELD_OUT]
    sources += [(family, seed) for family in families for seed in range(arguments.seeds)]
    console = Console(record=True, width=140)
    table = _new_table()
    rows: list[_Row] = []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for found in pool.map(partial(_measure, capacities=_CAPACITIES), sources):
            for row in found:
                _add(table, row)
            table.add_section()
            rows += found
    console.print(table)
    for line in _summary(rows):
        console.print(line, highlight=False)
    if arguments.out:
        arguments.out.write_text("\n".join(line.rstrip() for line in console.export_text().splitlines()) + "\n")


@dataclass(frozen=True, slots=True)
class _Row:
    """One trace at one capacity. outcomes: by policy. belady: the highest possible hit rate."""

    trace: str
    capacity: str
    num_blocks: int
    outcomes: dict[str, Outcome]
    belady: float

    @property
    def lead(self) -> float:
        """How far the default's hit rate is above the best other one, as a share of that."""
        best = max(self.outcomes[name].hit_rate for name in _OTHERS)
        return self.outcomes[DEFAULT_POLICY].hit_rate / best - 1 if best else 0.0


def _measure(source: Path | tuple[str, int], *, capacities: tuple[str, ...]) -> list[_Row]:
    if isinstance(source, Path):
        trace, name = read_trace(source), source.stem
    else:
        trace, name = make_trace(*source), f"{source[0]}{'*' if source[0] in HELD_OUT else ''} {source[1]}"
    return [_replay(trace, name, capacity) for capacity in capacities]


def _replay(trace: Trace, name: str, capacity: str) -> _Row:
    blocks = trace.capacity(capacity)
    outcomes = {
        policy: replay_trace(trace, make_policy(policy), blocks, MEASURED_PREFILL)
        for policy in (DEFAULT_POLICY, *_OTHERS)
    }
    return _Row(name, capacity, blocks, outcomes, belady_hits(trace.requests, blocks) / trace.num_blocks)


def _new_table() -> Table:
    table = Table(title="block hit rate, and seconds of prefill saved (8B model on an H200)", title_justify="left")
    table.add_column("trace", no_wrap=True)
    for column in ("capacity", "blocks", DEFAULT_POLICY, *_OTHERS, "Belady", "lead"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _add(table: Table, row: _Row) -> None:
    cells = [
        f"{outcome.hit_rate:.4f} {outcome.seconds_saved:5.0f}"
        for outcome in (row.outcomes[name] for name in (DEFAULT_POLICY, *_OTHERS))
    ]
    table.add_row(row.trace, row.capacity, f"{row.num_blocks:,}", *cells, f"{row.belady:.4f}", f"{row.lead:+.2%}")


def _summary(rows: list[_Row]) -> Iterator[str]:
    behind = [row for row in rows if row.lead < _ALLOWED]
    yield f"{len(behind)} of {len(rows)} rows have the default more than {-_ALLOWED:.0%} below the best other policy"
    worst = min(rows, key=lambda row: row.lead)
    yield f"worst: {worst.trace} at {worst.capacity}, {worst.lead:+.2%}"
    for name in (DEFAULT_POLICY, *_OTHERS):
        outcomes = [row.outcomes[name] for row in rows]
        mean = sum(outcome.hit_rate for outcome in outcomes) / len(outcomes)
        saved = sum(outcome.seconds_saved for outcome in outcomes)
        yield f"{name:<13} mean hit rate {mean:.4f}, prefill saved in all {saved:,.0f} s"


if __name__ == "__main__":
    main()
