"""What the commands have in common: options, the user's directories, and how an engine is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tierkv.config import CacheConfig
from tierkv.engine.models import load_model
from tierkv.engine.runner import Runner, open_runner
from tierkv.errors import ConfigError

__all__ = ["EngineOptions", "default_socket", "default_store", "named_socket", "open_engine", "parse_size"]

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """The options of a command that runs a model. Sizes in bytes; None is the configuration's default."""

    model: str | None
    store: Path
    device: str | None
    dtype: str | None
    block_size: int
    salt: str
    cold_bytes: int | None
    warm_bytes: int
    hot_bytes: int | None
    codec: str = "auto"
    socket: Path | None = None
    min_free_bytes: int | None = None
    read_only: bool = False


def named_socket(environment: Mapping[str, str]) -> Path | None:
    """Return the daemon's socket that the user has named with TIERKV_SOCKET, if any."""
    return Path(environment["TIERKV_SOCKET"]) if environment.get("TIERKV_SOCKET") else None


def default_socket(environment: Mapping[str, str]) -> Path:
    """Return where a daemon listens unless told otherwise: TIERKV_SOCKET, or in the user's runtime directory."""
    runtime = environment.get("XDG_RUNTIME_DIR")
    folder = Path(runtime) / "tierkv" if runtime else cache_directory(environment)
    return named_socket(environment) or folder / "daemon.sock"


def default_store(environment: Mapping[str, str]) -> Path:
    """Return where the cold store lies unless told otherwise: TIERKV_STORE, or under the user's cache."""
    if environment.get("TIERKV_STORE"):
        return Path(environment["TIERKV_STORE"])
    return cache_directory(environment) / "store"


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Return the user's cache directory for tierkv, by the XDG convention."""
    root = environment.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tierkv"


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 512M, 8G, 1.5GiB or 4096. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise ConfigError(f"{text!r} is not a size: say 512M, 8G or 4096")
    return size


@contextmanager
def open_engine(options: EngineOptions, environment: Mapping[str, str]) -> Iterator[Runner]:
    """Load the model, open the cache, and close it again behind the command."""
    loaded = load_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        cache_dir=cache_directory(environment),
    )
    config = CacheConfig(
        cold_path=options.store,
        block_size=options.block_size,
        cold_bytes=options.cold_bytes,
        warm_bytes=options.warm_bytes,
        hot_bytes=options.hot_bytes,
        codec=options.codec,
        socket=options.socket,
        min_free_bytes=options.min_free_bytes,
        read_only=options.read_only,
    )
    with open_runner(loaded, config, salt=options.salt) as runner:
        yield runner
