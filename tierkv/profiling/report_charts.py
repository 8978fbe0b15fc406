"""The charts of the report's page, each with the sentence that says what it shows."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from tierkv.block import Tier
from tierkv.profiling.profiled_run import ProfiledRun
from tierkv.profiling.svg import Mark, Series, heat_map, legend, line_chart, stacked_bars
from tierkv.units import format_bytes

__all__ = ["eviction_chart", "fragmentation_chart", "heat_chart", "hit_curve_chart", "memory_chart", "token_chart"]

_MAX_ROWS = 48
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))


def token_chart(run: ProfiledRun) -> tuple[str, str]:
    """Return prompt tokens by where they came from, an iteration a bar."""
    shares = run.token_shares()
    if not shares:
        return "", "No request was made."
    bars = [
        (
            share.name,
            {
                **{tier.value: 100 * share.tokens.get(tier, 0) / share.total for tier in Tier},
                "computed": 100 * share.computed / share.total,
            },
        )
        for share in shares
    ]
    names = [(tier.value, tier.value) for tier in Tier] + [("computed", "computed")]
    what = "iteration" if run.iterations else "stretch between snapshots"
    chart = stacked_bars(
        bars, label=f"Share of prompt tokens by tier, for each {what}", x_label=what, y_format=_percent, y_max=100.0
    )
    return chart + legend(names), f"Share of the prompt tokens of each {what} that each tier answered."


def memory_chart(run: ProfiledRun) -> tuple[str, str]:
    """Return the bytes that each tier holds, over time."""
    series, names = [], []
    most = max(each.stored_bytes for snapshot in run.snapshots for each in snapshot.stats.tiers.values())
    unit, unit_bytes = next((name, size) for name, size in _UNITS if most >= size or size == 1)
    for tier in run.snapshots[-1].stats.tiers:
        points = [
            (each.timestamp - run.started, each.stats.of(tier).stored_bytes / unit_bytes) for each in run.snapshots
        ]
        series.append(Series(tier.value, tier.value, points, is_stepped=True))
        names.append((tier.value, f"{tier.value}, of {format_bytes(run.measured.room_bytes(tier))}"))
    chart = line_chart(
        series,
        label="Bytes held by each tier over time",
        x_label="time",
        x_format=_time(run),
        y_format=lambda value: f"{value:g} {unit}",
    )
    return chart + legend(
        names
    ), "Bytes of blocks that each tier held at each snapshot; of the cold tier as they are stored."


def heat_chart(run: ProfiledRun) -> tuple[str, str]:
    """Return uses by block and time. Blocks are joined where there are more than fit."""
    cells = run.heat.cells
    if not cells:
        return "", "No hot block was used."
    num_blocks = max(block for block, _ in cells) + 1
    step = -(-num_blocks // _MAX_ROWS)
    joined: dict[tuple[int, int], float] = {}
    for (block, at), count in cells.items():
        joined[block // step, at] = joined.get((block // step, at), 0) + count
    columns = max(max(at for _, at in cells) + 1, 8)
    chart = heat_map(
        joined,
        rows=-(-num_blocks // step),
        columns=columns,
        label="Uses of hot blocks over time",
        x_label="time",
        x_format=lambda at: f"{at * run.heat.bin_s:.3g} s",
        row_name=lambda row: f"{row * step:.0f}",
        row_label="block" if step == 1 else "blocks from",
    )
    rows = "A row is one block id" if step == 1 else f"A row is {step} neighbouring block ids"
    return (
        chart,
        f"{rows} of the hot pool, a column {run.heat.bin_s:.3g} s; the stronger, the more hits and steps used it.",
    )


def hit_curve_chart(run: ProfiledRun) -> tuple[str, str]:
    """Return what LRU caches of other sizes would have answered of this run."""
    measured = run.measured
    curve = measured.curve()
    if not curve.largest:
        return "", "No block was asked for twice, so no size of cache could have answered more."
    hot, warm = measured.capacity(Tier.HOT), measured.capacity(Tier.WARM)
    largest = max(int(1.15 * curve.largest), 4)
    step = max(1, largest // 200)
    sizes = [*range(0, largest, step), largest]
    points = [(float(size), 100 * curve.hits(size) / curve.asked) for size in sizes]
    inside = [(tier, size) for tier, size in ((Tier.HOT, hot), (Tier.WARM, warm)) if size <= largest]
    marks = [Mark(f"{tier.value} now", tier.value, size) for tier, size in inside]
    chart = line_chart(
        [Series("hits", "plain", points)],
        label="Share of blocks that a cache of each size would have answered",
        x_label="blocks that fit",
        x_format=lambda value: f"{value:,.0f}",
        y_format=_percent,
        y_max=100.0,
        marks=marks,
    )
    beyond = [f"the {tier.value} tier ({size:,} blocks)" for tier, size in ((Tier.HOT, hot), (Tier.WARM, warm))]
    outside = [text for text, size in zip(beyond, (hot, warm), strict=True) if size > largest]
    text = f"Share of the {curve.asked:,} blocks asked for that one LRU cache of that size would have held."
    if outside:
        text += f" To the right of it: {' and '.join(outside)}."
    return chart, escape(text + f" Beyond {curve.largest:,} blocks nothing is gained.")


def fragmentation_chart(run: ProfiledRun) -> tuple[str, str]:
    """Return how scattered the free blocks are, over time."""
    points = [(each.timestamp - run.started, 100 * each.fragmentation_ratio) for each in run.snapshots]
    chart = line_chart(
        [Series("fragmentation", "hot", points, is_stepped=True)],
        label="Fragmentation of the hot pool over time",
        x_label="time",
        x_format=_time(run),
        y_format=_percent,
        y_max=100.0,
    )
    return chart, "Share of the free hot blocks that lie outside the longest run of free neighbours."


def eviction_chart(run: ProfiledRun) -> tuple[str, str]:
    """Return evictions over time."""
    evictions = run.measured.evictions
    if not evictions:
        return "", "Neither the hot nor the warm tier evicted a block."
    num_bins = 32
    width = run.seconds / num_bins or 1.0
    bars: list[tuple[str, dict[str, float]]] = [
        (f"{at * width:.3g} s", {"hot": 0.0, "warm": 0.0}) for at in range(num_bins)
    ]
    for each in evictions:
        at = min(int((each.time - run.started) / width), num_bins - 1)
        bars[at][1][each.tier.value] += 1
    chart = stacked_bars(
        bars, label="Evictions over time by tier", x_label="time", y_format=lambda value: f"{value:,.0f}"
    )
    return chart + legend(
        [("hot", "from hot"), ("warm", "from warm")]
    ), f"Blocks that a tier forgot, in {width:.2g} s each."


def _time(run: ProfiledRun) -> Callable[[float], str]:
    return lambda value: f"{value:.2f} s" if run.seconds < 20 else f"{value:.0f} s"


def _percent(value: float) -> str:
    return f"{value:.0f} %"
