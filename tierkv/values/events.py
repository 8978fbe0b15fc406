"""What a cache tells those who watch it: values, and the Protocol of a watcher.

The facade owns this seam. A cache without observers builds none of these values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from tierkv.values.block import BlockHash, Tier

__all__ = [
    "BlockEvent",
    "BlockName",
    "CacheObserver",
    "EventKind",
    "MemoryRegion",
    "NamedBlock",
    "RequestEvent",
    "Span",
]


class EventKind(Enum):
    """What happened. The first two are of memory, the others of one block in one tier."""

    ALLOCATE = "allocate"
    FREE = "free"
    REGISTER = "register"  # computed, and found there from now on
    PROMOTE = "promote"  # copied up into the tier
    DEMOTE = "demote"  # copied down into the tier
    MOVE = "move"  # copied from `moved_from` to another place of the tier, which was free
    EVICT = "evict"  # the tier forgot it
    HIT = "hit"  # the tier answered a request
    MISS = "miss"  # no tier did; `reason` says why
    SKIP = "skip"  # it was not written to a lower tier; `reason` says why


class NamedBlock(Protocol):
    """Anything that says which block it is: an entry, a hit, a job."""

    @property
    def block_hash(self) -> BlockHash: ...
    @property
    def parent_hash(self) -> BlockHash: ...
    @property
    def token_bytes(self) -> bytes: ...


class BlockName(NamedTuple):
    """A block that no tier has, as its hash, its parent's, and its token ids."""

    block_hash: BlockHash
    parent_hash: BlockHash
    token_bytes: bytes

    @classmethod
    def of(cls, block: NamedBlock) -> BlockName:
        """Return the name of a block."""
        return cls(block.block_hash, block.parent_hash, block.token_bytes)


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One thing that happened to one block.

    tier: where; None for a miss. slot: its block id or warm slot, where it has one. num_bytes: of its tokens.
    A miss that is shorter than a block has no hash that anybody could find: its block_hash is empty.
    """

    kind: EventKind
    tier: Tier | None
    block_hash: BlockHash
    parent_hash: BlockHash
    num_tokens: int
    num_bytes: int
    slot: int | None = None
    reason: str = ""
    moved_from: int | None = None


@dataclass(frozen=True, slots=True)
class RequestEvent:
    """What one request asked for, and a HIT or a MISS of each block, first to last.

    hit_tokens: leading tokens that were found, by the tier that answered. What comes up behind a request while it
    computes is told when it has ended, in a second event: of that num_tokens is 0, and it asks for nothing new.
    asked: the hash of every block, first to last; empty for one that nobody could find.
    hot_blocks: hot blocks that are cached or in use, now that the request has its room.
    """

    num_tokens: int
    hit_tokens: Mapping[Tier, int]
    blocks: tuple[BlockEvent, ...]
    asked: tuple[BlockHash, ...] = ()
    hot_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRegion:
    """Memory that a cache holds for its lifetime. `address` is a pointer on `device`.

    tier: whose blocks lie there, one each `slot_bytes`. part_of: purpose of the region that contains this one.
    """

    purpose: str
    shape: tuple[int, ...]
    dtype: str
    num_bytes: int
    address: int
    device: str
    tier: Tier | None = None
    slot_bytes: int = 0
    part_of: str | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Work with a beginning and an end on one thread; seconds of time.monotonic. `detail` is for humans."""

    name: str
    started: float
    ended: float
    thread: str
    detail: Mapping[str, int | float | str]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.started


class CacheObserver(Protocol):
    """Somebody who watches a cache. Called by whichever thread does the work, so it must be quick.

    `on_memory`, `on_block` and `on_request` come under the cache's lock: an observer never calls the cache from
    them. It never raises.
    """

    def on_memory(self, region: MemoryRegion) -> None:
        """Learn of a pool or buffer."""

    def on_block(self, event: BlockEvent) -> None:
        """Learn what happened to a block."""

    def on_request(self, event: RequestEvent) -> None:
        """Learn what a request asked for and what answered it."""

    def on_use(self, block_ids: Sequence[int]) -> None:
        """Learn that one step of one sequence read these hot blocks: the hot path of decoding."""

    def on_span(self, span: Span) -> None:
        """Learn that some work is done."""
