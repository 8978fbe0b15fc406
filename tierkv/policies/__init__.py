"""The eviction policies by name. A policy sees plain values, never bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tierkv.errors import ConfigError
from tierkv.index.eviction_policy import CacheBlock, EvictionPolicy
from tierkv.policies.density import HitDensityPolicy
from tierkv.policies.learned import LearnedPolicy
from tierkv.policies.scores import CostAwarePolicy, LFUPolicy, LRUPolicy, PrefixAwarePolicy
from tierkv.policies.segmented import AdaptiveLRUPolicy, S3FIFOPolicy

__all__ = [
    "DEFAULT_POLICY",
    "AdaptiveLRUPolicy",
    "CacheBlock",
    "CostAwarePolicy",
    "EvictionPolicy",
    "HitDensityPolicy",
    "LFUPolicy",
    "LRUPolicy",
    "LearnedPolicy",
    "PrefixAwarePolicy",
    "S3FIFOPolicy",
    "make_policy",
    "policy_names",
]

DEFAULT_POLICY = "hit-density"
_LEARNED = "learned:"


def policy_names() -> list[str]:
    """Return the names of the policies, except learned:FILE; the default first."""
    return list(_makers())


def make_policy(name: str) -> EvictionPolicy:
    """Return a new policy by its name; underscores may replace hyphens. `learned:FILE` reads trained weights.

    Raises ConfigError for an unknown name, with a list of the names, and for an unusable file.

    >>> cache.set_eviction_policy(make_policy("lru"))
    """
    if not isinstance(name, str):
        raise ConfigError(f"an eviction policy's name must be text, got {name!r}")
    if name.startswith(_LEARNED):
        return LearnedPolicy.load(Path(name.removeprefix(_LEARNED)))
    makers = _makers()
    maker = makers.get(name.lower().replace("_", "-"))
    if maker is None:
        raise ConfigError(f"no eviction policy {name!r}; there are: {', '.join(sorted(makers))}, learned:FILE")
    return maker()


def _makers() -> dict[str, Callable[[], EvictionPolicy]]:
    return {
        DEFAULT_POLICY: HitDensityPolicy,
        "lru": LRUPolicy,
        "lfu": LFUPolicy,
        "adaptive-lru": AdaptiveLRUPolicy,
        "cost-aware": CostAwarePolicy,
        "prefix-aware": PrefixAwarePolicy,
        "s3-fifo": S3FIFOPolicy,
    }
