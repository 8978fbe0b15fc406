"""Remotes: the remote tiers of one cache, block store or daemon, opened from their URLs."""

from __future__ import annotations

from collections.abc import Sequence

from tierkv.remote_tiers.directory import DirectoryClient
from tierkv.remote_tiers.guard import GuardedRemote
from tierkv.remote_tiers.local_copies import LocalCopies
from tierkv.remote_tiers.objects import ObjectsClient
from tierkv.remote_tiers.protocol import RemoteClient
from tierkv.remote_tiers.redis_client import RedisClient
from tierkv.remote_tiers.source import RemoteSource
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.cold import ColdStore
from tierkv.values.remote_stats import RemoteStats

__all__ = ["Remotes", "open_client"]

_STALL_S = 30.0


def open_client(url: RemoteUrl) -> RemoteClient:
    """Return a client of the engine that a URL names. Connects to nothing yet.

    Raises ConfigError where a package is missing that it needs, or a variable that the URL names.
    """
    if url.scheme in ("redis", "rediss"):
        return RedisClient(url)
    if url.scheme == "dir":
        return DirectoryClient(url)
    return ObjectsClient(url)


class Remotes:
    """Remote tiers in the order in which they are asked. Context manager; `close` may be called twice.

    store: keeps what is read from them, unless it is None or read only. Raises ConfigError as `open_client`.
    """

    def __init__(self, urls: Sequence[RemoteUrl], *, store: ColdStore | None = None) -> None:
        self._remotes: list[GuardedRemote] = []
        self._store = store
        self.copies: LocalCopies | None = None
        try:
            for url in urls:
                self._remotes.append(GuardedRemote(open_client(url), url))
        except BaseException:
            self.close()
            raise
        if store is not None and not store.read_only and urls:
            self.copies = LocalCopies(store)

    def __enter__(self) -> Remotes:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def source(self, description: bytes) -> RemoteSource:
        """Return the records of one namespace. Raises ConfigError for what is no description."""
        store = self._store
        if store is None:
            return RemoteSource(self._remotes, description)
        return RemoteSource(self._remotes, description, copies=self.copies, read_record=store.read_record)

    def stats(self) -> tuple[RemoteStats, ...]:
        """Return the counters of each remote tier."""
        return tuple(remote.stats() for remote in self._remotes)

    def flush(self, *, timeout_s: float) -> bool:
        """Wait until all that is queued was written or dropped; return False where that takes too long."""
        late = [remote for remote in self._remotes if not remote.flush(timeout_s=timeout_s)]
        return (self.copies is None or self.copies.flush(stall_s=timeout_s)) and not late

    def close(self) -> bool:
        """Write what is queued, for a bounded time, and close all connections.

        Return whether no thread still uses the store.
        """
        for remote in self._remotes:
            remote.close()
        return self.copies is None or self.copies.close(stall_s=_STALL_S)
