"""Prefixes: which leading blocks of a prompt are cached, and where; and the user's pins on them."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from tierkv.index.index import Entry
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.lookup import Hit, Lookup, look_up
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, HashFunction, Tier

__all__ = ["Match", "Prefixes", "count_by_tier"]


@dataclass(frozen=True, slots=True)
class Match:
    """What a prompt would find: blocks and tokens by the tier that has them. Cold token ids are not yet compared.

    >>> match = cache.match(token_ids)
    >>> match.num_tokens, match.num_cached_tokens
    (9, 8)
    """

    num_tokens: int
    blocks: dict[Tier, int]
    tokens: dict[Tier, int]
    block_hashes: tuple[BlockHash, ...] = ()

    @property
    def num_cached_tokens(self) -> int:
        """Leading tokens that some tier has."""
        return sum(self.tokens.values())


class Prefixes:
    """Finds the cached prefixes of prompts in all tiers, a daemon's included. Moves no bytes.

    token_bytes, everywhere: a prompt's token ids as little-endian uint32.
    """

    def __init__(
        self, tiers: Tiers, daemon: DaemonTiers | None, *, min_partial_tokens: int, hash_function: HashFunction
    ) -> None:
        self._tiers = tiers
        self._daemon = daemon
        self._min_partial_tokens = min_partial_tokens
        self._hash = hash_function

    def find(self, token_bytes: bytes, max_tokens: int) -> Lookup:
        """Return what this cache's own tiers have of the first `max_tokens` tokens; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        found = look_up(
            self._tiers.index,
            self._tiers.sources,
            token_bytes,
            block_size=self._tiers.layout.block_size,
            max_tokens=max_tokens,
            min_partial_tokens=self._min_partial_tokens,
            hash_function=self._hash,
        )
        return _without_marked(found, self._tiers.chosen.marked) if self._tiers.chosen.marked else found

    def match(self, token_bytes: bytes) -> Match:
        """Return how many leading tokens are cached, and where. Changes and reads nothing."""
        num_tokens = len(token_bytes) // TOKEN_BYTES
        if self._daemon:
            self._daemon.evictions.catch_up()
        with self._tiers.changed:
            found = self.find(token_bytes, num_tokens)
        if self._daemon:
            found, _ = self._daemon.reader.look_further(found, token_bytes, None)
        blocks, tokens = count_by_tier(len(found.hot), self._tiers.layout.block_size, found.rest())
        return Match(num_tokens, blocks, tokens, tuple(found.block_hashes))

    def set_pinned(self, token_bytes: bytes, pinned: bool) -> int:
        """Pin or unpin a prompt's blocks in every tier that has them. Return how many blocks that are.

        A block that only a state file has is in no tier: it is not counted. The store and the daemon, which may
        refuse, come first: if one does, nothing is pinned in memory.
        """
        num_tokens, cold = len(token_bytes) // TOKEN_BYTES, self._tiers.cold
        stored: set[BlockHash] = set()
        if cold:
            with self._tiers.changed:
                hashes = self.find(token_bytes, num_tokens).block_hashes
            if not cold.read_only:
                cold.set_pinned(hashes, pinned)
            stored = {each for each in hashes if cold.lookup(each) is not None}
        num_there = self._daemon.set_pinned(token_bytes, pinned) if self._daemon else 0
        with self._tiers.changed:
            found = self.find(token_bytes, num_tokens)
            num_here = 0
            for block_hash, entry in zip(found.block_hashes, self._entries(found), strict=True):
                is_in_memory = entry is not None and (entry.block_id is not None or entry.warm_slot is not None)
                if entry is not None:
                    self._tiers.index.set_pinned(entry, pinned)
                num_here += is_in_memory or block_hash in stored
        return max(num_here, num_there)

    def _entries(self, found: Lookup) -> list[Entry | None]:
        return [*found.hot, *(hit.entry for hit in found.rest())]


def _without_marked(found: Lookup, marked: Collection[Entry]) -> Lookup:
    """Return a lookup up to the first block that was evicted and is still in use."""
    for at, entry in enumerate(found.hot):
        if entry in marked:
            return Lookup(found.hot[:at])
    for at, hit in enumerate(found.blocks):
        if hit.entry in marked:
            return Lookup(found.hot, found.blocks[:at])
    return replace(found, partial_block=None) if found.partial_block and found.partial_block.entry in marked else found


def count_by_tier(num_hot: int, block_size: int, hits: Iterable[Hit]) -> tuple[dict[Tier, int], dict[Tier, int]]:
    """Return blocks and tokens of `num_hot` hot blocks and of hits, by tier."""
    blocks = dict.fromkeys(Tier, 0)
    tokens = dict.fromkeys(Tier, 0)
    blocks[Tier.HOT] = num_hot
    tokens[Tier.HOT] = num_hot * block_size
    for hit in hits:
        blocks[hit.tier] += 1
        tokens[hit.tier] += hit.num_tokens
    return blocks, tokens
