"""Numbers with units, for people to read."""

from __future__ import annotations

__all__ = ["format_bytes", "format_seconds"]


def format_bytes(count: int | float) -> str:
    """Return bytes in binary units: 1.5 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def format_seconds(seconds: float) -> str:
    """Return a duration with three digits: 12.3 us, 4.56 ms, 1.2 s, 3.4 min."""
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1.0, 1e3, "ms"), (120.0, 1.0, "s")):
        if abs(seconds) < limit:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds / 60:.1f} min"
