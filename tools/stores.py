"""Opening a store that must be there, and naming one of its namespaces."""

from __future__ import annotations

from pathlib import Path

from tierkv.errors import ConfigError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_stats import StoredNamespace

__all__ = ["find_namespace", "open_existing"]


def open_existing(path: Path, *, cold_bytes: int = 64 << 30, read_only: bool = True) -> ColdStore:
    """Open a store, which must exist. Raises StoreError."""
    if not (path / "data.mdb").exists():
        raise StoreError(f"there is no store at {path}", hint="tierkv warm FILE makes one")
    return ColdStore(path, quota_bytes=cold_bytes, read_only=read_only)


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
