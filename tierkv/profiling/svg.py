"""Small charts as inline SVG: text of the page, colors from its style sheet, no script.

The view box is narrow on purpose: on a phone a chart is shown at about its own size, so its text stays readable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Mark", "Series", "heat_map", "legend", "line_chart", "nice_ticks", "stacked_bars"]

WIDTH, HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 40
_INNER_W, _INNER_H = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

Format = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Series:
    """A line. style: a class of the style sheet, such as hot; points: (x, y) in order of x."""

    name: str
    style: str
    points: Sequence[tuple[float, float]]
    is_stepped: bool = False


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line with a name."""

    name: str
    style: str
    x: float


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where values lie in the view box."""

    x_min: float
    x_max: float
    y_max: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x_min) / (self.x_max - self.x_min or 1.0) * _INNER_W

    def y(self, value: float) -> float:
        return _TOP + _INNER_H - value / (self.y_max or 1.0) * _INNER_H


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str,
    x_format: Format,
    y_format: Format,
    y_max: float | None = None,
    marks: Sequence[Mark] = (),
) -> str:
    """Return a chart of lines from zero up. label: what it shows, for readers that cannot see it."""
    xs = [x for each in series for x, _ in each.points]
    ys = [y for each in series for _, y in each.points]
    frame = _Frame(min(xs, default=0.0), max(xs, default=1.0), y_max or nice_ticks(max(ys, default=1.0) or 1.0)[-1])
    parts = [_axes(frame, x_label, x_format, y_format)]
    for at, mark in enumerate(marks):
        x = frame.x(mark.x)
        near_end = x > WIDTH - 90
        anchor, text_x = ("end", x - 4) if near_end else ("start", x + 4)
        parts.append(f'<line class="mark {mark.style}" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + _INNER_H}"/>')
        parts.append(
            f'<text class="{anchor}" x="{text_x:.1f}" y="{_TOP + _INNER_H - 6 - 16 * at}">{escape(mark.name)}</text>'
        )
    for each in series:
        points = _stepped(each.points) if each.is_stepped else each.points
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)
        parts.append(
            f'<polyline class="line {each.style}" points="{path}"><title>{escape(each.name)}</title></polyline>'
        )
    return _svg(label, parts)


def stacked_bars(
    bars: Sequence[tuple[str, Mapping[str, float]]],
    *,
    label: str,
    x_label: str,
    y_format: Format,
    y_max: float | None = None,
) -> str:
    """Return a chart of bars. bars: (name, value by style), stacked in the order of the mapping."""
    top = y_max or nice_ticks(max((sum(values.values()) for _, values in bars), default=1.0) or 1.0)[-1]
    frame = _Frame(0.0, max(len(bars), 1), top)
    parts = [_axes(frame, x_label, None, y_format)]
    gap = 0.15 if len(bars) < 60 else 0.0
    for at, (name, values) in enumerate(bars):
        low = 0.0
        for style, value in values.items():
            if value <= 0:
                continue
            x, y = frame.x(at + gap / 2), frame.y(low + value)
            size = f'width="{frame.x(at + 1 - gap / 2) - x:.1f}" height="{max(frame.y(low) - y, 0):.1f}"'
            title = escape(f"{name}: {style} {y_format(value)}")
            parts.append(f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" {size}><title>{title}</title></rect>')
            low += value
    for at in sorted({0, len(bars) - 1} if bars else set()):  # names may be long: only the ends have theirs
        anchor = "start" if at == 0 else "end"
        x = frame.x(at if at == 0 else at + 1)
        parts.append(f'<text class="{anchor}" x="{x:.1f}" y="{_TOP + _INNER_H + 15}">{escape(bars[at][0])}</text>')
    return _svg(label, parts)


def heat_map(
    cells: Mapping[tuple[int, int], float],
    *,
    rows: int,
    columns: int,
    label: str,
    x_label: str,
    x_format: Format,
    row_name: Format,
    row_label: str,
) -> str:
    """Return a map of (row, column) cells, the largest value darkest; row 0 is at the top. Empty cells are bare.

    x_format: of a column's left edge. Shades go by the logarithm, so that rare uses stay visible.
    """
    most = max(cells.values(), default=1.0)
    width, height = _INNER_W / max(columns, 1), _INNER_H / max(rows, 1)
    parts: list[str] = []
    for (row, column), value in sorted(cells.items()):
        shade = 0.2 + 0.8 * math.log1p(value) / math.log1p(most)
        place = f'x="{_LEFT + column * width:.1f}" y="{_TOP + row * height:.1f}"'
        size = f'width="{width + 0.1:.1f}" height="{height + 0.1:.1f}"'
        title = escape(f"{row_label} {row_name(row)}, {x_format(column)}: {value:,.0f}")
        parts.append(f'<rect class="heat" {place} {size} fill-opacity="{shade:.2f}"><title>{title}</title></rect>')
    parts.append(f'<rect class="frame" x="{_LEFT}" y="{_TOP}" width="{_INNER_W}" height="{_INNER_H}"/>')
    for at in sorted({0, rows // 2, rows - 1}):
        parts.append(
            f'<text class="end" x="{_LEFT - 6}" y="{_TOP + (at + 0.5) * height + 4:.1f}">{row_name(at)}</text>'
        )
    for at, anchor in ((0, "start"), (columns // 2, "middle"), (columns, "end")):
        x = _LEFT + at * width
        parts.append(f'<text class="{anchor}" x="{x:.1f}" y="{_TOP + _INNER_H + 15}">{escape(x_format(at))}</text>')
    parts.append(_x_label(x_label))
    return _svg(label, parts)


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Return a legend: (style, name) pairs, as HTML."""
    items = "".join(f'<li><i class="key {style}"></i>{escape(name)}</li>' for style, name in entries)
    return f'<ul class="legend">{items}</ul>'


def nice_ticks(largest: float, count: int = 4) -> list[float]:
    """Return round numbers from 0 to at least `largest`."""
    raw = largest / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(largest / step * (1 - 1e-9)) + 1)]


def _axes(frame: _Frame, x_label: str, x_format: Format | None, y_format: Format) -> str:
    parts: list[str] = []
    for tick in nice_ticks(frame.y_max):
        if tick > frame.y_max * 1.001:
            continue
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 4:.1f}">{escape(y_format(tick))}</text>')
    if x_format:
        middle = (frame.x_min + frame.x_max) / 2
        for value, anchor in ((frame.x_min, "start"), (middle, "middle"), (frame.x_max, "end")):
            text = escape(x_format(value))
            parts.append(f'<text class="{anchor}" x="{frame.x(value):.1f}" y="{_TOP + _INNER_H + 15}">{text}</text>')
    parts.append(_x_label(x_label))
    return "".join(parts)


def _x_label(text: str) -> str:
    return f'<text class="middle label" x="{_LEFT + _INNER_W / 2}" y="{HEIGHT - 6}">{escape(text)}</text>'


def _stepped(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep each value until the next one."""
    stepped: list[tuple[float, float]] = []
    for x, y in points:
        if stepped:
            stepped.append((x, stepped[-1][1]))
        stepped.append((x, y))
    return stepped


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
