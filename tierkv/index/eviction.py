"""What the index asks of an eviction policy, and the order in which it offers blocks to it.

Three methods make a policy (`EvictionPolicy`). One that learns from what is inserted has a fourth
(`ObservingPolicy`); one whose order is more than one number a block brings its own queue (`QueueingPolicy`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Generic, Protocol, TypeVar, runtime_checkable

from tierkv.index.eviction_heap import Offers
from tierkv.values.block import BlockHash

__all__ = [
    "CacheBlock",
    "EvictionPolicy",
    "ObservingPolicy",
    "QueueingPolicy",
    "ScoreQueue",
    "VictimQueue",
    "new_queue",
]


_FAR_AWAY_S = float(1 << 36)
"""Two thousand years: beyond what any clock says, and floats this large still tell 20 us apart."""


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
        """Whether prompts part behind it: two or more known blocks continue it.

        Children go before parents, so who keeps this block keeps the whole prefix that ends with it.
        """


class EvictionPolicy(Protocol):
    """Ranks blocks for eviction. The index keeps it safe: it offers only leaves that nobody uses or pinned.

    A score is read when a block becomes evictable and after each access, not in between: it must depend on
    the block and on the policy's own state, not on the time that has passed since.

    Any object with the three methods is one. A class that inherits from this one has them already, and is LRU until it
    says otherwise: so it can be about single blocks, and leave the others to `super()`.

    >>> class ShortPromptsFirst(EvictionPolicy):
    ...     def score_block(self, block: CacheBlock) -> float:
    ...         return 1 / (1 + block.depth)
    >>> cache.set_eviction_policy(ShortPromptsFirst())
    """

    def score_block(self, block: CacheBlock) -> float:
        """Return how gladly the block is given up: the highest score goes first.

        Here: the time since its last use, but for a constant, since scores must not change while time passes.
        It is always above zero: a block with a score below that goes after all others.
        """
        return _FAR_AWAY_S - block.last_access

    def update_on_access(self, block: CacheBlock) -> None:
        """Learn that the block was just used; its fields are already up to date. Here: nothing to learn."""
        return

    def select_victims(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        """Take up to `count` blocks from `leaves`, which yields the highest score first.

        Once a block has been yielded its parent may follow, so children always go before parents.
        What is yielded and not returned stays cached. Here: the first `count`.
        """
        return list(islice(leaves, count))


@runtime_checkable
class ObservingPolicy(Protocol):
    """A policy that is also told of blocks that are new to the index, or that come back to it."""

    def update_on_insert(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        """Learn that the block was just inserted under a parent; None at the beginning of a chain."""


Block = TypeVar("Block", bound=CacheBlock)


class VictimQueue(Protocol[Block]):
    """The evictable blocks of one tier, in the order of a policy.

    The index may push a block several times and never takes one out: it throws away what `pop` returns
    under an old stamp, or while it is not evictable. Memory and order are the queue's own affair.
    """

    def add(self, block: Block) -> None:
        """Learn that the tier holds the block from now on."""

    def remove_all(self, blocks: Sequence[Block]) -> None:
        """Learn that the tier has forgotten some blocks."""

    def push(self, block: Block, stamp: int) -> None:
        """Offer a block, which the tier holds, for eviction. Its stamp changes with each use."""

    def pop(self) -> tuple[Block, int] | None:
        """Take the block that should go next, with the stamp it was pushed under. None if none is left."""

    def goes_first(self, block: Block) -> bool:
        """Tell whether a block that is not in the queue would be the next to go, all along a chain for instance.

        Asked only after a `pop`, before anything else happened. If so, the block need not be pushed to be taken; False
        may also mean that this is not known without pushing it.
        """

    def clear(self) -> None:
        """Forget everything pushed, not what was added: it is pushed anew."""

    def __iter__(self) -> Iterator[tuple[Block, int]]:
        """Yield what has been pushed, in any order."""

    def __len__(self) -> int:
        """Return how much has been pushed, what is out of date included."""


@runtime_checkable
class QueueingPolicy(Protocol):
    """A policy that keeps the order of a tier's blocks itself, and is not asked for scores."""

    def new_queue(self) -> VictimQueue[CacheBlock]:
        """Return an empty queue for one tier."""


class ScoreQueue(Generic[Block]):
    """Highest score first, of equals the deepest block."""

    def __init__(self, policy: EvictionPolicy) -> None:
        self._policy = policy
        self._offers: Offers[Block] = Offers()

    def add(self, block: Block) -> None:
        """Nothing to note: the score says it all."""

    def remove_all(self, blocks: Sequence[Block]) -> None:
        """Nothing to note."""

    def score(self, block: Block) -> float:
        """Return what the block is ranked by."""
        return self._policy.score_block(block)

    def push(self, block: Block, stamp: int) -> None:
        """Offer a block under its score of now."""
        self._offers.push(-self.score(block), block, stamp)

    def goes_first(self, block: Block) -> bool:
        """Tell whether all that was pushed has lower scores."""
        return self._offers.is_before_all(-self.score(block))

    def pop(self) -> tuple[Block, int] | None:
        """Take the block with the highest score."""
        return self._offers.pop()

    def clear(self) -> None:
        """Forget everything pushed."""
        self._offers.clear()

    def __iter__(self) -> Iterator[tuple[Block, int]]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)


def new_queue(policy: EvictionPolicy) -> VictimQueue[CacheBlock]:
    """Return a queue in the order of a policy: its own if it brings one, else by its scores."""
    return policy.new_queue() if isinstance(policy, QueueingPolicy) else ScoreQueue(policy)
