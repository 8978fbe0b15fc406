"""MemoryVisualizer: a profiled run as PNG plots. Needs matplotlib, of the extra `report`."""

from __future__ import annotations

from pathlib import Path

from tierkv.profiling.charts import (
    eviction_chart,
    fragmentation_chart,
    free_blocks_chart,
    heat_chart,
    memory_chart,
)
from tierkv.profiling.drawing import require_matplotlib, save_png
from tierkv.profiling.memory_report import MemoryReport

__all__ = ["MemoryVisualizer"]


class MemoryVisualizer:
    """Plots one report. Raises ConfigError where matplotlib is missing."""

    def __init__(self, report: MemoryReport) -> None:
        require_matplotlib()
        self._run = report.run
        self._report = report

    def plot_allocation_timeline(self, path: str | Path = "allocation_timeline.png") -> Path:
        """Write the bytes that each tier holds over time, and the blocks evicted. Return the path."""
        charts = [memory_chart(self._run), eviction_chart(self._run)]
        save_png(Path(path), self._run.title, charts, heights=(2, 1))
        return Path(path)

    def plot_memory_heatmap(self, path: str | Path = "memory_heatmap.png") -> Path:
        """Write the uses of each hot block over time. Return the path."""
        save_png(Path(path), self._run.title, [heat_chart(self._run)])
        return Path(path)

    def plot_fragmentation(self, path: str | Path = "fragmentation.png") -> Path:
        """Write how scattered the free hot blocks are over time, and how many are free. Return the path."""
        charts = [fragmentation_chart(self._run), free_blocks_chart(self._run)]
        save_png(Path(path), self._run.title, charts, heights=(1, 1))
        return Path(path)

    def export_trace(self, path: str | Path = "trace.json") -> Path:
        """Write the run as Chrome trace events. Return the path."""
        return self._report.export_trace(path)
