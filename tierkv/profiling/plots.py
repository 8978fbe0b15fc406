"""MemoryVisualizer: a profiled run as PNG plots. Needs matplotlib, of the extra `report`."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tierkv.block import Tier
from tierkv.errors import ConfigError
from tierkv.files import write_whole
from tierkv.profiling.memory_report import MemoryReport

__all__ = ["MemoryVisualizer"]

_COLORS = {Tier.HOT: "#c8501e", Tier.WARM: "#d99a00", Tier.COLD: "#1f6fb2"}
_MIB = 1 << 20
_NUM_BINS = 60


class MemoryVisualizer:
    """Plots one report. Raises ConfigError where matplotlib is missing. Draws without a display or pyplot's state."""

    def __init__(self, report: MemoryReport) -> None:
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as exc:
            raise ConfigError("plots need matplotlib", hint="pip install 'tierkv[report]'") from exc
        self._figure_class = Figure
        self._run = report.run
        self._report = report

    def plot_allocation_timeline(self, path: str | Path = "allocation_timeline.png") -> Path:
        """Write the bytes that each tier holds over time, and the blocks evicted. Return the path."""
        with self._axes(path, rows=2, heights=(3, 1)) as (memory, evictions):
            for tier in self._run.snapshots[-1].stats.tiers:
                sizes = [each.stats.tiers[tier].stored_bytes / _MIB for each in self._run.snapshots]
                label = f"{tier.value}, of {self._run.measured.room_bytes(tier) / _MIB:,.0f} MiB"
                memory.step(self._times(), sizes, where="post", color=_COLORS[tier], label=label)
            memory.set_ylabel("MiB held")
            memory.set_ylim(bottom=0)
            memory.legend(loc="upper left")
            below: Any = np.zeros(_NUM_BINS)
            for tier in (Tier.HOT, Tier.WARM):
                times = [each.time - self._run.started for each in self._run.measured.evictions if each.tier is tier]
                counts, edges = np.histogram(times, bins=_NUM_BINS, range=(0.0, self._run.seconds or 1.0))
                width = edges[1] - edges[0]
                evictions.bar(
                    edges[:-1], counts, width, below, align="edge", color=_COLORS[tier], label=f"from {tier.value}"
                )
                below = below + counts
            evictions.set_ylabel("evictions")
            evictions.set_xlabel("seconds")
            evictions.set_ylim(0, max(1.0, 1.1 * below.max()))
            evictions.legend(loc="upper left")
        return Path(path)

    def plot_memory_heatmap(self, path: str | Path = "memory_heatmap.png") -> Path:
        """Write the uses of each hot block over time. Return the path."""
        heat = self._run.heat
        rows = max((block for block, _ in heat.cells), default=0) + 1
        columns = max((at for _, at in heat.cells), default=0) + 1
        uses = np.zeros((rows, columns))
        for cell, count in heat.cells.items():
            uses[cell] = count
        with self._axes(path) as (axes,):
            shown = np.ma.masked_equal(uses, 0)
            extent = (0.0, columns * heat.bin_s, rows - 0.5, -0.5)
            image = axes.imshow(shown, aspect="auto", extent=extent, cmap="YlOrRd", interpolation="nearest")
            axes.grid(False)
            axes.figure.colorbar(image, ax=axes, label="uses: hits, and steps that read the block")
            axes.set_ylabel("block id in the hot pool")
            axes.set_xlabel("seconds")
        return Path(path)

    def plot_fragmentation(self, path: str | Path = "fragmentation.png") -> Path:
        """Write how scattered the free hot blocks are over time, and how many are free. Return the path."""
        with self._axes(path, rows=2, heights=(1, 1)) as (scattered, free):
            ratios = [100 * each.fragmentation_ratio for each in self._run.snapshots]
            scattered.step(self._times(), ratios, where="post", color=_COLORS[Tier.HOT])
            scattered.set_ylabel("% of free blocks\noutside the longest run")
            scattered.set_ylim(0, 100)
            size = self._run.measured.block_bytes
            hot = [each.stats.tiers[Tier.HOT] for each in self._run.snapshots]
            free.step(
                self._times(), [(each.capacity_bytes - each.used_bytes) // size for each in hot],
                where="post", color="#5f6872",
            )  # fmt: skip
            free.set_ylabel("free hot blocks")
            free.set_ylim(bottom=0)
            free.set_xlabel("seconds")
        return Path(path)

    def export_trace(self, path: str | Path = "trace.json") -> Path:
        """Write the run as Chrome trace events. Return the path."""
        return self._report.export_trace(path)

    def _times(self) -> list[float]:
        return [each.timestamp - self._run.started for each in self._run.snapshots]

    @contextmanager
    def _axes(self, path: str | Path, *, rows: int = 1, heights: tuple[int, ...] = (1,)) -> Iterator[Any]:
        """Yield the axes of a new figure, which is written when the block ends."""
        figure = self._figure_class(figsize=(9, 5), dpi=110, layout="constrained")
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        figure.suptitle(self._run.title)
        for each in axes:
            each.grid(True, alpha=0.3)
            each.spines[["top", "right"]].set_visible(False)
        yield axes
        image = io.BytesIO()
        figure.savefig(image, format="png")
        write_whole(path, image.getvalue())
