"""Which block to evict next. Policies see plain values and never touch bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Protocol

from tierkv.block import BlockHash
from tierkv.errors import ConfigError

__all__ = ["CacheBlock", "EvictionPolicy", "LRUPolicy", "make_policy"]


class CacheBlock(Protocol):
    """What a policy may know of a block. Times are seconds of the cache's clock."""

    @property
    def block_hash(self) -> BlockHash: ...
    @property
    def depth(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def created_at(self) -> float: ...
    @property
    def last_access(self) -> float: ...
    @property
    def access_count(self) -> int: ...


class EvictionPolicy(Protocol):
    """Ranks blocks for eviction. The index keeps it safe: it offers only leaves that nobody uses or pinned.

    A score is read when a block becomes evictable and after each access, not in between: it must depend on
    the block and on the policy's own state, not on the time that has passed since.
    """

    def score_block(self, block: CacheBlock) -> float:
        """Return how gladly the block is given up: the highest score goes first."""

    def update_on_access(self, block: CacheBlock) -> None:
        """Learn that the block was just used; its fields are already up to date."""

    def select_victims(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        """Take up to `count` blocks from `leaves`, which yields the highest score first.

        Once a block has been yielded its parent may follow, so children always go before parents.
        What is yielded and not returned stays cached.
        """


class LRUPolicy:
    """Least recently used goes first; of equals, the deeper block."""

    def score_block(self, block: CacheBlock) -> float:
        """Return the negated time of last use."""
        return -block.last_access

    def update_on_access(self, block: CacheBlock) -> None:
        """Nothing to learn: the index keeps the time of last use."""

    def select_victims(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        """Take the first `count`."""
        return list(islice(leaves, count))


POLICIES: dict[str, Callable[[], EvictionPolicy]] = {"lru": LRUPolicy}


def make_policy(name: str) -> EvictionPolicy:
    """Return a new policy by its name. Raises ConfigError that lists the names there are."""
    if name not in POLICIES:
        raise ConfigError(f"no eviction policy {name!r}; there are: {', '.join(sorted(POLICIES))}")
    return POLICIES[name]()
