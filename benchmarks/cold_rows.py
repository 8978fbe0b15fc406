"""What the benchmarks of the cold tier print: figures beside their targets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.table import Table

__all__ = ["Row", "table_of", "wall_s"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure beside its target."""

    name: str
    value: float
    target: float | None = None
    unit: str = ""
    at_most: bool = False


def wall_s(work: Callable[[], object]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def table_of(rows: list[Row]) -> Table:
    """Return the rows as a table, with whether each target is met."""
    table = Table()
    table.add_column("figure")
    for column in ("value", "target", "met"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        met = "" if row.target is None else "yes" if (row.value <= row.target) == row.at_most else "no"
        sign = "" if row.target is None else f"{'<=' if row.at_most else '>='} {row.target:g}"
        table.add_row(row.name, f"{_number(row.value)} {row.unit}".strip(), sign, met)
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 10 else f"{value:.3f}"
