"""What a cache is built with: one frozen value, validated once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path

from tierkv.errors import ConfigError

__all__ = ["CacheConfig"]

GIB = 1 << 30
_WHOLE_NUMBERS = (
    *("block_size", "hot_bytes", "warm_bytes", "cold_bytes", "min_free_bytes"),
    *("num_io_threads", "min_partial_tokens", "piece_tokens"),
)
WARM_CODECS = ("raw", "windows", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Sizes and places of the three tiers. Units are in the names; sizes are fixed when the cache opens.

    cold_path: directory of the LMDB store; None keeps nothing on disk.
    cold_bytes: quota of a store that does not exist yet, 64 GiB if None. A store keeps its quota: another number here
        changes nothing, and is told in the log; `tierkv quota` and `ColdStore.set_quota` change it.
    min_free_bytes: so much of the store's volume stays free: where it would not, blocks are evicted for new ones. None
        leaves 1 GiB free, or a 20th of a volume that is smaller than 20 GiB.
    read_only: use the store for reading alone, as on a read-only file system: what is computed is kept in memory.
    hot_bytes: size of the hot pool; None takes `hot_fraction` of the GPU memory that is free at opening,
        or 1 GiB on a machine without a GPU.
    warm_bytes: page-locked memory, taken once at opening.
    compute_or_load: let a runner compute the first cold blocks of a prompt while the last ones load, piece_tokens
        at a time: enough to keep a GPU busy, few enough to meet the loader soon.
    codec: how blocks are coded on disk and in state files: "auto" is the lossless one that suits the dtype best.
        "lossy-int8" and "lossy-fp8-e4m3" halve the bytes and change them: their blocks are another namespace's.
    eviction_policy: a name that `make_policy` knows; `tierkv replay` compares them on a trace.
    num_io_threads: threads that read, decode and encode cold blocks. One for each core, at most 8: more gain nothing,
        neither from the page cache nor from a disk (measured).
    warm_codec: "raw" keeps blocks in the warm tier as they are, "windows" losslessly compressed (storage/windows.py),
        "auto" compresses where a GPU does it: bfloat16 on CUDA with triton and what that compiles with.
    gpu_decode: let the GPU decode cold blocks of 16-bit floats, where nvCOMP is installed (the extra `nvcomp`).
    write_through: write every block to the lower tiers behind the request; False writes a block only when
        the hot pool needs its room.
    write_wait_s: how long a request waits for hot blocks that must be written down before their room is free, and how
        long whoever writes waits for others who write to the same store, which a stopped process does for ever. Then
        the oldest writes are dropped, and counted as skipped.
    socket: the daemon's; its warm and cold tiers are used then, and this process has none: warm_bytes, cold_path,
        cold_bytes and the codecs are the daemon's business.
    compute_wait_s: how long a request waits for blocks that another process is computing; 0 never waits.
    daemon_timeout_s: after so long a daemon that does not answer counts as gone.
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
    num_io_threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    min_partial_tokens: int = 1
    compute_or_load: bool = True
    piece_tokens: int = 2048
    write_wait_s: float = 5.0
    socket: Path | None = None
    compute_wait_s: float = 5.0
    daemon_timeout_s: float = 2.0

    def __post_init__(self) -> None:
        if self.cold_path is not None:
            object.__setattr__(self, "cold_path", Path(self.cold_path).expanduser())
        if self.socket is not None:
            object.__setattr__(self, "socket", Path(self.socket).expanduser())
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
                hint = "in bytes, as 8 << 30" if name.endswith("_bytes") else None
                raise ConfigError(f"{name} must be a whole number, got {value!r}", hint=hint)
        for name in _WHOLE_NUMBERS:
            value = getattr(self, name)
            if name != "min_free_bytes" and value is not None and value <= 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        if not 0 < self.hot_fraction < 1:
            raise ConfigError(f"hot_fraction must lie between 0 and 1, got {self.hot_fraction}")
        if self.warm_codec not in WARM_CODECS:
            raise ConfigError(f"warm_codec must be one of {', '.join(WARM_CODECS)}, got {self.warm_codec!r}")
        if min(self.compute_wait_s, self.write_wait_s) < 0 or self.daemon_timeout_s <= 0:
            raise ConfigError("compute_wait_s and write_wait_s must not be negative, daemon_timeout_s must be positive")
        if self.min_free_bytes is not None and self.min_free_bytes < 0:
            raise ConfigError(f"min_free_bytes must not be negative, got {self.min_free_bytes}")
        if self.read_only and self.socket is not None:
            raise ConfigError("read_only is for a store of this process's own, and socket names a daemon, which writes")
