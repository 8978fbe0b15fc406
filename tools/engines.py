"""How a command loads a model and opens its cache. Loads torch, so commands that need no model import it late."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from tierkv.config import CacheConfig
from tierkv.engine.backends.measured import load_table, table_place
from tierkv.engine.embedded_files import EMBEDDED
from tierkv.engine.mla.model import latent_attention
from tierkv.engine.model_identity import namespace_of
from tierkv.engine.model_support import check_supported, probe_layout
from tierkv.engine.models import LoadedModel, load_model
from tierkv.engine.runner import Runner, open_runner
from tierkv.errors import ConfigError
from tierkv.tools.engine_options import EngineOptions, ModelOptions
from tierkv.tools.model_place import embedded_directory
from tierkv.tools.options import cache_directory, named_attention
from tierkv.tools.stores import find_store_of
from tierkv.values.namespace import Namespace

__all__ = ["identify", "identify_stored", "open_engine"]

_log = logging.getLogger(__name__)


@contextmanager
def open_engine(options: EngineOptions, config: CacheConfig) -> Iterator[Runner]:
    """Load the model, open the cache, and close it after the command."""
    store = config.cold_path or (find_store_of(config.socket) if config.socket else None)
    loaded, attention = _load(options, store), named_attention(options.attention, os.environ)
    table = _measured_here(torch.device(loaded.model.device))
    with open_runner(
        loaded,
        config,
        salt=options.salt,
        mla=options.mla,
        attention=attention,
        attention_table=table,
        sparse=options.sparse(),
    ) as runner:
        yield runner


def _measured_here(device: torch.device) -> Path | None:
    """Return the table that benchmarks/attention.py has written for a GPU of this machine; None without one."""
    if device.type != "cuda":
        return None
    try:
        path = cache_directory(os.environ) / table_place(torch.cuda.get_device_name(device))
    except ConfigError:  # a user without a cache directory has no table
        return None
    if not path.exists():
        return None
    try:
        load_table(path)
    except ConfigError as exc:  # cut short, or of another version of tierkv: no command names this file
        _log.warning("attention is chosen without the times measured here: %s", exc)
        return None
    return path


def identify(options: ModelOptions, store: Path | None) -> tuple[LoadedModel, Namespace]:
    """Load the model for its tokenizer, and return the namespace of its blocks. Computes nothing.

    store: where the embedded model is kept if the user has no cache directory.
    """
    loaded = _load(options, store)
    check_supported(loaded.model)
    latent = latent_attention(loaded.model, options.mla, use_library=False)
    layout = probe_layout(loaded.model, block_size=options.block_size, latent=latent)
    return loaded, namespace_of(loaded.model, layout, salt=options.salt, name=loaded.name)


def identify_stored(options: ModelOptions, lossy_codec: str, store: Path | None) -> tuple[LoadedModel, Namespace]:
    """Do as `identify`, for blocks that go through a lossy codec, where one is named."""
    loaded, namespace = identify(options, store)
    return loaded, replace(namespace, lossy_codec=lossy_codec)


def _load(options: ModelOptions, store: Path | None) -> LoadedModel:
    is_embedded = options.model in (None, EMBEDDED)  # another model needs no place of ours
    cache_dir = embedded_directory(store) if is_embedded else None
    return load_model(options.model, device=options.device, dtype=options.dtype, cache_dir=cache_dir)
