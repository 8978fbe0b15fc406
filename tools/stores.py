"""Which store a command works on, and opening it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import ConfigError, DaemonError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_reader import StoredNamespace
from tierkv.storage.cold_rows import ColdEntry
from tierkv.storage.free_space import require_free
from tierkv.tools.daemon_client import open_client
from tierkv.tools.options import NoDaemon, Socket, Store, default_store, named_socket
from tierkv.tools.running_daemon import require_one, running_daemon
from tierkv.values.block import BlockHash
from tierkv.values.users import user_name

__all__ = [
    "StoreOptions",
    "find_digest",
    "find_namespace",
    "find_store_of",
    "iter_chains",
    "open_existing",
    "require_place",
    "store_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreOptions:
    """Options that name a store, by its directory or by its daemon's socket. Raises ConfigError for both."""

    store: Store = None
    socket: Socket = None
    no_daemon: NoDaemon = False

    def __post_init__(self) -> None:
        if self.store and self.socket:
            raise ConfigError("name a store or a daemon's socket, not both")
        require_one(self.socket, no_daemon=self.no_daemon)

    @property
    def path(self) -> Path:
        """Directory of the store. Raises DaemonError if the daemon that is named has none."""
        named = self._named_daemon()
        return store_of(named) if named else self.store or default_store(os.environ)

    def find_daemon(self) -> Path | None:
        """Return the socket of the daemon whose store is meant; None where none is named, and none runs for the store.

        Notes on standard error whether a daemon that runs is used.
        """
        if named := self._named_daemon():
            return named
        return None if self.store or self.no_daemon else running_daemon(default_store(os.environ))

    def _named_daemon(self) -> Path | None:
        if self.store or self.no_daemon:
            return None
        return self.socket or named_socket(os.environ)


def store_of(socket: Path) -> Path:
    """Return the directory of the daemon's store. Raises DaemonError if it keeps nothing on disk."""
    found = find_store_of(socket)
    if found is None:
        raise DaemonError(f"the daemon at {socket} keeps nothing on disk")
    return found


def find_store_of(socket: Path) -> Path | None:
    """Return the directory of the daemon's store; None if it keeps nothing on disk. Raises DaemonError."""
    with open_client(socket) as client:
        return Path(client.welcome.store) if client.welcome.has_cold else None


def open_existing(path: Path, *, read_only: bool = True) -> ColdStore:
    """Open a store, which must exist. Raises StoreError."""
    _require_readable(path)
    if not _exists(path):
        raise StoreError(f"there is no store at {path}", hint="tierkv warm FILE creates it")
    return ColdStore(path, read_only=read_only)


def _require_readable(path: Path) -> None:
    """Raise StoreError for a store that another user keeps closed, with the user's name."""
    try:
        state = os.stat(path)
        if not stat.S_ISDIR(state.st_mode) or os.access(path, os.R_OK | os.X_OK):
            return
    except (OSError, ValueError):
        return
    owner, me = user_name(state.st_uid), user_name(os.geteuid())
    raise StoreError(
        f"the store {path} belongs to user {owner}, and user {me} may not read it",
        hint="a daemon's group reads its blocks through the daemon",
    )


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


def find_namespace(store: ColdStore, prefix: str | None) -> StoredNamespace:
    """Return the namespace whose hex digest begins with `prefix`, or whose name it is, or the only one there is.

    Raises ConfigError that lists them where none or several fit.
    """
    found = {each.digest.hex(): each for each in store.namespaces()}
    return found[find_digest({digest: str(each.description.get("name", "")) for digest, each in found.items()}, prefix)]


def find_digest(names: Mapping[str, str], prefix: str | None) -> str:
    """Return the hex digest that begins with `prefix`, or whose namespace has that name, or the only one there is.

    names: of namespaces, by hex digest.

    Raises ConfigError that lists them where none or several fit.
    """
    fitting = [digest for digest in names if digest.startswith((prefix or "").lower())]
    fitting = fitting or [digest for digest, name in names.items() if name == prefix]
    if len(fitting) == 1:
        return fitting[0]
    which = (
        f"{len(fitting)} namespaces begin with {prefix}, or have that name"
        if prefix
        else f"the store has {len(names)} namespaces"
    )
    listed = ", ".join(f"{digest[:12]} ({name or 'unnamed'})" for digest, name in names.items())
    raise ConfigError(f"{which}; choose one with --namespace: {listed or 'it is empty'}")


def iter_chains(entries: Mapping[BlockHash, ColdEntry]) -> Iterator[list[BlockHash]]:
    """Yield the chain of every stored block without children, first block first."""
    parents = {entry.parent for entry in entries.values()}
    for leaf in entries:
        if leaf in parents:
            continue
        chain, at = {leaf: None}, leaf
        while (at := entries[at].parent) in entries and at not in chain:  # parents of a damaged store may be a cycle
            chain[at] = None
        yield list(chain)[::-1]


def _exists(path: Path) -> bool:
    try:
        return os.path.lexists(path / "data.mdb")  # opening the store refuses a symbolic link
    except ValueError as exc:  # a NUL in the path
        raise ConfigError(f"{str(path)!a} is not a path") from exc
