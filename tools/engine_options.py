"""The options of commands that load a model, and how such a command opens the model and its cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tierkv.config import CacheConfig
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import check_supported, probe_layout
from tierkv.engine.models import EMBEDDED, LoadedModel, load_model
from tierkv.engine.runner import Runner, open_runner
from tierkv.errors import ConfigError
from tierkv.tools.options import (
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
    WarmSize,
    cache_directory,
    default_store,
    named_remotes,
    named_socket,
    parse_optional_size,
    parse_size,
)
from tierkv.values.namespace import Namespace

__all__ = ["EngineOptions", "ModelOptions", "identify", "open_engine"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Options that identify a model and its blocks. Raises ConfigError where several block sizes are named."""

    model: Model = None
    device: Device = None
    dtype: Dtype = None
    block_sizes: BlockSize = None
    salt: Salt = ""

    def __post_init__(self) -> None:
        if len(set(self.block_sizes or ())) > 1:
            raise ConfigError(f"one command has one block size, got {' and '.join(map(str, self.block_sizes or ()))}")

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.block_sizes[0] if self.block_sizes else 256


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
            socket=self.socket or (None if self.read_only else named_socket(os.environ)),
            remote=named_remotes(self.remote, os.environ),
        )


@contextmanager
def open_engine(options: ModelOptions, config: CacheConfig) -> Iterator[Runner]:
    """Load the model, open the cache, and close it after the command."""
    with open_runner(_load(options), config, salt=options.salt) as runner:
        yield runner


def identify(options: ModelOptions) -> tuple[LoadedModel, Namespace]:
    """Load the model for its tokenizer, and return the namespace of its blocks. Computes nothing."""
    loaded = _load(options)
    check_supported(loaded.model)
    layout = probe_layout(loaded.model, block_size=options.block_size)
    return loaded, namespace_of(loaded.model, layout, salt=options.salt, name=loaded.name)


def _load(options: ModelOptions) -> LoadedModel:
    is_embedded = options.model in (None, EMBEDDED)  # another model needs no place of ours
    cache_dir = cache_directory(os.environ) if is_embedded else None
    return load_model(options.model, device=options.device, dtype=options.dtype, cache_dir=cache_dir)
