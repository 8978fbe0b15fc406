"""MemoryReport: what a profiled run was, written as a page or as a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.profiling.advice import EvictionSummary, Suggestion
from tierkv.profiling.chrome_trace import trace_of
from tierkv.profiling.profile import MemorySnapshot
from tierkv.profiling.profiled_run import ProfiledRun
from tierkv.profiling.report_html import render_page
from tierkv.values.block import Tier
from tierkv.values.files import check_path, write_whole

__all__ = ["MemoryReport"]


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
        """What the evictions of each tier in memory were."""
        return {tier: self.run.measured.eviction_summary(tier) for tier in (Tier.HOT, Tier.WARM)}

    @property
    def optimization_suggestions(self) -> Sequence[Suggestion]:
        """Settings to change, and what this run would have had of it."""
        return self.run.suggestions

    def save_html(self, path: str | Path) -> Path:
        """Write one page that needs nothing else: no network, no script. Return its path."""
        return _write(path, render_page(self.run))

    def export_trace(self, path: str | Path) -> Path:
        """Write the run as Chrome trace events, for ui.perfetto.dev or chrome://tracing. Return the path."""
        return _write(path, json.dumps(trace_of(self.run)))


def _write(path: str | Path, text: str) -> Path:
    """Write a file of text. Raises ConfigError where that cannot be done."""
    target = check_path(path)
    try:
        write_whole(target, text.encode(errors="backslashreplace"))  # a path in the text need not be Unicode
    except OSError as exc:
        raise ConfigError(f"cannot write {target}: {exc.strerror}") from exc
    return target
