"""The options of commands that load a model. Needs no torch; engines.py opens the model."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

from tierkv.config import CacheConfig
from tierkv.engine.sparse.options import SparseDecode
from tierkv.errors import ConfigError
from tierkv.tools.daemon_client import named_daemon_user
from tierkv.tools.options import (
    DEFAULT_DAY,
    Attention,
    BlockSize,
    CodecName,
    ColdSize,
    Device,
    Dtype,
    HotSize,
    MinFree,
    Mla,
    Model,
    NoDaemon,
    ReadOnly,
    Remote,
    Salt,
    Socket,
    SparseShare,
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
from tierkv.tools.running_daemon import require_one, running_daemon

__all__ = ["EngineOptions", "ModelOptions"]

_WARM = "256M"
_CODEC = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options that identify a model and its blocks. Raises ConfigError where several block sizes are named."""

    model: Model = None
    device: Device = None
    dtype: Dtype = None
    mla: Mla = "auto"
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
    warm: WarmSize = _WARM
    hot: HotSize = None
    codec: CodecName = _CODEC
    socket: Socket = None
    remote: Remote = None
    no_daemon: NoDaemon = False
    attention: Attention = None
    sparse_decode: SparseShare = None

    def __post_init__(self) -> None:
        ModelOptions.__post_init__(self)
        require_one(self.socket, no_daemon=self.no_daemon)
        self.sparse()  # before a model is loaded

    def sparse(self) -> SparseDecode | None:
        """Return how sparse decode is; None if it is exact. Raises ConfigError for what is no share."""
        return None if self.sparse_decode is None else SparseDecode(budget=self.sparse_decode)

    def config(self) -> CacheConfig:
        """Return the cache's configuration; what no option names comes from the environment.

        Looks for the user's daemon, and notes on standard error whether it is used.
        """
        store = self._place()
        return CacheConfig(
            cold_path=store,
            block_size=self.block_size,
            cold_bytes=parse_optional_size(self.cold),
            min_free_bytes=parse_optional_size(self.min_free),
            read_only=self.read_only,
            warm_bytes=parse_size(self.warm),
            hot_bytes=parse_size(self.hot) if self.hot else None,
            codec=self.codec,
            daemon_user=named_daemon_user(os.environ),
            socket=self._daemon(store),
            remote=named_remotes(self.remote, os.environ),
        )

    def _place(self) -> Path | None:
        """Return the store's directory; None where there is no home, and a daemon is named, which has its own.

        Raises ConfigError where there is neither a home nor a name.
        """
        try:
            return self.store or default_store(os.environ)
        except ConfigError:
            if self._daemon_named() is None:
                raise
            return None

    def _daemon_named(self) -> Path | None:
        if self.socket or self.read_only or self.no_daemon:
            return self.socket
        return named_socket(os.environ)

    def _daemon(self, store: Path | None) -> Path | None:
        if (named := self._daemon_named()) or self.read_only or self.no_daemon:
            return named
        assert store is not None, "no daemon is named, so there is a store"
        is_own = {
            "--cold": self.cold is not None,
            "--min-free": self.min_free is not None,
            "--warm": self.warm != _WARM,
            "--codec": self.codec != _CODEC,
        }
        unless = [name for name, is_set in is_own.items() if is_set]
        return running_daemon(store, unless=unless)
