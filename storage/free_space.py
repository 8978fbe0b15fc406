"""The free space of a store's volume."""

from __future__ import annotations

import shutil
from pathlib import Path

from tierkv.errors import CapacityError, StoreError
from tierkv.values.units import format_bytes

__all__ = ["free_space", "growth_room", "require_free"]

_DEFAULT_FREE_BYTES = 1 << 30  # free space to keep on a large volume; of a small volume, that share
_DEFAULT_FREE_SHARE = 20
_TREE_BYTES = 256 << 10  # of LMDB's trees, which a transaction copies; not more than an eighth of what must stay free


def require_free(path: Path, min_free_bytes: int | None, num_bytes: int = 0) -> None:
    """Raise CapacityError if a volume does not have so many bytes beside those that must stay free, StoreError."""
    free_bytes, min_free_bytes = free_space(path, min_free_bytes)
    if free_bytes - num_bytes < min_free_bytes:
        raise CapacityError(
            f"cold store {path} can keep no block: {format_bytes(free_bytes)} are free on its volume, of which "
            f"{format_bytes(min_free_bytes)} must stay free",
            hint="lower min_free_bytes, or free disk space",
        )


def free_space(path: Path, min_free_bytes: int | None) -> tuple[int, int]:
    """Return the free bytes of a store's volume, and how many of them must stay free. Raises StoreError.

    min_free_bytes: None keeps 1 GiB free, or a 20th of a volume that is smaller than 20 GiB.
    """
    try:
        usage = shutil.disk_usage(path)
    except OSError as exc:
        raise StoreError(f"cold store {path} has lost its directory: {exc}") from exc
    if min_free_bytes is None:
        min_free_bytes = min(_DEFAULT_FREE_BYTES, usage.total // _DEFAULT_FREE_SHARE)
    return usage.free, min_free_bytes


def growth_room(path: Path, min_free_bytes: int | None) -> int:
    """Return by how many bytes of values a store's file may grow, below 0 where it is too long. Raises StoreError."""
    free_bytes, min_free_bytes = free_space(path, min_free_bytes)
    return free_bytes - min_free_bytes - min(_TREE_BYTES, min_free_bytes // 8)
