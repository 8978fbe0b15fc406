"""DaemonConfig: what a daemon is started with."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tierkv.daemon.limits import Limits
from tierkv.errors import ConfigError
from tierkv.policies import make_policy

__all__ = ["DaemonConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonConfig:
    """What a daemon is started with.

    store: None keeps nothing on disk. cold_bytes, min_free_bytes: as in `CacheConfig`. pin_share: of the slab, that
    one tenant may pin. metrics_port: of the loopback interface, for Prometheus. hello_s: so long may a client take to
    say hello. limits: of what clients may hold. stop_s: so long may the end take; then the process exits, and what was
    not written is lost. stall_s: so long may the store take over one batch before who waits for it is told that the
    disk does not answer.
    """

    socket: Path
    store: Path | None
    warm_bytes: int
    cold_bytes: int | None = None
    min_free_bytes: int | None = None
    num_io_threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    pin_share: float = 0.25
    eviction_policy: str = "hit-density"
    metrics_port: int | None = None
    hello_s: float = 5.0
    limits: Limits = field(default_factory=Limits)
    stop_s: float = 30.0
    stall_s: float = 15.0

    def __post_init__(self) -> None:
        if min(self.warm_bytes, 1 if self.cold_bytes is None else self.cold_bytes, self.num_io_threads) <= 0:
            raise ConfigError("warm_bytes, cold_bytes and num_io_threads must be positive")
        make_policy(self.eviction_policy)  # refuses a name that there is not
        for path in (self.socket, self.store):
            try:
                str(path).encode()
            except UnicodeEncodeError as exc:
                raise ConfigError(f"{str(path)!a} cannot be told to clients: it is not UTF-8") from exc
        if not 0 < self.pin_share <= 1:
            raise ConfigError(f"pin_share must lie between 0 and 1, got {self.pin_share}")
