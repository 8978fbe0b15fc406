"""What the commands have in common: options, the user's directories, and how an engine is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from tierkv.config import CacheConfig
from tierkv.engine.models import EMBEDDED, load_model
from tierkv.engine.runner import Runner, open_runner
from tierkv.errors import ConfigError
from tierkv.values.files import home_directory, user_path
from tierkv.values.units import format_bytes

__all__ = [
    "EngineOptions",
    "cache_directory",
    "default_socket",
    "default_store",
    "embedded_directory",
    "named_socket",
    "open_engine",
    "parse_size",
]

_MAX_BYTES = 1 << 62
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
    return _named(environment, "TIERKV_SOCKET")


def default_socket(environment: Mapping[str, str]) -> Path:
    """Return where a daemon listens unless told otherwise: TIERKV_SOCKET, or in the user's runtime directory."""
    if socket := named_socket(environment):
        return socket
    runtime = _named(environment, "XDG_RUNTIME_DIR", must_be_absolute=True)
    return (runtime / "tierkv" if runtime else cache_directory(environment)) / "daemon.sock"


def default_store(environment: Mapping[str, str]) -> Path:
    """Return where the cold store lies unless told otherwise: TIERKV_STORE, or under the user's cache."""
    return _named(environment, "TIERKV_STORE") or cache_directory(environment) / "store"


def cache_directory(environment: Mapping[str, str]) -> Path:
    """Return the user's cache directory for tierkv, by the XDG convention. Raises ConfigError without a home."""
    root = _named(environment, "XDG_CACHE_HOME", must_be_absolute=True)
    if root is None:
        home = home_directory(environment)
        if home is None:
            raise ConfigError(
                "this user has no home directory",
                hint="set HOME or XDG_CACHE_HOME, or name the place with --store or --socket",
            )
        root = home / ".cache"
    return root / "tierkv"


def embedded_directory(model: str | None, environment: Mapping[str, str]) -> Path | None:
    """Return where the embedded model is kept; None where another model is asked for, which needs no such place."""
    return cache_directory(environment) if model in (None, EMBEDDED) else None


def _named(environment: Mapping[str, str], name: str, *, must_be_absolute: bool = False) -> Path | None:
    """Return the path in an environment variable; None where it is unset or empty.

    must_be_absolute: ignore a relative path, as the XDG convention says.
    """
    text = environment.get(name)
    if not text:
        return None
    try:
        path = user_path(text, environment)
    except ConfigError as exc:
        raise ConfigError(f"{name}: {exc}") from exc
    return path if path.is_absolute() or not must_be_absolute else None


def parse_size(text: str) -> int:
    """Return the bytes of a size such as 512M, 8G, 1.5GiB or 4096. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match and Decimal(match[1]) >= _MAX_BYTES // _UNITS[match[2]]:
        raise ConfigError(f"{text[:40]!r} is too large a size: the largest is {format_bytes(_MAX_BYTES)}")
    size = int(Decimal(match[1]) * _UNITS[match[2]]) if match else 0
    if size <= 0:
        raise ConfigError(f"{text[:40]!r} is not a size: say 512M, 8G or 4096")
    return size


@contextmanager
def open_engine(options: EngineOptions, environment: Mapping[str, str]) -> Iterator[Runner]:
    """Load the model, open the cache, and close it again behind the command."""
    loaded = load_model(
        options.model,
        device=options.device,
        dtype=options.dtype,
        cache_dir=embedded_directory(options.model, environment),
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
