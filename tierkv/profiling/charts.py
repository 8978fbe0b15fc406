"""The charts of a profiled run, drawn on matplotlib's axes for the page and for the PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from tierkv.profiling.profiled_run import ProfiledRun
from tierkv.values.block import Tier
from tierkv.values.units import format_bytes

__all__ = [
    "COLORS",
    "Chart",
    "eviction_chart",
    "fragmentation_chart",
    "free_blocks_chart",
    "heat_chart",
    "hit_curve_chart",
    "memory_chart",
    "token_chart",
]

COLORS = {"hot": "#c8501e", "warm": "#d99a00", "cold": "#1f6fb2", "computed": "#a3a9b0", "soft": "#5f6872"}

_MAX_ROWS = 48
_NUM_BINS = 32
_LEAST_SHARE = 0.01  # that can be seen in a chart of 0 to 100 %
_LEGEND = {"borderpad": 0, "columnspacing": 0.9, "handlelength": 1.2, "handletextpad": 0.4}
_UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))

Axes: TypeAlias = Any  # matplotlib's, which is optional


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart. label: its alternative text. caption: the sentence below it.

    draw: draws it on axes; None where there is nothing to show, as the caption says.
    """

    label: str
    caption: str
    draw: Callable[[Axes], None] | None


def token_chart(run: ProfiledRun) -> Chart:
    """Prompt tokens by the tier that had them, a bar per iteration."""
    shares = run.token_shares()
    if not shares:
        return Chart("", "No request was made.", None)
    what = "iteration" if run.iterations else "stretch between snapshots"

    def draw(axes: Axes) -> None:
        parts = {tier.value: [100 * each.tokens.get(tier, 0) / each.total for each in shares] for tier in Tier}
        parts["computed"] = [100 * each.computed / each.total for each in shares]
        _stack(axes, np.arange(1, len(shares) + 1), parts, width=0.85)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel(what)
        axes.set_ylim(0, 100)
        _percent(axes)

    names = f"{shares[0].name} to {shares[-1].name}" if len(shares) > 1 else shares[0].name
    caption = f"Share of the prompt tokens of each {what} that each tier answered: {names}."
    return Chart(f"Share of prompt tokens by tier, for each {what}", caption, draw)


def memory_chart(run: ProfiledRun) -> Chart:
    """Bytes that each tier holds, over time."""
    most = max(each.stored_bytes for snapshot in run.snapshots for each in snapshot.stats.tiers.values())
    if not most:
        return Chart("", "No tier held a block at a snapshot.", None)

    def draw(axes: Axes) -> None:
        unit, unit_bytes = next((name, size) for name, size in _UNITS if most >= size or size == 1)
        for tier in run.snapshots[-1].stats.tiers:
            sizes = [each.stats.of(tier).stored_bytes / unit_bytes for each in run.snapshots]
            axes.step(_times(run), sizes, where="post", color=COLORS[tier.value], label=tier.value)
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")
        _legend(axes)

    rooms = {tier.value: format_bytes(run.measured.room_bytes(tier)) for tier in run.snapshots[-1].stats.tiers}
    caption = "Bytes of blocks that each tier held at each snapshot; of the cold tier as they are stored. Room: "
    caption += ", ".join(f"{name} {room}" for name, room in rooms.items()) + "."
    return Chart("Bytes held by each tier over time", caption, draw)


