"""Curves over capacity: as a PNG where matplotlib is installed, as text where it is not."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tierkv.errors import ConfigError
from tierkv.values.files import write_whole

__all__ = ["print_curves", "save_curves"]

_MARKS = "ox+*#@%&sv^"
_HEIGHT = 16


def save_curves(path: Path, shares: Sequence[float], curves: Mapping[str, Sequence[float]], *, title: str) -> bool:
    """Draw hit rates over capacity in percent. Return False, nothing drawn, without matplotlib. Raises ConfigError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, rates in curves.items():
        is_bound = name.startswith("Belady")
        style = {"color": "0.4", "linestyle": "--"} if is_bound else {"marker": "o", "markersize": 4}
        axes.plot(shares, rates, label=name, **style)
    axes.set_xscale("log")
    axes.set_xticks(list(shares), labels=[f"{share:g}" for share in shares], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("capacity, % of the trace's unique blocks")
    axes.set_ylabel("block hit rate")
    axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    try:
        write_whole(path, image.getvalue())
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from exc
    return True


def print_curves(console: Console, shares: Sequence[float], curves: Mapping[str, Sequence[float]]) -> None:
    """Draw hit rates over capacity with a letter for each curve; of those in one place the last is seen."""
    top = max((max(rates) for rates in curves.values()), default=0.0) or 1.0
    column = max(7, min(14, (console.width - 8) // max(len(shares), 1)))
    rows = [[" "] * (column * len(shares)) for _ in range(_HEIGHT)]
    for mark, rates in zip(_MARKS * len(curves), curves.values(), strict=False):
        for at, rate in enumerate(rates):
            rows[_HEIGHT - 1 - round(rate / top * (_HEIGHT - 1))][at * column + column // 2] = mark
    for at, row in enumerate(rows):
        label = f"{top * (_HEIGHT - 1 - at) / (_HEIGHT - 1):.3f}" if at % 5 == 0 else ""
        console.print(Text(f"{label:>6} |{''.join(row).rstrip()}"))
    console.print(Text(" " * 8 + "".join(f"{f'{share:.3g} %':^{column}}" for share in shares).rstrip()))
    console.print(Text("  ".join(f"{mark} {name}" for mark, name in zip(_MARKS * len(curves), curves, strict=False))))
