"""When blocks leave the hot pool ahead of requests."""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.values.checks import check_share

__all__ = ["Offloading"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offloading:
    """When the hot pool is fuller than `threshold`, a `ratio` of its unused blocks is demoted in the background.

    Both are shares above 0, up to 1: of the places that the pool may take, and of the cached blocks.
    """

    threshold: float = 0.9
    ratio: float = 0.2

    def __post_init__(self) -> None:
        for name in ("threshold", "ratio"):
            check_share(f"offload_{name}", getattr(self, name))
