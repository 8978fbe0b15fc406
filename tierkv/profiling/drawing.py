"""Draws charts with matplotlib, which the extra `report` brings: as SVG for the page, as PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from tierkv.errors import ConfigError
from tierkv.profiling.charts import COLORS, Chart
from tierkv.values.files import write_whole

__all__ = ["can_draw", "require_matplotlib", "save_png", "svg_of"]

_SVG_INCHES = (4.6, 2.7)  # narrow on purpose: a phone shows the chart at about its own size, so its text stays readable
_MAX_TICKS = 6  # so that their labels keep apart where the page is 390 pixels wide
_INK = {"#000000": "var(--soft)", "#ffffff": "var(--card)", "#b0b0b0": "var(--rule)"}  # matplotlib's own colors


def require_matplotlib() -> None:
    """Raise ConfigError where matplotlib is missing."""
    if not can_draw():
        raise ConfigError("plots need matplotlib", hint="pip install 'tierkv[report]'")


def can_draw() -> bool:
    """Return whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def svg_of(chart: Chart) -> str:
    """Return the chart as an SVG element whose colors are the variables of the page's style sheet."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": chart.label, "font.size": 12, "lines.linewidth": 1.5}):
        figure = Figure(figsize=_SVG_INCHES, layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        _draw(figure.add_subplot(), chart)
        canvas.print_svg(text, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*(viewBox="[^"]*")[^>]*>', rf'<svg \1 role="img" aria-label="{escape(chart.label)}">', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the page has several charts, and an id only once
    for color, variable in (_INK | {color: f"var(--{name})" for name, color in COLORS.items()}).items():
        svg = svg.replace(color, variable)
    return svg


def save_png(path: Path, title: str, charts: Sequence[Chart], *, heights: Sequence[int] = (1,)) -> None:
    """Write charts below each other. Needs no display and no state of pyplot. Raises ConfigError where it cannot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(charts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, chart in zip(rows, charts, strict=True):
        _draw(axes, chart)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    try:
        write_whole(path, image.getvalue())
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc


def _draw(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.grid(True, color="#b0b0b0", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.draw is None:
        axes.set_axis_off()
        axes.text(0.5, 0.5, chart.caption, ha="center", transform=axes.transAxes)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(nbins=_MAX_TICKS, steps=[1, 2, 5, 10]))
        chart.draw(axes)
