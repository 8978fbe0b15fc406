"""How much of a prompt is cached, and where: walks the chain of whole blocks, then the block where it ends.

K and V of a token depend only on the tokens up to it. So the block in which two prompts part ways, and a
stored partial block, still serve the tokens that they have in common.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, TypeAlias

from tierkv.errors import StoreError
from tierkv.index.index import Entry, Index
from tierkv.storage.codec import Bytes
from tierkv.storage.coded import CodedBlock
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo
from tierkv.values.block import (
    TOKEN_BYTES,
    BlockHash,
    ContentDigest,
    HashFunction,
    Tier,
    chain_content_digest,
    iter_chain,
)
from tierkv.values.layout import BlockLayout

__all__ = ["ColdSource", "Hit", "Lookup", "are_in_memory", "are_remote", "count_by_tier", "find_partial", "look_up"]

_logger = logging.getLogger(__name__)
_TIERS = tuple(Tier)  # to iterate over the Enum itself takes a microsecond


class ColdEntry(Protocol):
    """What a lookup needs of a stored block's small record."""

    @property
    def parent(self) -> BlockHash: ...
    @property
    def num_tokens(self) -> int: ...


LookupRun: TypeAlias = "Callable[[Iterable[BlockHash]], Sequence[ColdEntry | None]]"
"""See `ColdStore.lookup_run`."""


class ColdSource(Protocol):
    """Something below the warm tier that can be asked for blocks: the LMDB store, a state file, a remote tier."""

    @property
    def is_remote(self) -> bool: ...
    def lookup(self, block_hash: BlockHash) -> ColdEntry | None: ...
    def find_longest_run(self, parent: BlockHash, token_bytes: bytes) -> tuple[BlockHash, bytes, int] | None: ...
    def read_ahead(self, block_hashes: Sequence[BlockHash]) -> None: ...
    def is_in_memory(self, block_hash: BlockHash) -> bool: ...
    def read_into(
        self, expected: BlockInfo, out: Bytes, *, layout: BlockLayout, coded: CodedBlock | None = None
    ) -> MissReason | None: ...
    def note_damaged(self, block_hash: BlockHash) -> None: ...


class Hit(NamedTuple):
    """A cached block of which the first `num_tokens` tokens are of use.

    entry is None where only a cold source knows the block. content_digest: of a cold block, computed from the prompt's
    tokens; it is compared with the stored digest when the block is read. A tuple, because a frozen dataclass takes four
    times as long to make, and each block of a prompt that is not hot needs one.
    """

    block_hash: BlockHash
    parent_hash: BlockHash
    token_bytes: bytes
    num_tokens: int
    tier: Tier
    entry: Entry | None
    source: ColdSource | None
    content_digest: ContentDigest | None = None


@dataclass(frozen=True, slots=True)
class Lookup:
    """hot: the entries of the whole blocks that lead the prompt and are hot, which need nothing but a pin.

    blocks: the whole blocks after them. partial_block: a block to copy for its common tokens, if any.
    miss: why the block after the last hit is no hit, if another reason than absent is known.
    """

    hot: list[Entry] = field(default_factory=list)
    blocks: list[Hit] = field(default_factory=list)
    partial_block: Hit | None = None
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
        """Yield what was found after the leading hot blocks."""
        yield from self.blocks
        if self.partial_block:
            yield self.partial_block

    def before(self, marked: Collection[Entry]) -> Lookup:
        """Return the lookup up to the first of these blocks."""
        for at, entry in enumerate(self.hot):
            if entry in marked:
                return Lookup(self.hot[:at])
        for at, hit in enumerate(self.blocks):
            if hit.entry in marked:
                return Lookup(self.hot, self.blocks[:at])
        return replace(self, partial_block=None) if self.partial_block and self.partial_block.entry in marked else self


