"""Messages about evictions on demand: the request, and how the daemon's clients learn of it."""

from __future__ import annotations

import msgspec

from tierkv.daemon.messages import Message

__all__ = [
    "EngineEvicted",
    "EvictBlocks",
    "EvictedBlocks",
    "Eviction",
    "EvictionDone",
    "EvictionNotice",
    "Evictions",
    "EvictionsSince",
]


class EvictBlocks(Message, tag=60):
    """Evict from every tier: warm memory, the store, and the hot copies of engines. Answered with EvictedBlocks.

    Blocks that match all given conditions are evicted. namespace: 16 bytes, or empty for all. tokens and hashes: a
    prompt of that namespace, and the hashes of its whole blocks. They match what begins with the prompt, and those of
    its own blocks that no other prompt continues. older_than_s: not used for so long; below 0: of any age. to_bytes:
    then the least recently used are evicted until so much is live; below 0: no bound.
    """

    namespace: bytes = b""
    hashes: bytes = b""
    tokens: bytes = b""
    older_than_s: float = -1.0
    to_bytes: int = -1


class EngineEvicted(msgspec.Struct, array_like=True, gc=False):
    """How many hot blocks one client has dropped. in_use: those that it drops when running requests end.

    has_answered: False if it has not answered in time.
    """

    client: str
    has_answered: bool
    blocks: int = 0
    in_use: int = 0
    pinned: int = 0


class EvictedBlocks(Message, tag=61):
    """Answer to EvictBlocks. warm, cold: evicted blocks. left, live_bytes: of the store, or of the warm tier.

    stayed: chosen blocks that were not evicted, by tier and reason.
    """

    warm: int
    cold: int
    freed_bytes: int
    left: int
    live_bytes: int
    stayed: dict[str, int]
    engines: list[EngineEvicted]


class EvictionNotice(Message, tag=62):
    """Sent to clients without a request, as request 0: blocks were evicted. number: of the last eviction."""

    number: int


class EvictionsSince(Message, tag=63):
    """Ask what was evicted. log, number: of the last eviction that this client knows; 0, 0 before any answer."""

    log: int
    number: int


class Eviction(msgspec.Struct, array_like=True, gc=False):
    """One eviction: the conditions of EvictBlocks. block_hashes: blocks evicted by size; None for any block.

    at: time of the system's clock.
    """

    number: int
    at: float
    namespace: bytes = b""
    tokens: bytes = b""
    older_than_s: float = -1.0
    block_hashes: bytes | None = None


class Evictions(Message, tag=64):
    """Answer to EvictionsSince. is_complete: False if some are forgotten: then any block may have been evicted."""

    log: int
    number: int
    is_complete: bool
    evictions: list[Eviction]


class EvictionDone(Message, tag=65):
    """The client has dropped its hot blocks of all evictions up to this number. Answered as Release."""

    number: int
    blocks: int
    in_use: int
    pinned: int
