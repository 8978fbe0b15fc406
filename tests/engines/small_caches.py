"""Small persistent caches for `generate`, and the one thread that their tests compute with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from generate_hunt import small_store

from tierkv.integrations.transformers import PersistentCache, persistent_cache

__all__ = ["SIZE", "one_thread", "opened"]

SIZE = 8


def opened(model: Any, path: Path | None, **options: Any) -> PersistentCache:
    """Return `generate` of a model with a small cache of blocks of SIZE tokens, never too slow to be used."""
    return persistent_cache(
        model, config=small_store(path), **{"block_size": SIZE, "compute_or_load": False, **options}
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute tiny models with one thread: several take longer where other processes compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
