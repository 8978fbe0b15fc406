"""How results look: tables for people, one JSON object for scripts, ages and sizes."""

from __future__ import annotations

import json
import math
from typing import Any

from rich.console import Console

from tierkv.tools.terminal import visible
from tierkv.values.units import format_bytes

__all__ = ["format_age", "format_bytes", "open_console", "print_json", "visible"]


_MIN_WIDTH = 20


def open_console(*, stderr: bool = False) -> Console:
    """Return a console that shows texts as they are: a prompt with [/b] or :smile: in it is no markup."""
    console = Console(stderr=stderr, markup=False, emoji=False)
    console.width = max(console.width, _MIN_WIDTH)  # COLUMNS=0 would print nothing at all
    return console


def print_json(value: Any) -> None:
    """Print one JSON object in ASCII. JSON has no nan and no infinity: they are null."""
    print(json.dumps(_finite(value), allow_nan=False))


def format_age(seconds: float) -> str:
    """Return an age in its largest whole unit: 5 s, 3 min, 2 h, 4 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
