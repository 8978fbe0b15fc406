"""What a cache is built with: one frozen value, validated once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.policies import make_policy
from tierkv.remote_tiers.urls import RemoteOption, remote_urls
from tierkv.storage.codecs import CODECS
from tierkv.values.checks import check_count, check_flag, check_seconds, check_share
from tierkv.values.cores import default_io_threads
from tierkv.values.files import check_path
from tierkv.values.users import user_id

__all__ = ["CODEC_NAMES", "CacheConfig", "expanded_path"]

GIB = 1 << 30
_MOST_THREADS = 1024
_WHOLE_NUMBERS = {  # and how large each must be
    **dict.fromkeys(("block_size", "hot_bytes", "warm_bytes", "cold_bytes", "num_io_threads"), 1),
    **dict.fromkeys(("min_partial_tokens", "piece_tokens"), 1),
    "min_free_bytes": 0,
    "num_reader_processes": 0,
}
CODEC_NAMES: tuple[str, ...] = ("auto", *(codec.name for codec in CODECS))
WARM_CODECS = ("raw", "windows", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Sizes and places of the three tiers. Units are in the names; sizes are fixed when the cache opens.

    cold_path: directory of the LMDB store; None keeps nothing on disk.
    cold_bytes: quota of a new store, 64 GiB if None. An existing store keeps its quota, and the log says so;
        `tierkv quota` and `ColdStore.set_quota` change it.
    min_free_bytes: so much of the store's volume stays free; the store evicts blocks for that. None leaves 1 GiB free,
        or a 20th of a volume that is smaller than 20 GiB.
    read_only: only read the store, as on a read-only file system. New blocks stay in memory.
    hot_bytes: size of the hot pool; None takes `hot_fraction` of the GPU memory that is free at opening,
        or 1 GiB on a machine without a GPU.
    warm_bytes: page-locked memory, taken once at opening.
    compute_or_load: let a runner compute the first cold blocks of a prompt while the last ones load, piece_tokens
        at a time: enough to keep a GPU busy, few enough that both sides end together.
    codec: how blocks are coded on disk and in state files: "auto" is the best lossless codec for the dtype.
        "lossy-int8" halves the bytes and changes them: its blocks are another namespace's.
    eviction_policy: a name that `make_policy` knows; `tierkv replay` compares them on a trace.
    num_io_threads: threads that read, decode and encode cold blocks. None takes one for each core, at most 8: more
        gain nothing, neither from the page cache nor from a disk (measured). Ranks of one machine share its cores.
    num_reader_processes: processes that decode cold blocks in place of these threads, straight into the warm memory:
        threads of one interpreter hinder each other. None: one for each core, at most 16, and none below 4 cores; ranks
        share the cores. For blocks of 1 MiB or more; they start in the background, with a store that has blocks or
        at the first read. 0 has none. Linux only.
    warm_codec: "raw" keeps blocks in the warm tier as they are, "windows" losslessly compressed (storage/windows.py),
        "auto" compresses where a GPU does it: bfloat16 on CUDA with triton and what that compiles with.
    gpu_decode: let the GPU decode cold blocks of 16-bit floats, where nvCOMP is installed (the extra `nvcomp`).
    write_through: write every block to the lower tiers in the background; False writes a block only when
        the hot pool needs its room.
    write_wait_s: how long a request waits for hot blocks that must be written before their room is free, and how long
        the write thread waits for the store's write lock: a stopped process may hold it. Then the oldest writes are
        dropped, and counted as skipped.
    socket: of the daemon, whose warm and cold tiers are used then. This process has none: it does not use warm_bytes,
        cold_path, cold_bytes, remote and the codecs.
    remote: URLs of remote tiers, such as "redis://host:6379" or "s3://bucket/folder", one or several: see
        docs/remote.md. Their passwords are in no repr and in no message.
    compute_wait_s: how long a request waits for blocks that another process is computing; 0 never waits.
    daemon_user: name or number of another user whose daemon may be used: it decides what is computed with. None trusts
        only the own user's and root's.
    daemon_timeout_s: how long to wait for an answer of the daemon before it counts as gone.

    >>> config = CacheConfig(cold_path="store", block_size=4, hot_bytes=1 << 20, warm_bytes=1 << 20)
    >>> config.cold_path
    PosixPath('store')
    """

    cold_path: Path | None = None
    block_size: int = 256
    hot_bytes: int | None = None
    hot_fraction: float = 0.5
    warm_bytes: int = GIB
    cold_bytes: int | None = None
    min_free_bytes: int | None = None
    read_only: bool = False
    gpu_decode: bool = True
    write_through: bool = True
    codec: str = "auto"
    warm_codec: str = "raw"
    eviction_policy: str = "hit-density"
    num_io_threads: int | None = None
    num_reader_processes: int | None = None
    min_partial_tokens: int = 1
    compute_or_load: bool = True
    piece_tokens: int = 2048
    write_wait_s: float = 5.0
    socket: Path | None = None
    daemon_user: str | int | None = None
    remote: RemoteOption = ()
    compute_wait_s: float = 5.0
    daemon_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        for name in ("cold_path", "socket"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, expanded_path(name, value))
        object.__setattr__(self, "remote", remote_urls(self.remote))
        for name, least in _WHOLE_NUMBERS.items():
            value = getattr(self, name)
            may_be_none = ("hot_bytes", "cold_bytes", "min_free_bytes", "num_io_threads", "num_reader_processes")
            if value is not None or name not in may_be_none:
                hint = "in bytes, as 8 << 30" if name.endswith("_bytes") else None
                object.__setattr__(self, name, check_count(name, value, least=least, hint=hint))
        check_share("hot_fraction", self.hot_fraction, may_be_one=False)
        for name in ("gpu_decode", "write_through", "compute_or_load", "read_only"):
            check_flag(name, getattr(self, name))
        for name in ("write_wait_s", "compute_wait_s"):
            check_seconds(name, getattr(self, name))
        if self.daemon_user is not None:
            object.__setattr__(self, "daemon_user", user_id(self.daemon_user))
        check_seconds("daemon_timeout_s", self.daemon_timeout_s, may_be_zero=False)
        for name, names in (("codec", CODEC_NAMES), ("warm_codec", WARM_CODECS)):
            if getattr(self, name) not in names:
                raise ConfigError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}")
        try:
            make_policy(self.eviction_policy)
        except ConfigError as exc:
            raise ConfigError(f"eviction_policy is not usable: {exc}") from exc
        for name, number in (("num_io_threads", self.io_threads), ("num_reader_processes", self.num_reader_processes)):
            if (number or 0) > _MOST_THREADS:
                raise ConfigError(f"{name} must be at most {_MOST_THREADS}, got {number}")
        if self.read_only and self.socket is None and self.cold_path is None:
            raise ConfigError("read_only needs cold_path: without a store there is nothing to read")
        if self.read_only and self.socket is not None:
            raise ConfigError("read_only is for a store of this process's own, and socket names a daemon, which writes")

    @property
    def io_threads(self) -> int:
        """How many threads read, decode and encode: `num_io_threads`, or what suits this process alone."""
        return self.num_io_threads or default_io_threads()


def expanded_path(name: str, value: object) -> Path:
    """Return a path with ~ expanded. Raises ConfigError for what is no path, and where there is no home."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{name} must be a path, got {value!r}")
    try:
        return check_path(value).expanduser()
    except (ConfigError, RuntimeError) as exc:
        raise ConfigError(f"{name} must be a path, got {value!a}: {exc}") from exc
