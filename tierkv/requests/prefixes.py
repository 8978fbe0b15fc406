"""Prefixes: which leading blocks of a prompt are cached, and where; and the user's pins on them."""

from __future__ import annotations

from dataclasses import dataclass

from tierkv.index.index import Entry
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.lookup import Lookup, count_by_tier
from tierkv.transfer.remote_lookup import find_everywhere
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier

__all__ = ["Match", "Prefixes"]


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

    def __init__(self, tiers: Tiers, daemon: DaemonTiers | None) -> None:
        self._tiers = tiers
        self._daemon = daemon

    def match(self, token_bytes: bytes) -> Match:
        """Return how many leading tokens are cached, and where. Changes nothing, and reads no block."""
        num_tokens = len(token_bytes) // TOKEN_BYTES
        if self._daemon:
            self._daemon.catch_up()
        found = find_everywhere(self._tiers, token_bytes, num_tokens)
        if self._daemon:
            found, _ = self._daemon.blocks.look_further(found, token_bytes, None)
        blocks, tokens = count_by_tier(len(found.hot), self._tiers.layout.block_size, found.rest())
        return Match(num_tokens, blocks, tokens, tuple(found.block_hashes))

    def set_pinned(self, token_bytes: bytes, pinned: bool, *, ttl_s: float | None = None) -> int:
        """Pin or unpin a prompt's blocks in every tier that has them. Return how many blocks that are.

        ttl_s: how long the pin holds; None for good.
        A block that only a state file has is in no tier: it is not counted. The store and the daemon, which may
        refuse, come first: if one does, nothing is pinned in memory.
        """
        num_tokens, cold = len(token_bytes) // TOKEN_BYTES, self._tiers.cold
        stored: set[BlockHash] = set()
        if cold:
            with self._tiers.changed:
                hashes = self._tiers.find(token_bytes, num_tokens).block_hashes
            if not cold.read_only:
                cold.set_pinned(hashes, pinned, ttl_s=ttl_s)
            stored = {each for each in hashes if cold.lookup(each) is not None}
        num_there = self._daemon.set_pinned(token_bytes, pinned, ttl_s) if self._daemon else 0
        with self._tiers.changed:
            found = self._tiers.find(token_bytes, num_tokens)
            num_here = 0
            for block_hash, entry in zip(found.block_hashes, self._entries(found), strict=True):
                is_in_memory = entry is not None and (entry.block_id is not None or entry.warm_slot is not None)
                if entry is not None:
                    self._tiers.index.set_pinned(entry, pinned, ttl_s=ttl_s)
                num_here += is_in_memory or block_hash in stored
        return max(num_here, num_there)

    def _entries(self, found: Lookup) -> list[Entry | None]:
        return [*found.hot, *(hit.entry for hit in found.rest())]
