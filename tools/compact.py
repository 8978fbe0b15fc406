"""`tierkv compact`: give the free pages of a store's file back to the disk."""

from __future__ import annotations

from pathlib import Path

from tierkv.tools.daemon import compact as compact_through
from tierkv.tools.render import format_bytes, print_json
from tierkv.tools.stores import open_existing

__all__ = ["compact"]


def compact(store_path: Path, *, daemon: Path | None, as_json: bool) -> None:
    """Rewrite a store's file; a daemon does that itself for its own store. Needs room for a second copy of what is
    live; raises StoreError, also where another process has the store open, and DaemonError.
    """
    if daemon:
        with open_existing(store_path) as store:
            before = store.stats().file_bytes
        compact_through(daemon)
        with open_existing(store_path) as store:
            after = store.stats().file_bytes
    else:
        with open_existing(store_path, read_only=False) as store:
            before = store.stats().file_bytes
            store.compact()
            after = store.stats().file_bytes
    if as_json:
        print_json({"bytes_before": before, "bytes_after": after})
    else:
        print(f"{format_bytes(before)} before, {format_bytes(after)} now")
