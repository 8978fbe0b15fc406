"""Events of a cache, as values, and the Protocol of an observer. A cache without observers builds no event."""

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
    """What happened: the first two to memory, the others to one block in one tier."""

    ALLOCATE = "allocate"
    FREE = "free"
    REGISTER = "register"  # computed; requests find it from now on
    PROMOTE = "promote"  # copied up to the tier
    DEMOTE = "demote"  # copied down to the tier
    MOVE = "move"  # copied from `moved_from` to a free place of the tier
    EVICT = "evict"  # the tier forgot it
    HIT = "hit"  # the tier answered a request
    MISS = "miss"  # no tier answered; see `reason`
    SKIP = "skip"  # not written to a lower tier; see `reason`


class NamedBlock(Protocol):
    """Anything that names a block: an entry, a hit, a job."""

    @property
    def block_hash(self) -> BlockHash: ...
    @property
    def parent_hash(self) -> BlockHash: ...
    @property
    def token_bytes(self) -> bytes: ...


class BlockName(NamedTuple):
    """A block that no tier has: its hash, its parent's hash, and its token ids."""

    block_hash: BlockHash
    parent_hash: BlockHash
    token_bytes: bytes

    @classmethod
    def of(cls, block: NamedBlock) -> BlockName:
        """Return the name of a block."""
        return cls(block.block_hash, block.parent_hash, block.token_bytes)


@dataclass(frozen=True, slots=True)
class BlockEvent:
    """One event of one block.

    tier: None for a miss. slot: its block id or warm slot, if it has one. num_bytes: of its tokens.
    block_hash: empty for the miss of a partial block, which has no hash to look up.
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
    """One request, with a HIT or a MISS of each of its blocks, first to last.

    hit_tokens: leading tokens found, by the tier that answered. Blocks that load while the request computes are
    reported in a second event after the load; its num_tokens is 0, and it asks for nothing new.
    asked: the hash of every block, first to last; empty for a partial block.
    hot_blocks: hot blocks cached or in use after the request got its blocks.
    """

    num_tokens: int
    hit_tokens: Mapping[Tier, int]
    blocks: tuple[BlockEvent, ...]
    asked: tuple[BlockHash, ...] = ()
    hot_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRegion:
    """Memory that a cache holds for its lifetime. `address` is a pointer on `device`.

    tier: of its blocks, each of `slot_bytes`. part_of: purpose of the region that contains this one.
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
    """A piece of work on one thread, from `started` to `ended` by time.monotonic. `detail` is for humans."""

    name: str
    started: float
    ended: float
    thread: str
    detail: Mapping[str, int | float | str]

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.ended - self.started


class CacheObserver(Protocol):
    """An observer of a cache. The thread that does the work calls it, so it must be quick and must not raise.

    `on_memory`, `on_block` and `on_request` run under the cache's lock, so they must not call the cache.
    """

    def on_memory(self, region: MemoryRegion) -> None:
        """Learn of a pool or buffer."""

    def on_block(self, event: BlockEvent) -> None:
        """Learn what happened to a block."""

    def on_request(self, event: RequestEvent) -> None:
        """Learn of a request and what each tier answered."""

    def on_use(self, block_ids: Sequence[int]) -> None:
        """Learn that a step of one sequence read these hot blocks. Called in every decode step."""

    def on_span(self, span: Span) -> None:
        """Learn of finished work."""
