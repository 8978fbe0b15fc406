"""The connector's options: `kv_connector_extra_config` of vLLM's `--kv-transfer-config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from tierkv.block_store.config import BlockStoreConfig
from tierkv.errors import ConfigError
from tierkv.remote_tiers.urls import RemoteOption
from tierkv.values.checks import check_count, check_flag
from tierkv.values.cores import default_io_threads

__all__ = ["Options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user writes into `kv_connector_extra_config`. Sizes are in bytes.

    path: directory of the store on disk; None keeps blocks in memory only, which needs one process for the scheduler
        and the worker. Several engines and ranks may share one path.
    socket: of a daemon, whose warm and cold tiers are used then, by all engines and ranks of the machine. Of the other
        options only block_tokens, compute_or_load and weights count beside it.
    warm_bytes: page-locked CPU memory of each worker. cold_bytes: quota of a new store.
    block_tokens: tokens of one stored block, rounded up to a multiple of the engine's block size.
    num_reader_processes: of each worker; see `CacheConfig`.
    codec: how blocks are coded on disk. compute_or_load: compute a prefix where that was measured to be faster.
    remote: URLs of remote tiers (docs/remote.md). vLLM logs its options: write a password as `${NAME}`.
    num_io_threads: threads that read, decode and encode, of each worker. None shares the machine's cores among them.
    weights: digest of the model's weights, if the files need not be read for it at every start.
    """

    path: Path | None = None
    socket: Path | None = None
    warm_bytes: int = 1 << 30
    cold_bytes: int | None = None
    block_tokens: int = 256
    codec: str = "auto"
    num_reader_processes: int | None = None
    remote: RemoteOption = field(default=(), repr=False)  # it may have a password
    compute_or_load: bool = True
    num_io_threads: int | None = None
    weights: str = ""

    def __post_init__(self) -> None:
        check_count("block_tokens", self.block_tokens, least=1)
        check_count("warm_bytes", self.warm_bytes, least=1, hint="in bytes, as 8589934592")
        check_flag("compute_or_load", self.compute_or_load)
        if not isinstance(self.weights, str):
            raise ConfigError(f"weights must be a string, got {self.weights!r}")
        self.store_config()

    @classmethod
    def parse(cls, extra_config: Mapping[str, Any]) -> Options:
        """Read the options. Raises ConfigError for an unknown key, which it names, and for an invalid value."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(extra_config) - known)
        if unknown:
            raise ConfigError(
                f"kv_connector_extra_config has unknown keys: {', '.join(unknown)}",
                hint=f"known are {', '.join(sorted(known))}",
            )
        return cls(**dict(extra_config))

    def tokens_of_block(self, engine_block_size: int) -> int:
        """Return `block_tokens` rounded up to a multiple of the engine's block size."""
        return -(-self.block_tokens // engine_block_size) * engine_block_size

    def store_config(self, *, lookup_only: bool = False, num_workers: int = 1) -> BlockStoreConfig:
        """Return what the block store is opened with. lookup_only: for a scheduler without the worker's memory.

        num_workers: those of the machine, each with a store of its own.
        """
        return BlockStoreConfig(
            cold_path=self.path,
            socket=self.socket,
            warm_bytes=0 if lookup_only else self.warm_bytes,
            cold_bytes=self.cold_bytes,
            codec=self.codec,
            num_reader_processes=self.num_reader_processes,
            remote=self.remote,
            num_io_threads=self.num_io_threads or default_io_threads(num_workers),
        )
