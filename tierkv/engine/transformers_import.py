"""Imports Transformers, an optional dependency, with a clear error if it is missing and without its log output."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from tierkv.errors import ConfigError

__all__ = ["import_transformers"]


def import_transformers() -> Any:
    """Return the module. Raises ConfigError if it is not installed or cannot be imported."""
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("running a model needs transformers", hint="pip install 'tierkv[hf]'")
    try:
        transformers = importlib.import_module("transformers")
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    except Exception as exc:  # its import may fail in many ways; it also writes to the user's directories
        raise ConfigError(f"transformers cannot be imported: {type(exc).__name__}: {exc}") from exc
    return transformers