def heat_chart(run: ProfiledRun) -> Chart:
    """Uses by block and time. Neighbouring blocks share a row where there are more than fit."""
    cells = run.heat.cells
    if not cells:
        return Chart("", "No hot block was used.", None)
    num_blocks = max(block for block, _ in cells) + 1
    step = -(-num_blocks // _MAX_ROWS)
    uses = np.zeros((-(-num_blocks // step), max(at for _, at in cells) + 1))
    for (block, at), count in cells.items():
        uses[block // step, at] += count

    def draw(axes: Axes) -> None:
        from matplotlib.colors import LinearSegmentedColormap, to_rgba

        shades = LinearSegmentedColormap.from_list("uses", [to_rgba(COLORS["hot"], alpha) for alpha in (0.2, 1.0)])
        edges = np.arange(uses.shape[1] + 1) * run.heat.bin_s
        rows = np.arange(uses.shape[0] + 1) * step
        shown = np.ma.masked_equal(np.log1p(uses), 0)  # by the logarithm, so that rare uses stay visible
        axes.pcolormesh(edges, rows, shown, cmap=shades, vmin=0)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_ylabel("block id")
        axes.set_xlabel("seconds")

    rows = "A row is one block id" if step == 1 else f"A row is {step} neighbouring block ids"
    seconds = f"{run.heat.bin_s:.3g} s"
    caption = f"{rows} of the hot pool, a column {seconds}; the stronger, the more hits and steps used it."
    return Chart("Uses of hot blocks over time", caption, draw)


def hit_curve_chart(run: ProfiledRun) -> Chart:
    """Hits that LRU caches of other sizes would have had in this run."""
    measured = run.measured
    curve = measured.curve()
    if not curve.largest:
        return Chart("", "No block was asked for twice, so no size of cache could have answered more.", None)
    largest = max(int(1.15 * curve.largest), 4)
    sizes = [*range(0, largest, max(1, largest // 200)), largest]
    capacities = {tier.value: measured.capacity(tier) for tier in (Tier.HOT, Tier.WARM)}

    def draw(axes: Axes) -> None:
        axes.plot(sizes, [100 * curve.hits(size) / curve.asked for size in sizes], color=COLORS["soft"])
        for name, size in capacities.items():
            if size <= largest:
                axes.axvline(size, color=COLORS[name], linestyle="--", label=f"{name} now")
                _legend(axes)
        axes.set_ylim(0, 100)
        axes.set_xlabel("blocks that fit")
        _percent(axes)

    caption = f"Share of the {curve.asked:,} blocks asked for that one LRU cache of that size would have held."
    beyond = [f"the {name} tier ({size:,} blocks)" for name, size in capacities.items() if size > largest]
    if beyond:
        caption += f" To the right of it: {' and '.join(beyond)}."
    caption += f" Beyond {curve.largest:,} blocks nothing is gained."
    return Chart("Share of blocks that a cache of each size would have answered", caption, draw)


def fragmentation_chart(run: ProfiledRun) -> Chart:
    """Fragmentation of the free hot blocks, over time."""
    most = max(each.fragmentation_ratio for each in run.snapshots)
    if most < _LEAST_SHARE:
        return Chart("", f"At most {100 * most:.2g} % of the free hot blocks lay outside the longest run.", None)

    def draw(axes: Axes) -> None:
        ratios = [100 * each.fragmentation_ratio for each in run.snapshots]
        axes.step(_times(run), ratios, where="post", color=COLORS["hot"])
        axes.set_ylim(0, 100)
        axes.set_xlabel("seconds")
        _percent(axes)

    caption = "Share of the free hot blocks that lie outside the longest run of free neighbours."
    return Chart("Fragmentation of the hot pool over time", caption, draw)


def free_blocks_chart(run: ProfiledRun) -> Chart:
    """Free hot blocks, over time."""

    def draw(axes: Axes) -> None:
        hot = [each.stats.of(Tier.HOT) for each in run.snapshots]
        free = [(each.capacity_bytes - each.used_bytes) // run.measured.block_bytes for each in hot]
        axes.step(_times(run), free, where="post", color=COLORS["soft"])
        axes.set_ylabel("free hot blocks")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("seconds")

    return Chart("Free hot blocks over time", "Hot blocks that hold nothing.", draw)


def eviction_chart(run: ProfiledRun) -> Chart:
    """Evictions over time."""
    evictions = run.measured.evictions
    if not evictions:
        return Chart("", "Neither the hot nor the warm tier evicted a block.", None)
    span = run.seconds or 1.0

    def draw(axes: Axes) -> None:
        counts: dict[str, Any] = {}
        for tier in (Tier.HOT, Tier.WARM):
            times = [min(each.time - run.started, span) for each in evictions if each.tier is tier]
            counts[tier.value], edges = np.histogram(times, bins=_NUM_BINS, range=(0.0, span))
        _stack(axes, (edges[:-1] + edges[1:]) / 2, counts, width=span / _NUM_BINS)
        axes.set_ylabel("evictions")
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("seconds")

    caption = f"Blocks that a tier forgot, in {span / _NUM_BINS:.2g} s each."
    return Chart("Evictions over time by tier", caption, draw)


def _stack(axes: Axes, places: Any, parts: Mapping[str, Any], *, width: float) -> None:
    below = np.zeros(len(places))
    for name, values in parts.items():
        axes.bar(places, values, width, below, color=COLORS[name], label=name)
        below = below + np.asarray(values)
    axes.set_ylim(0, max(1.0, 1.1 * math.ceil(below.max())))
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, where it covers nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, **_LEGEND)


def _percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0f} %")


def _times(run: ProfiledRun) -> list[float]:
    return [each.timestamp - run.started for each in run.snapshots]
