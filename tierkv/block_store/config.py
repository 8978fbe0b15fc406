"""What a block store is opened with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tierkv.config import CODEC_NAMES, expanded_path
from tierkv.errors import ConfigError
from tierkv.remote_tiers.urls import RemoteOption, remote_urls
from tierkv.values.checks import check_count, check_flag, check_seconds
from tierkv.values.cores import default_io_threads
from tierkv.values.users import user_id

__all__ = ["BlockStoreConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStoreConfig:
    """Sizes and places of the warm and the cold tier of one engine, or the daemon's. Units are in the names.

    cold_path: directory of the LMDB store; None keeps nothing on disk. Several processes may have it open.
    warm_bytes: page-locked memory, taken once at opening. With 0 the store only looks up: `contains` works, blocks are
        neither read nor kept, and torch is not loaded. A scheduler in a process of its own needs no more.
    cold_bytes: quota of a new store, 64 GiB if None; an existing one keeps its quota.
    min_free_bytes: so much of the store's volume stays free; see `CacheConfig`.
    codec: how blocks are coded on disk; "auto" is the best lossless codec for the dtype.
    read_only: only read the store. New blocks stay in memory.
    num_io_threads: threads that read, decode and encode. None takes one for each core, at most 8.
    num_reader_processes: processes that decode in place of these threads, see `CacheConfig`; a quarter of them encode
        what is saved.
    write_wait_s: how long the write thread waits for the store's write lock, and a load for room in the warm memory.
    socket: of the daemon, whose warm and cold tiers are used then. This process has none: it uses neither cold_path,
        cold_bytes, min_free_bytes, codec nor remote, and of warm_bytes only whether it is 0: then it maps no memory and
        only looks up.
    remote: URLs of remote tiers, one or several, as in `CacheConfig`.
    daemon_user: name or number of another user whose daemon may be used: it decides what is computed with. None trusts
        only the own user's and root's.
    daemon_timeout_s: how long to wait for an answer of the daemon before it counts as gone.

    >>> BlockStoreConfig(cold_path="store", warm_bytes=1 << 20).cold_path
    PosixPath('store')
    """

    cold_path: Path | None = None
    warm_bytes: int = 1 << 30
    cold_bytes: int | None = None
    min_free_bytes: int | None = None
    codec: str = "auto"
    read_only: bool = False
    num_io_threads: int | None = None
    num_reader_processes: int | None = None
    write_wait_s: float = 5.0
    socket: Path | None = None
    daemon_user: str | int | None = None
    remote: RemoteOption = ()
    daemon_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("cold_path", "socket"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, expanded_path(name, value))
        object.__setattr__(self, "remote", remote_urls(self.remote))
        hint = "in bytes, as 8 << 30"
        check_count("warm_bytes", self.warm_bytes, hint=hint)
        if self.num_io_threads is not None:
            check_count("num_io_threads", self.num_io_threads, least=1)
        if self.num_reader_processes is not None:
            check_count("num_reader_processes", self.num_reader_processes)
        if self.cold_bytes is not None:
            check_count("cold_bytes", self.cold_bytes, least=1, hint=hint)
        if self.min_free_bytes is not None:
            check_count("min_free_bytes", self.min_free_bytes, hint=hint)
        check_flag("read_only", self.read_only)
        check_seconds("write_wait_s", self.write_wait_s)
        if self.daemon_user is not None:
            object.__setattr__(self, "daemon_user", user_id(self.daemon_user))
        check_seconds("daemon_timeout_s", self.daemon_timeout_s, may_be_zero=False)
        if self.codec not in CODEC_NAMES:
            raise ConfigError(f"codec must be one of {', '.join(CODEC_NAMES)}, got {self.codec!r}")
        if self.socket is not None:
            if self.read_only:
                raise ConfigError("read_only is for a store of this process's own, and socket names a daemon")
        elif self.cold_path is None and (self.read_only or not (self.warm_bytes or self.remote)):
            raise ConfigError("a block store without cold_path needs warm_bytes, and cannot be read_only")

    @property
    def io_threads(self) -> int:
        """How many threads read, decode and encode: `num_io_threads`, or what suits this process alone."""
        return self.num_io_threads or default_io_threads()
