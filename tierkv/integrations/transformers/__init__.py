"""Transformers: a persistent prefix cache for `model.generate`.

from tierkv.integrations.transformers import persistent_cache

with persistent_cache(model, "store"):
    model.generate(**inputs)
"""

from __future__ import annotations

from tierkv.integrations.transformers.cache import PersistentCache, persistent_cache
from tierkv.integrations.transformers.statistics import GenerateStats

__all__ = ["GenerateStats", "PersistentCache", "persistent_cache"]
