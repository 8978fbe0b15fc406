"""Opening a store that must be there, and naming one of its namespaces."""

from __future__ import annotations

import os
from pathlib import Path

from tierkv.errors import ConfigError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_stats import StoredNamespace
from tierkv.storage.lmdb_directory import require_free

__all__ = ["find_namespace", "open_existing", "require_place"]


def open_existing(path: Path, *, read_only: bool = True) -> ColdStore:
    """Open a store, which must exist. Raises StoreError."""
    if not _exists(path):
        raise StoreError(f"there is no store at {path}", hint="tierkv warm FILE makes one")
    return ColdStore(path, read_only=read_only)


def require_place(path: Path, *, min_free_bytes: int | None) -> None:
    """Raise TierKVError if blocks cannot be stored at a path: before anything is computed for it."""
    there = path.expanduser()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise StoreError(
            f"nothing can be stored at {path}: {there} is not writable",
            hint="choose another with --store; tierkv run --read-only uses what is stored there",
        )
    if _exists(path):
        with open_existing(path) as store:
            if store.stats().live_bytes:
                return  # it evicts
    require_free(there, min_free_bytes)


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path / "data.mdb")  # a link is refused by whoever opens it
    except ValueError as exc:  # a NUL in the path
        raise ConfigError(f"{str(path)!a} is not a path") from exc


def find_namespace(store: ColdStore, prefix: str | None) -> StoredNamespace:
    """Return the namespace whose hex digest begins with `prefix`, or the only one there is.

    Raises ConfigError that lists them where none or several fit.
    """
    found = store.namespaces()
    fitting = [n for n in found if n.digest.hex().startswith((prefix or "").lower())]
    if len(fitting) == 1:
        return fitting[0]
    names = ", ".join(f"{n.digest.hex()[:12]} ({n.description.get('name') or 'unnamed'})" for n in found)
    which = f"{len(fitting)} namespaces begin with {prefix}" if prefix else f"the store has {len(found)} namespaces"
    raise ConfigError(f"{which}; choose one with --namespace: {names or 'it is empty'}")
