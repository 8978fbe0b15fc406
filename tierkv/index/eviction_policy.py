"""What the index asks of an eviction policy, and what a policy may know of a block.

A policy has three methods (`EvictionPolicy`). A fourth lets it learn of inserted blocks (`ObservingPolicy`). A policy
whose order is more than one number a block brings its own (`OrderingPolicy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Protocol, TypeVar, runtime_checkable

from tierkv.values.block import BlockHash

__all__ = [
    "FAR_AWAY_S",
    "AccessObservingPolicy",
    "CacheBlock",
    "ChainObservingPolicy",
    "ChainOrder",
    "EvictionOrder",
    "EvictionPolicy",
    "ObservingPolicy",
    "OrderingPolicy",
    "access_observer",
    "insert_observer",
]

FAR_AWAY_S = float(1 << 36)
"""2,000 years: above every clock's time; floats of this size still differ by 20 us."""


class CacheBlock(Protocol):
    """What a policy may know of a block. Times are seconds of the cache's clock."""

    @property
    def block_hash(self) -> BlockHash: ...
    @property
    def parent_hash(self) -> BlockHash: ...
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
    @property
    def is_prefix_block(self) -> bool:
        """Whether two or more known blocks continue it. A policy that keeps it keeps the whole prefix before it."""

    flags: int
    """The bits from NOTE_SHIFT on are the policy's: a note of up to MOST_NOTE, 0 at first and under another policy."""


class EvictionPolicy(Protocol):
    """Ranks blocks for eviction. Subclass it, or write any object with these methods; the defaults are LRU.

    The index asks only about leaves that are not in use and not pinned, so no policy can evict a block that is needed.
    The index reads a score when a block becomes evictable and after each use, not in between. So a score depends on
    the block and on the policy's own state, never on the time since.

    >>> class ShortPromptsFirst(EvictionPolicy):
    ...     def score_block(self, block: CacheBlock) -> float:
    ...         return 1 / (1 + block.depth)
    >>> cache.set_eviction_policy(ShortPromptsFirst())
    """

    def score_block(self, block: CacheBlock) -> float:
        """Return the score: the block with the highest one goes first. Where this raises, the default counts.

        Default: a constant minus the time of the last use. It is above zero, so a negative score goes last.
        """
        return FAR_AWAY_S - block.last_access

    def update_on_access(self, block: CacheBlock) -> None:
        """Learn that the block was just used; its fields are up to date. Default: nothing."""
        return

    def select_evictions(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        """Take up to `count` blocks from `leaves`, which yields the highest score first. Default: the first `count`.

        A parent may follow once its children were yielded, so children always come before parents.
        A block that is yielded and not returned stays cached.
        """
        return list(islice(leaves, count))


@runtime_checkable
class ObservingPolicy(Protocol):
    """A policy that also learns of inserted blocks."""

    def update_on_insert(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        """Learn that the block was inserted, for the first time or again. parent: None at the start of a chain."""


@runtime_checkable
class ChainObservingPolicy(Protocol):
    """A policy that learns of the inserted blocks of a chain in one call, which costs it less."""

    def update_on_insert_all(self, blocks: Sequence[CacheBlock], parent: CacheBlock | None) -> None:
        """Learn that blocks were inserted, each of them the parent of the next one. parent: of the first."""


@runtime_checkable
class AccessObservingPolicy(Protocol):
    """A policy that learns of the uses of a chain in one call, which costs it less."""

    def update_on_access_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Learn that blocks were just used, all at one time; see `EvictionPolicy.update_on_access`."""


def access_observer(policy: EvictionPolicy) -> Callable[[Sequence[CacheBlock]], None] | None:
    """Return what notifies a policy of the uses of blocks; None if it does not learn of them."""
    if isinstance(policy, AccessObservingPolicy):
        return policy.update_on_access_all
    observe = policy.update_on_access
    if getattr(observe, "__func__", None) is EvictionPolicy.update_on_access:
        return None

    def observe_all(blocks: Sequence[CacheBlock]) -> None:
        for block in blocks:
            observe(block)

    return observe_all


def insert_observer(
    policy: EvictionPolicy,
) -> Callable[[Sequence[CacheBlock], CacheBlock | None], None] | None:
    """Return what notifies a policy of an inserted chain and of its parent; None if it does not learn of them."""
    if isinstance(policy, ChainObservingPolicy):
        return policy.update_on_insert_all
    if not isinstance(policy, ObservingPolicy):
        return None
    observe = policy.update_on_insert

    def observe_all(blocks: Sequence[CacheBlock], parent: CacheBlock | None) -> None:
        for block in blocks:
            observe(block, parent)
            parent = block

    return observe_all


Block = TypeVar("Block", bound=CacheBlock)


class EvictionOrder(Protocol[Block]):
    """The evictable blocks of one tier, in the order of a policy.

    The index may push a block several times and never takes it out. It skips what `pop` returns with an old stamp, or
    while the block is not evictable.
    """

    def add(self, block: Block) -> None:
        """Learn that the tier now holds the block."""

    def remove_all(self, blocks: Sequence[Block]) -> None:
        """Learn that the tier has forgotten these blocks."""

    def push(self, block: Block, stamp: int) -> None:
        """Add a block that the tier holds to the order. Its stamp, of 32 bits, changes with each use."""

    def pop(self) -> tuple[Block, int] | None:
        """Take the block that goes next, with the stamp of its push; None if the order is empty."""

    def goes_first(self, block: Block) -> bool:
        """Return whether a block that is not in the order would be popped next. Called only right after a `pop`.

        True saves a push and a pop: a parent often follows its child. False may also mean "unknown".
        """

    def clear(self) -> None:
        """Forget every push, but not what was added: the index pushes again."""

    def __iter__(self) -> Iterator[tuple[Block, int]]:
        """Yield every push, in any order."""

    def __len__(self) -> int:
        """Return the number of pushes, outdated ones included."""


@runtime_checkable
class ChainOrder(Protocol):
    """An order that answers for a chain in one call, which costs it less."""

    def add_all(self, blocks: Sequence[CacheBlock]) -> None:
        """Learn that the tier now holds these blocks; see `EvictionOrder.add`."""

    def count_first(self, blocks: Sequence[CacheBlock]) -> int:
        """Return how many leading blocks would be popped next, one after the other; see `EvictionOrder.goes_first`."""


@runtime_checkable
class OrderingPolicy(Protocol):
    """A policy with an order of its own; the index does not ask it for scores."""

    def new_order(self) -> EvictionOrder[CacheBlock]:
        """Return an empty order for one tier."""
