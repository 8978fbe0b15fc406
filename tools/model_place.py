"""Where a command keeps the embedded model: in the user's cache directory, or in the store where there is none."""

from __future__ import annotations

import os
from pathlib import Path

from tierkv.engine.embedded_files import find_embedded_model
from tierkv.errors import ConfigError
from tierkv.tools.options import cache_directory

__all__ = ["embedded_directory"]


def embedded_directory(store: Path | None) -> Path:
    """Return the directory in which the embedded model lies, or is to be made.

    It is the user's cache directory for tierkv. A user of a container may have no home, or none that can be written:
    then it is the store's directory, which is made, for this user alone. store: None where the command has none.
    Raises ConfigError where there is no place.
    """
    try:
        cache = cache_directory(os.environ)
    except ConfigError:
        if store is None:
            raise
    else:
        if store is None or _is_writable(cache) or find_embedded_model(cache):
            return cache
    try:
        store.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(
            f"the embedded model has no place: {exc.filename}: {exc.strerror}",
            hint="set XDG_CACHE_HOME to a directory of your own, or name a model with --model",
        ) from exc
    return store


def _is_writable(path: Path) -> bool:
    """Return whether files can be made in a directory, or in what exists of the directories above it."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)
