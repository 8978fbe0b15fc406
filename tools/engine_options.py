"""The options of commands that load a model. Needs no torch; engines.py opens the model."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

from tierkv.config import CacheConfig
from tierkv.errors import ConfigError
from tierkv.tools.daemon_client import named_daemon_user
from tierkv.tools.options import (
    DEFAULT_DAY,
    BlockSize,
    CodecName,
    ColdSize,
    Device,
    Dtype,
    HotSize,
    MinFree,
    Model,
    ReadOnly,
    Remote,
    Salt,
    Socket,
    Store,
    TemplateDay,
    WarmSize,
    default_store,
    named_remotes,
    named_socket,
    parse_day,
    parse_optional_size,
    parse_size,
)

__all__ = ["EngineOptions", "ModelOptions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options that identify a model and its blocks. Raises ConfigError where several block sizes are named."""

    model: Model = None
    device: Device = None
    dtype: Dtype = None
    block_sizes: BlockSize = None
    salt: Salt = ""
    date: TemplateDay = DEFAULT_DAY

    def __post_init__(self) -> None:
        if len(set(self.block_sizes or ())) > 1:
            raise ConfigError(f"one command has one block size, got {' and '.join(map(str, self.block_sizes or ()))}")
        parse_day(self.date)  # before a model is loaded

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.block_sizes[0] if self.block_sizes else 256

    @property
    def day(self) -> datetime.date | None:
        """What chat templates write as today's date; None is the real one."""
        return parse_day(self.date)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions(ModelOptions):
    """Options of a command that runs a model over a cache. `config` raises ConfigError for values that do not fit."""

    store: Store = None
    cold: ColdSize = None
    min_free: MinFree = None
    read_only: ReadOnly = False
    warm: WarmSize = "256M"
    hot: HotSize = None
    codec: CodecName = "auto"
    socket: Socket = None
    remote: Remote = None

    def config(self) -> CacheConfig:
        """Return the cache's configuration; what no option names comes from the environment."""
        return CacheConfig(
            cold_path=self.store or default_store(os.environ),
            block_size=self.block_size,
            cold_bytes=parse_optional_size(self.cold),
            min_free_bytes=parse_optional_size(self.min_free),
            read_only=self.read_only,
            warm_bytes=parse_size(self.warm),
            hot_bytes=parse_size(self.hot) if self.hot else None,
            codec=self.codec,
            daemon_user=named_daemon_user(os.environ),
            socket=self.socket or (None if self.read_only else named_socket(os.environ)),
            remote=named_remotes(self.remote, os.environ),
        )
