"""`tierkv stats`: how much a store holds."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from tierkv.storage.cold import ColdStore
from tierkv.tools.render import format_bytes, open_console, print_json, visible
from tierkv.tools.stores import open_existing

__all__ = ["stats"]


def stats(store_path: Path, *, as_json: bool) -> None:
    """Print the sizes of the store at a path. Raises StoreError if there is none."""
    with open_existing(store_path) as store:
        summary = _summary(store)
    if as_json:
        print_json(summary)
        return
    table = Table(show_header=False)
    table.add_row("store", visible(str(store_path)))
    for name in ("namespaces", "blocks", "tokens"):
        table.add_row(name, f"{summary[name]:,}")
    if summary["namespaces_unreadable"]:
        table.add_row("namespaces with an unreadable description", f"{summary['namespaces_unreadable']:,}")
    for name in ("bytes_raw", "bytes_stored", "bytes_file", "bytes_quota"):
        table.add_row(name.replace("_", " "), format_bytes(int(summary[name])))
    table.add_row("ratio", f"{summary['ratio']:.3f}")
    open_console().print(table)


def _summary(store: ColdStore) -> dict[str, int | float]:
    sizes = store.stats()
    tokens = sum(entry.num_tokens for _, entry in store.iter_entries())
    namespaces = store.namespaces()
    return {
        "namespaces": len(namespaces),
        "namespaces_unreadable": sum(each.problem is not None for each in namespaces),
        "blocks": sizes.blocks,
        "tokens": tokens,
        "bytes_raw": sizes.raw_bytes,
        "bytes_stored": sizes.stored_bytes,
        "bytes_file": sizes.file_bytes,
        "bytes_quota": sizes.quota_bytes,
        "ratio": sizes.raw_bytes / sizes.stored_bytes if sizes.stored_bytes else 1.0,
    }
