"""Evictor: evicts on the user's demand, blocks of one tier or a prompt from every tier."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from tierkv.errors import ConfigError, StoreError
from tierkv.index.chosen_eviction import IN_USE, Choice, Evicted
from tierkv.storage.cold_eviction import StoredPrompt
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.offload import Offloader
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, Tier, TokenIds, as_token_array, iter_chain
from tierkv.values.checks import check_count, check_seconds

__all__ = ["EvictedEverywhere", "Evictor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvictedEverywhere:
    """How many blocks went, by tier, and how many that were chosen stay, by tier and reason.

    A block that two tiers had counts for each. Of a daemon, its warm tier and its store.
    """

    blocks: dict[Tier, int] = field(default_factory=dict)
    stayed: dict[str, int] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """The blocks of all tiers together."""
        return sum(self.blocks.values())


class Evictor:
    """Carries out the evictions that a user asks for."""

    def __init__(self, tiers: Tiers, offloader: Offloader, daemon: DaemonTiers | None) -> None:
        self._tiers = tiers
        self._offloader = offloader
        self._daemon = daemon

    def evict_tier(self, tier: Tier, count: int | None) -> int:
        """Evict up to `count` blocks from the hot or the warm tier; see `TierCache.evict`."""
        if not isinstance(tier, Tier):
            raise ConfigError(
                f"tier must be Tier.HOT or Tier.WARM, got {tier!r}", hint="evict_everywhere evicts from all tiers"
            )
        if tier is Tier.COLD:
            raise ConfigError("the cold tier is evicted through its store: cache.cold.evict(...)")
        if count is not None:
            count = check_count("count", count)
        if tier is Tier.WARM and self._daemon:
            return self._daemon.evict(count)
        wanted = self._tiers.index.pool(tier).capacity if count is None else count
        if tier is Tier.HOT:
            return self._offloader.evict_written(wanted)
        with self._tiers.changed:
            self._tiers.reap()
            return len(self._tiers.evict_warm(wanted))

    def evict_everywhere(self, token_ids: TokenIds | None, older_than_s: float | None) -> EvictedEverywhere:
        """Evict what begins with a prompt, or everything without one, from all tiers; see `TierCache.evict_everywhere`.

        Memory comes first, so that nothing is written down again; then the lower tiers; then what was in use meanwhile.
        """
        if older_than_s is not None:
            older_than_s = check_seconds("older_than_s", older_than_s)
        token_bytes = b"" if token_ids is None else as_token_array(token_ids).tobytes()
        if token_ids is not None and not token_bytes:
            raise ConfigError("a prompt needs at least one token")
        since = None if older_than_s is None else self._tiers.index.now() - older_than_s
        choice = Choice(tokens=token_bytes, unused_since=since)
        blocks = self._evict_memory(choice).blocks
        if not self._offloader.wait_for_writes():
            raise StoreError("blocks were evicted from memory alone: a write to the lower tiers does not end")
        stayed: Counter[str] = Counter()
        if self._daemon:
            answer = self._daemon.evict_everywhere(token_bytes, older_than_s)
            blocks += Counter({Tier.WARM: answer.warm, Tier.COLD: answer.cold})
            stayed.update(answer.stayed)
        elif self._tiers.cold:
            report = self._tiers.cold.evict(
                namespace=self._tiers.namespace,
                older_than_s=older_than_s,
                prompt=self._stored(token_bytes) if token_bytes else None,
            )
            blocks[Tier.COLD] += report.blocks
            stayed["stored, pinned"] += report.num_pinned
            stayed["stored, continued by others that stay"] += report.num_continued
        again = self._evict_memory(choice)
        blocks += again.blocks
        with self._tiers.changed:
            in_use = sum(entry.block_id is not None or entry.awaited for entry in self._tiers.chosen.marked)
            in_files = sum(len(state) for state in self._tiers.states.files)
        stayed.update({f"in memory, {reason}": count for reason, count in again.stayed.items() if reason != IN_USE})
        stayed[f"in memory, {IN_USE}"] += in_use
        stayed["blocks of loaded state files"] += in_files
        return EvictedEverywhere(blocks=dict(blocks), stayed=dict(+stayed))

    def _evict_memory(self, choice: Choice) -> Evicted:
        tiers = self._tiers
        with tiers.changed:
            tiers.reap()
            found = tiers.chosen.evict(tiers.index.root_entry, choice, tiers.layout.block_size * TOKEN_BYTES)
            tiers.changed.notify_all()
        return found

    def _stored(self, token_bytes: bytes) -> StoredPrompt:
        tiers = self._tiers
        chain = iter_chain(tiers.namespace, token_bytes, tiers.layout.block_size, tiers.hash_function)
        return StoredPrompt(self._tiers.namespace, [block_hash for block_hash, _ in chain], token_bytes)
