"""MemoryReport and MemoryVisualizer: a profiled run, written as a page, as a trace, or as plots."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.profiling.charts import (
    eviction_chart,
    fragmentation_chart,
    free_blocks_chart,
    heat_chart,
    memory_chart,
)
from tierkv.profiling.chrome_trace import trace_of
from tierkv.profiling.drawing import require_matplotlib, save_png
from tierkv.profiling.measured import EvictionSummary
from tierkv.profiling.profiled_run import MemorySnapshot, ProfiledRun, Suggestion
from tierkv.profiling.report_html import render_page
from tierkv.values.block import Tier
from tierkv.values.files import check_path, write_whole

__all__ = ["MemoryReport", "MemoryVisualizer"]


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """One run, analyzed. `run` has every figure that the page shows."""

    run: ProfiledRun

    @property
    def allocation_timeline(self) -> Sequence[MemorySnapshot]:
        """Sizes and counters over time."""
        return self.run.snapshots

    @property
    def memory_heatmap(self) -> dict[tuple[int, int], int]:
        """Uses by (block id, bin of time); `run.heat.bin_s` is the width of a bin."""
        return dict(self.run.heat.cells)

    @property
    def eviction_analysis(self) -> dict[Tier, EvictionSummary]:
        """Summary of the evictions of the hot and the warm tier."""
        return {tier: self.run.measured.eviction_summary(tier) for tier in (Tier.HOT, Tier.WARM)}

    @property
    def optimization_suggestions(self) -> Sequence[Suggestion]:
        """Settings to change, each with its effect on this run."""
        return self.run.suggestions

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else: no network, no script. Return its path."""
        return _write(path, render_page(self.run))

    def export_trace(self, path: str | Path) -> Path:
        """Write the run as Chrome trace events, for ui.perfetto.dev or chrome://tracing. Return the path."""
        return _write(path, json.dumps(trace_of(self.run)))


class MemoryVisualizer:
    """Plots one report as PNG files. Needs matplotlib, of the extra `report`; raises ConfigError without it."""

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


def _write(path: str | Path, text: str) -> Path:
    """Write a text file. Raises ConfigError where that fails."""
    target = check_path(path)
    try:
        write_whole(target, text.encode(errors="backslashreplace"))  # a path in the text need not be Unicode
    except OSError as exc:
        raise ConfigError(f"cannot write {target}: {exc.strerror}") from exc
    return target
