"""How much of a prompt is cached, and where: walks the chain of whole blocks, then the block where it ends.

K and V of a token depend only on the tokens up to it. So the block in which two prompts part ways, and a
stored partial tail, still serve the tokens that they have in common.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tierkv.block import TOKEN_BYTES, BlockHash, HashFunction, Tier, iter_chain
from tierkv.errors import StoreError
from tierkv.index import Entry, Index
from tierkv.layout import BlockLayout
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.planes import Bytes
from tierkv.storage.record import BlockInfo

__all__ = ["ColdSource", "Hit", "Lookup", "find_tail", "has_chain", "look_up"]

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
    def read_tokens(self, block_hash: BlockHash) -> bytes | None: ...
    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None: ...
    def read_into(
        self, expected: BlockInfo, out: Bytes, *, layout: BlockLayout, coded: CodedBlock | None = None
    ) -> MissReason | None: ...
    def delete(self, block_hash: BlockHash) -> int: ...


class Hit(NamedTuple):
    """A cached block of which the first `num_tokens` tokens are of use.

    entry is None where only a cold source knows the block; its token ids are compared when it is read.
    A tuple, because there is one for every block of a prompt that is not hot: a frozen dataclass takes four times
    as long to make.
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
    """hot: the entries of the whole blocks that lead the prompt and are hot, which need nothing but a pin.

    blocks: the whole blocks behind them. tail: a block to copy for its common tokens, if any.
    miss: why the block behind the last hit is none, where there is more to say than that it is absent.
    """

    hot: list[Entry] = field(default_factory=list)
    blocks: list[Hit] = field(default_factory=list)
    tail: Hit | None = None
    miss: MissReason | None = None

    @property
    def num_tokens(self) -> int:
        """Leading tokens that need no prefill."""
        return sum(entry.num_tokens for entry in self.hot) + sum(hit.num_tokens for hit in self.rest())

    @property
    def block_hashes(self) -> list[BlockHash]:
        """The hashes of all blocks found, in order."""
        return [*(entry.block_hash for entry in self.hot), *(hit.block_hash for hit in self.rest())]

    def rest(self) -> Iterator[Hit]:
        """Yield what was found behind the leading hot blocks."""
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
    usable = token_bytes[: max_tokens * TOKEN_BYTES]
    known = index.walk(usable, block_size, hash_function)
    hot = known[: next((i for i, entry in enumerate(known) if entry.block_id is None), len(known))]
    search = _Search(index, sources)
    blocks: list[Hit] = []
    for entry in known[len(hot) :]:
        hit = search.find_entry(entry)
        if hit is None:
            break
        blocks.append(hit)
    parent = known[len(hot) + len(blocks) - 1].block_hash if hot or blocks else index.root
    miss: MissReason | None = None
    rest = usable[(len(hot) + len(blocks)) * block_size * TOKEN_BYTES :]
    if len(hot) + len(blocks) == len(known):
        for block_hash, tokens in iter_chain(parent, rest, block_size, hash_function):
            hit = search.find_unknown(block_hash, parent, tokens)
            if hit is None:
                miss = MissReason.COLLISION if index.collides(block_hash, parent, tokens) else None
                break
            blocks.append(hit)
            parent = block_hash
        rest = usable[(len(hot) + len(blocks)) * block_size * TOKEN_BYTES :]
    tail = search.find_tail(parent, rest) if rest else None
    if tail and tail.num_tokens < min_partial_tokens:
        tail = None
        miss = miss or MissReason.TOO_SHORT
    return Lookup(hot, blocks, tail, MissReason.IO_ERROR if search.has_failed else miss)


def has_chain(source: ColdSource, entry: Entry) -> bool:
    """Tell whether a source has a block and all that lead to it: the same parents, the same token ids.

    Where it has another block under one of these hashes, what follows that block there is not what follows it here.
    Raises StoreError.
    """
    while entry.parent is not entry:  # the trunk, which stands for the namespace
        stored = source.lookup(entry.block_hash)
        if stored is None or stored.parent != entry.parent_hash:
            return False
        if source.read_tokens(entry.block_hash) != entry.token_bytes:
            return False
        entry = entry.parent
    return True


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
        self._is_ours: dict[tuple[int, BlockHash], bool] = {}

    def find_entry(self, entry: Entry) -> Hit | None:
        """Return a block that the index knows, from the fastest tier that has it."""
        parent, tokens = entry.parent.block_hash, entry.token_bytes
        if entry.block_id is None and entry.warm_slot is None:
            return self._find_cold(entry.block_hash, parent, tokens, entry)
        tier = Tier.WARM if entry.block_id is None else Tier.HOT
        return Hit(entry.block_hash, parent, tokens, len(tokens) // TOKEN_BYTES, tier, entry, None)

    def find_unknown(self, block_hash: BlockHash, parent: BlockHash, tokens: bytes) -> Hit | None:
        """Return a whole block that the index does not know, if a cold source has it."""
        if self._index.collides(block_hash, parent, tokens):
            return None
        return self._find_cold(block_hash, parent, tokens, None)

    def _find_cold(self, block_hash: BlockHash, parent: BlockHash, tokens: bytes, entry: Entry | None) -> Hit | None:
        num_tokens = len(tokens) // TOKEN_BYTES
        for number, source in enumerate(self._sources):
            try:
                stored = source.lookup(block_hash)
                is_same = stored and stored.parent == parent and stored.num_tokens == num_tokens
                if not is_same or not self._leads_there(number, parent):
                    continue
            except StoreError as exc:
                self._note(exc)
                continue
            else:
                self._is_ours[number, block_hash] = True  # for those that follow; its tokens are compared when read
                return Hit(block_hash, parent, tokens, num_tokens, Tier.COLD, entry, source)
        return None

    def find_tail(self, parent: BlockHash, rest: bytes) -> Hit | None:
        """Return the child of `parent` with the longest common run of tokens; of equals, in the faster tier."""
        best: Hit | None = None
        longest = 0
        if nearest := self._index.nearest_child(parent, rest):
            entry, tier, longest = nearest
            best = Hit(entry.block_hash, parent, entry.token_bytes, longest, tier, entry, None)
        for number, source in enumerate(self._sources):
            if longest * TOKEN_BYTES == len(rest):
                break
            try:
                found = source.find_longest_run(parent, rest)
                if found and found[2] > longest and not self._leads_there(number, parent):
                    continue
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

    def _leads_there(self, number: int, parent: BlockHash) -> bool:
        """Tell whether a source has the very chain that leads to a block. Raises StoreError.

        Asked once a search where it passes from memory to the source, and then for each block that follows there.
        """
        key = number, parent
        if parent == self._index.root:
            return True
        if key not in self._is_ours:
            entry = self._index.peek(parent)
            self._is_ours[key] = entry is not None and has_chain(self._sources[number], entry)
        return self._is_ours[key]

    def _note(self, failure: StoreError) -> None:
        self.has_failed = True
        _logger.warning("a lookup failed and is a miss: %s", failure)
