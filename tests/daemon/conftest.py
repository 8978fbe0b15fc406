"""Daemons and clients as processes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from daemon_fixtures import short_path, start_daemon
from daemon_process import BLOCK_BYTES, OpenCache
from pattern_engine import tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.values.namespace import Namespace

__all__ = ["short_path", "start_daemon"]

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def open_cache(short_path: Path, request: pytest.FixtureRequest) -> Iterator[OpenCache]:
    """Return a function that opens a cache on the daemon's socket; it may be called for several at a time."""
    opened: list[TierCache] = []

    def open_one(
        *, hot: int = 16, weights: str = "w", salt: str = "", block_size: int = 4, **options: Any
    ) -> TierCache:
        hash_function = {"hash_function": options.pop("hash_function")} if "hash_function" in options else {}
        options = {"socket": short_path / "d.sock", "compute_wait_s": 0.0, **options}
        config = CacheConfig(block_size=block_size, hot_bytes=hot * BLOCK_BYTES * block_size // 4, **options)
        namespace = Namespace(weights=weights, layout=tiny_layout(block_size=block_size), salt=salt)
        cache = TierCache(config, namespace=namespace, device=request.param, **hash_function)
        opened.append(cache)
        return cache

    yield open_one
    for cache in opened:
        cache.close()
