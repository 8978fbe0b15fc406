"""How numbers look in tables."""

from __future__ import annotations

from tierkv.units import format_bytes

__all__ = ["format_age", "format_bytes"]


def format_age(seconds: float) -> str:
    """Return an age in its largest whole unit: 5 s, 3 min, 2 h, 4 d."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