def count_by_tier(num_hot: int, block_size: int, hits: Iterable[Hit]) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Return blocks and tokens of `num_hot` hot blocks and of hits, by tier."""
    blocks = dict.fromkeys(_TIERS, 0)
    tokens = dict.fromkeys(_TIERS, 0)
    blocks[Tier.HOT] = num_hot
    tokens[Tier.HOT] = num_hot * block_size
    for hit in hits:
        blocks[hit.tier] += 1
        tokens[hit.tier] += hit.num_tokens
    return blocks, tokens


def are_in_memory(hits: Sequence[Hit]) -> bool:
    """Return whether reading cold blocks takes no disk, judged by the first, the middle and the last."""
    looked_at = [hits[at] for at in {0, len(hits) // 2, len(hits) - 1}] if hits else []
    return all(hit.source is None or hit.source.is_in_memory(hit.block_hash) for hit in looked_at)


def are_remote(hits: Sequence[Hit]) -> bool:
    """Return whether some of these blocks lie in a remote tier."""
    return any(hit.source is not None and hit.source.is_remote for hit in hits)


def look_up(
    index: Index,
    sources: Sequence[ColdSource],
    token_bytes: bytes,
    *,
    block_size: int,
    max_tokens: int,
    min_partial_tokens: int = 1,
    hash_function: HashFunction,
    lookup_run: LookupRun | None = None,
) -> Lookup:
    """Return the longest cached prefix of a prompt, at most `max_tokens` tokens of it.

    token_bytes: the prompt as little-endian uint32. lookup_run: of the first source, if it has one.
    """
    step, end = block_size * TOKEN_BYTES, min(len(token_bytes), max_tokens * TOKEN_BYTES)
    known = index.walk(token_bytes, block_size, max_tokens)
    block_ids = [entry.block_id for entry in known]
    hot = known[: block_ids.index(None)] if None in block_ids else known
    search = _Search(index, sources)
    blocks: list[Hit] = []
    for entry in known[len(hot) :]:
        hit = search.find_entry(entry)
        if hit is None:
            break
        blocks.append(hit)
    parent = known[len(hot) + len(blocks) - 1].block_hash if hot or blocks else index.root
    miss: MissReason | None = None
    num_found = len(hot) + len(blocks)
    content_digest: ContentDigest | None = None  # of a parent that the index does not know
    if num_found == len(known):
        rest_of_chain = iter_chain(parent, token_bytes, block_size, hash_function, start=num_found * step, end=end)
        for block_hash, tokens in search.ask_first(rest_of_chain, lookup_run):
            hit = search.find_unknown(block_hash, parent, tokens, content_digest)
            if hit is None:
                miss = MissReason.COLLISION if index.collides(block_hash, parent, tokens) else None
                break
            blocks.append(hit)
            parent, content_digest = block_hash, hit.content_digest
    at = (len(hot) + len(blocks)) * step
    rest = token_bytes[at : min(at + step, end)]  # no child has more tokens
    partial_block = search.find_partial(parent, rest, content_digest) if rest else None
    if partial_block and partial_block.num_tokens < min_partial_tokens:
        partial_block = None
        miss = miss or MissReason.TOO_SHORT
    return Lookup(hot, blocks, partial_block, MissReason.IO_ERROR if search.has_failed else miss)


def find_partial(
    index: Index, sources: Sequence[ColdSource], parent: BlockHash, rest: bytes, min_tokens: int
) -> Hit | None:
    """Return the child of `parent` with the longest common run of tokens; of equals, in the faster tier.

    parent: a block that the caller holds, or the root.
    """
    partial_block = _Search(index, sources).find_partial(parent, rest)
    return partial_block if partial_block and partial_block.num_tokens >= min_tokens else None


class _Search:
    """One search through the index and the sources. A source that fails has no block; the failure is only logged."""

    def __init__(self, index: Index, sources: Sequence[ColdSource]) -> None:
        self._index = index
        self._sources = sources
        self._known: dict[BlockHash, ColdEntry | None] = {}  # what the first source has said
        self.has_failed = False

    def ask_first(
        self, chain: Iterator[tuple[BlockHash, bytes]], lookup_run: LookupRun | None
    ) -> Iterator[tuple[BlockHash, bytes]]:
        """Return the chain's (block hash, token bytes), once the first source was asked for all blocks together.

        The store answers from one snapshot, in a third of the time that a snapshot for each block takes.
        """
        if lookup_run is None:
            return chain
        asked: list[tuple[BlockHash, bytes]] = []

        def hashes() -> Iterator[BlockHash]:
            for pair in chain:
                asked.append(pair)
                yield pair[0]

        with suppress(StoreError):  # the question for a single block fails again, and is noted then
            answers = lookup_run(hashes())
            self._known = {block_hash: stored for (block_hash, _), stored in zip(asked, answers, strict=True)}
        return itertools.chain(asked, chain)

    def find_entry(self, entry: Entry) -> Hit | None:
        """Return a block that the index knows, from the fastest tier that has it."""
        parent, tokens = entry.parent.block_hash, entry.token_bytes
        if entry.block_id is None and entry.warm_slot is None:
            return self._find_cold(entry.block_hash, parent, tokens, entry, None)
        tier = Tier.WARM if entry.block_id is None else Tier.HOT
        return Hit(entry.block_hash, parent, tokens, len(tokens) // TOKEN_BYTES, tier, entry, None)

    def find_unknown(
        self, block_hash: BlockHash, parent: BlockHash, tokens: bytes, parent_content_digest: ContentDigest | None
    ) -> Hit | None:
        """Return a whole block that the index does not know, if a cold source has it.

        parent_content_digest: of a parent that the index does not know either.
        """
        if self._index.collides(block_hash, parent, tokens):
            return None
        return self._find_cold(block_hash, parent, tokens, None, parent_content_digest)

    def _find_cold(
        self,
        block_hash: BlockHash,
        parent: BlockHash,
        tokens: bytes,
        entry: Entry | None,
        parent_content_digest: ContentDigest | None,
    ) -> Hit | None:
        num_tokens = len(tokens) // TOKEN_BYTES
        for at, source in enumerate(self._sources):
            try:
                is_known = at == 0 and block_hash in self._known
                stored = self._known[block_hash] if is_known else source.lookup(block_hash)
            except StoreError as exc:
                self._note(exc)
                continue
            if stored and stored.parent == parent and stored.num_tokens == num_tokens:
                content_digest = (
                    self._index.content_digest_of(entry)
                    if entry
                    else self._content_digest(parent, parent_content_digest, tokens)
                )
                return Hit(block_hash, parent, tokens, num_tokens, Tier.COLD, entry, source, content_digest)
        return None

    def find_partial(
        self, parent: BlockHash, rest: bytes, parent_content_digest: ContentDigest | None = None
    ) -> Hit | None:
        """Return the child of `parent` with the longest common run of tokens; of equals, in the faster tier."""
        best: Hit | None = None
        longest = 0
        if nearest := self._index.nearest_child(parent, rest):
            entry, tier, longest = nearest
            best = Hit(entry.block_hash, parent, entry.token_bytes, longest, tier, entry, None)
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
                content_digest = self._content_digest(parent, parent_content_digest, tokens)
                best = Hit(
                    child,
                    parent,
                    tokens,
                    run,
                    Tier.COLD,
                    self._index.get(child, parent, tokens),
                    source,
                    content_digest,
                )
        return best

    def _content_digest(
        self, parent: BlockHash, parent_content_digest: ContentDigest | None, tokens: bytes
    ) -> ContentDigest:
        """Return the content digest of a block whose parent the index knows, or whose parent's digest is known."""
        return (
            self._index.content_digest_after(parent, tokens)
            if parent_content_digest is None
            else chain_content_digest(parent_content_digest, tokens)
        )

    def _note(self, failure: StoreError) -> None:
        self.has_failed = True
        _logger.warning("a lookup failed and is a miss: %s", failure)
