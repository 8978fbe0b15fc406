"""How much of a prompt is cached, and where: walks the chain of whole blocks, then the block where it ends.

K and V of a token depend only on the tokens up to it. So the block in which two prompts part ways, and a
stored partial tail, still serve the tokens that they have in common.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from tierkv.block import TOKEN_BYTES, BlockHash, HashFunction, Tier, common_run, iter_chain
from tierkv.errors import StoreError
from tierkv.index import Entry, Index
from tierkv.layout import BlockLayout
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo

__all__ = ["ColdSource", "Hit", "Lookup", "find_tail", "look_up"]

_logger = logging.getLogger(__name__)


class ColdEntry(Protocol):
    """What a lookup needs of a stored block's small record."""

    @property
    def parent(self) -> BlockHash: ...
    @property
    def num_tokens(self) -> int: ...


class ColdSource(Protocol):
    """Something below the warm tier that can be asked for blocks: the LMDB store, a state file."""

    def lookup(self, block_hash: BlockHash) -> ColdEntry | None: ...
    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None: ...
    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None: ...
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
    """blocks: the whole blocks that lead the prompt. tail: a block to copy for its common tokens, if any.

    miss: why the block behind the last hit is none, where there is more to say than that it is absent.
    """

    blocks: list[Hit]
    tail: Hit | None
    miss: MissReason | None = None

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
    miss: MissReason | None = None
    search = _Search(index, sources)
    usable = token_bytes[: max_tokens * TOKEN_BYTES]
    for block_hash, tokens in iter_chain(index.root, usable, block_size, hash_function):
        hit = search.find(block_hash, parent, tokens)
        if hit is None:
            miss = MissReason.COLLISION if index.collides(block_hash, parent, tokens) else None
            break
        blocks.append(hit)
        parent = block_hash
    rest = usable[len(blocks) * block_size * TOKEN_BYTES :]
    tail = search.find_tail(parent, rest) if rest else None
    if tail and tail.num_tokens < min_partial_tokens:
        tail = None
        miss = miss or MissReason.TOO_SHORT
    return Lookup(blocks, tail, MissReason.IO_ERROR if search.has_failed else miss)


def find_tail(
    index: Index, sources: Sequence[ColdSource], parent: BlockHash, rest: bytes, min_tokens: int
) -> Hit | None:
    """Return the child of `parent` with the longest common run of tokens; of equals, in the faster tier."""
    tail = _Search(index, sources).find_tail(parent, rest)
    return tail if tail and tail.num_tokens >= min_tokens else None


class _Search:
    """One search through the index and the sources. A source that fails has nothing: no request ends there."""

    def __init__(self, index: Index, sources: Sequence[ColdSource]) -> None:
        self._index = index
        self._sources = sources
        self.has_failed = False

    def find(self, block_hash: BlockHash, parent: BlockHash, tokens: bytes) -> Hit | None:
        """Return a whole block, from the fastest tier that has it."""
        num_tokens = len(tokens) // TOKEN_BYTES
        entry = self._index.get(block_hash, parent, tokens)
        if entry and entry.block_id is not None:
            return Hit(block_hash, parent, tokens, num_tokens, Tier.HOT, entry, None)
        if entry and entry.warm_slot is not None:
            return Hit(block_hash, parent, tokens, num_tokens, Tier.WARM, entry, None)
        if not entry and self._index.collides(block_hash, parent, tokens):
            return None
        for source in self._sources:
            try:
                stored = source.lookup(block_hash)
            except StoreError as exc:
                self._note(exc)
                continue
            if stored and stored.parent == parent and stored.num_tokens == num_tokens:
                return Hit(block_hash, parent, tokens, num_tokens, Tier.COLD, entry, source)
        return None

    def find_tail(self, parent: BlockHash, rest: bytes) -> Hit | None:
        """Return the child of `parent` with the longest common run of tokens; of equals, in the faster tier."""
        best: Hit | None = None
        longest = 0
        for tier in (Tier.HOT, Tier.WARM):
            for entry in self._index.children(parent):
                if entry.place(tier) is None:
                    continue
                run = common_run(entry.token_bytes, rest)
                if run > longest:
                    longest = run
                    best = Hit(entry.block_hash, parent, entry.token_bytes, run, tier, entry, None)
        for source in self._sources:
            if longest * TOKEN_BYTES == len(rest):
                break
            try:
                found = source.find_longest_run(parent, rest)
            except StoreError as exc:
                self._note(exc)
                continue
            if found is None:
                continue
            child, tokens, run = found
            if run > longest and not self._index.collides(child, parent, tokens):
                longest = run
                best = Hit(child, parent, tokens, run, Tier.COLD, self._index.get(child, parent, tokens), source)
        return best

    def _note(self, failure: StoreError) -> None:
        self.has_failed = True
        _logger.warning("a lookup failed and is a miss: %s", failure)
