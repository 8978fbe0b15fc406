"""DaemonConfig: the settings of a daemon."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from tierkv.daemon.limits import Limits
from tierkv.errors import ConfigError
from tierkv.policies import make_policy
from tierkv.remote_tiers.urls import RemoteOption, remote_urls
from tierkv.values.cores import default_io_threads

__all__ = ["DaemonConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """The settings of a daemon.

    store: None keeps nothing on disk. cold_bytes, min_free_bytes: as in `CacheConfig`. pin_share: of the slab, that
    one tenant may pin. metrics_port: of the loopback interface, for Prometheus. hello_s: time for a client to send
    Hello. group: id of a group whose members may read; None lets only the daemon's user and root in. limits: of what
    clients may hold. stop_s: time for the end of the daemon; then the process exits, and loses what was not written.
    remote: URLs of remote tiers, as in `CacheConfig`; hits of theirs are kept in the store, so there must be one.
    num_reader_processes: as in `CacheConfig`; they start with the first read of a large block.
    stall_s: time for the store to write one batch; then requests that wait for it fail.
    """

    socket: Path
    store: Path | None
    warm_bytes: int
    cold_bytes: int | None = None
    min_free_bytes: int | None = None
    num_io_threads: int = field(default_factory=default_io_threads)
    num_reader_processes: int | None = None
    pin_share: float = 0.25
    eviction_policy: str = "hit-density"
    metrics_port: int | None = None
    hello_s: float = 5.0
    limits: Limits = field(default_factory=Limits)
    group: int | None = None
    stop_s: float = 30.0
    stall_s: float = 15.0
    remote: RemoteOption = ()

    def __post_init__(self) -> None:
        if min(self.warm_bytes, 1 if self.cold_bytes is None else self.cold_bytes, self.num_io_threads) <= 0:
            raise ConfigError("warm_bytes, cold_bytes and num_io_threads must be positive")
        if self.num_reader_processes is not None and self.num_reader_processes < 0:
            raise ConfigError(f"num_reader_processes must not be negative, got {self.num_reader_processes}")
        object.__setattr__(self, "remote", remote_urls(self.remote))
        if self.remote and self.store is None:
            raise ConfigError("a daemon with remote tiers needs a store")
        make_policy(self.eviction_policy)  # raises for an unknown name
        for path in (self.socket, self.store):
            try:
                str(path).encode()
            except UnicodeEncodeError as exc:
                raise ConfigError(f"{str(path)!a} cannot be sent to clients: it is not UTF-8") from exc
        if not 0 < self.pin_share <= 1:
            raise ConfigError(f"pin_share must lie between 0 and 1, got {self.pin_share}")
