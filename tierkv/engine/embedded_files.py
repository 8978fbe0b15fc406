"""Where the embedded model lies, and whether its files are sound. Needs no torch."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import xxhash

from tierkv.errors import StoreError
from tierkv.values.files import open_regular

__all__ = ["EMBEDDED", "MANIFEST", "find_embedded_model", "is_sound", "places_of"]

EMBEDDED = "embedded"
MANIFEST = "tierkv-files.json"
"""The file with size and checksum of every other file; written last."""

_VERSION = 1
_LIMIT_BYTES = 128 << 20


def find_embedded_model(cache_dir: Path) -> Path | None:
    """Return the directory of the embedded model, or None if it is missing or damaged."""
    for target in places_of(cache_dir):
        with suppress(OSError):
            if is_sound(target):
                return target
    return None


def places_of(cache_dir: Path) -> tuple[Path, Path]:
    """Return the directory that all users share, and this user's own."""
    shared = cache_dir / f"embedded-model-{_VERSION}"
    return shared, shared.with_name(f"{shared.name}-of-{os.geteuid()}")


def is_sound(path: Path) -> bool:
    """Return whether every file of the model is as it was written. Raises OSError for an unreadable file."""
    try:
        files = json.loads(_read(path / MANIFEST, 1 << 16))
        if sum(size for size, _ in files.values()) > _LIMIT_BYTES or "config.json" not in files:
            return False
        return all(
            xxhash.xxh3_128_hexdigest(_read(path / name, size)) == digest for name, (size, digest) in files.items()
        )
    except (FileNotFoundError, NotADirectoryError, StoreError, ValueError, TypeError, AttributeError, RecursionError):
        return False


def _read(path: Path, limit_bytes: int) -> bytes:
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(limit_bytes + 1)
