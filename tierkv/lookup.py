"""How much of a prompt is cached, and where: walks the chain of whole blocks, then the block where it ends.

K and V of a token depend only on the tokens up to it. So the block in which two prompts part ways, and a
stored partial tail, still serve the tokens that they have in common.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tierkv.block import TOKEN_BYTES, BlockHash, HashFunction, Tier, common_run, iter_chain
from tierkv.index import Entry, Index
from tierkv.layout import BlockLayout
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo

__all__ = ["ColdSource", "Hit", "Lookup", "find_tail", "look_up"]


class ColdEntry(Protocol):
    """What a lookup needs of a stored block's small record."""

    @property
    def parent(self) -> BlockHash: ...
    @property
    def num_tokens(self) -> int: ...


class ColdSource(Protocol):
    """Something below the warm tier that can be asked for blocks: the LMDB store, a state file."""

    def lookup(self, block_hash: BlockHash) -> ColdEntry | None: ...
    def children(self, parent: BlockHash) -> list[BlockHash]: ...
    def read_tokens(self, block_hash: BlockHash) -> bytes | None: ...
    def read_into(
        self, expected: BlockInfo, out: npt.NDArray[np.uint8], *, layout: BlockLayout
    ) -> MissReason | None: ...
    def delete(self, block_hash: BlockHash) -> int: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """A cached block of which the first `num_tokens` tokens are of use.

    entry is None where only a cold source knows the block; its token ids are compared when it is read.
    """

    block_hash: BlockHash
    parent_hash: BlockHash
    token_bytes: bytes
    num_tokens: int
    tier: Tier
    entry: Entry | None
    source: ColdSource | None


@dataclass(frozen=True, slots=True)
class Lookup:
    """blocks: the whole blocks that lead the prompt. tail: a block to copy for its common tokens, if any."""

    blocks: list[Hit]
    tail: Hit | None
    has_collision: bool

    @property
    def num_tokens(self) -> int:
        """Leading tokens that need no prefill."""
        return sum(hit.num_tokens for hit in self)

    def __iter__(self) -> Iterator[Hit]:
        yield from self.blocks
        if self.tail:
            yield self.tail


def look_up(
    index: Index,
    sources: Sequence[ColdSource],
    token_bytes: bytes,
    *,
    block_size: int,
    max_tokens: int,
    min_partial_tokens: int = 1,
    hash_function: HashFunction,
) -> Lookup:
    """Return the longest cached prefix of a prompt, at most `max_tokens` tokens of it.

    token_bytes: the prompt as little-endian uint32.
    """
    blocks: list[Hit] = []
    parent = index.root
    has_collision = False
    usable = token_bytes[: max_tokens * TOKEN_BYTES]
    for block_hash, tokens in iter_chain(index.root, usable, block_size, hash_function):
        hit = _find(index, sources, block_hash, parent, tokens)
        if hit is None:
            has_collision = index.collides(block_hash, parent, tokens)
            break
        blocks.append(hit)
        parent = block_hash
    rest = usable[len(blocks) * block_size * TOKEN_BYTES :]
    tail = find_tail(index, sources, parent, rest, min_partial_tokens) if rest else None
    return Lookup(blocks, tail, has_collision)


def _find(
    index: Index, sources: Sequence[ColdSource], block_hash: BlockHash, parent: BlockHash, tokens: bytes
) -> Hit | None:
    num_tokens = len(tokens) // TOKEN_BYTES
    entry = index.get(block_hash, parent, tokens)
    if entry and entry.block_id is not None:
        return Hit(block_hash, parent, tokens, num_tokens, Tier.HOT, entry, None)
    if entry and entry.warm_slot is not None:
        return Hit(block_hash, parent, tokens, num_tokens, Tier.WARM, entry, None)
    if not entry and index.collides(block_hash, parent, tokens):
        return None
    for source in sources:
        stored = source.lookup(block_hash)
        if stored and stored.parent == parent and stored.num_tokens == num_tokens:
            return Hit(block_hash, parent, tokens, num_tokens, Tier.COLD, entry, source)
    return None


def find_tail(
    index: Index, sources: Sequence[ColdSource], parent: BlockHash, rest: bytes, min_tokens: int
) -> Hit | None:
    """Return the child of `parent` with the longest common run of tokens; of equals, in the faster tier."""
    best: Hit | None = None
    longest = min_tokens - 1
    for tier in (Tier.HOT, Tier.WARM):
        for entry in index.children(parent):
            if entry.place(tier) is None:
                continue
            run = common_run(entry.token_bytes, rest)
            if run > longest:
                longest = run
                best = Hit(entry.block_hash, parent, entry.token_bytes, run, tier, entry, None)
    for source in sources:
        if longest * TOKEN_BYTES == len(rest):
            break
        for child in source.children(parent):
            tokens = source.read_tokens(child)
            run = common_run(tokens, rest) if tokens else 0
            if tokens and run > longest and not index.collides(child, parent, tokens):
                longest = run
                entry_or_none = index.get(child, parent, tokens)
                best = Hit(child, parent, tokens, run, Tier.COLD, entry_or_none, source)
    return best
