"""RequestStatistics: counts what each request found and missed, and notifies observers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Several

from tierkv.requests.sequence import Sequence
from tierkv.storage.cold_notes import ColdStats
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.load import Promoted
from tierkv.transfer.lookup import Hit, Lookup
from tierkv.transfer.overlapped_load import OverlappedLoad
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier, iter_chain
from tierkv.values.events import BlockName
from tierkv.values.stats import TierStats

__all__ = ["RequestStatistics", "log_misses", "occupancy"]

_log = logging.getLogger(__name__)


class RequestStatistics:
    """Counts requests, hits by tier, and each miss with its reason. The caller of every method holds the lock."""

    def __init__(self, tiers: Tiers) -> None:
        self._tiers = tiers
        self._block_size = tiers.layout.block_size

    def add_request(
        self,
        sequence: Sequence,
        found: Lookup,
        promoted: Promoted,
        *,
        blocks: Mapping[Tier, int],
        later: Several[Hit],
        dropped: Several[Hit],
    ) -> list[MissReason]:
        """Count a request that has its blocks, and notify observers. Return why each missing block is missing.

        blocks: how many were found, by tier. later: cold ones that load in the background. dropped: cold ones that are
        computed instead.
        """
        assert self._tiers.changed.is_owned()
        stats, observers = self._tiers.stats, self._tiers.observers
        num_blocks = -(-sequence.num_tokens // self._block_size)
        num_found = sum(blocks.values()) + len(later) + len(dropped)
        if dropped:
            stats.misses += len(dropped)
            stats.miss_reasons[MissReason.RECOMPUTED.value] += len(dropped)
        miss = promoted.failure or found.miss
        missed = self._count(sequence, num_blocks - num_found, num_found, miss, num_surplus=promoted.num_surplus)
        if observers.are_there:
            reasons = [MissReason.RECOMPUTED] * len(dropped) + missed
            names = [*map(BlockName.of, dropped), *self._names(sequence, num_found)]
            observers.request(
                sequence.num_tokens,
                sequence.cached_tokens,
                promoted.hot,
                promoted.hits,
                zip(names, reasons, strict=True),
                later=later,
                hot_blocks=self._tiers.index.hot.used_count,
            )
        for tier, count in blocks.items():
            stats.hits[tier] += count
        for tier, count in sequence.cached_tokens.items():
            stats.hit_tokens[tier] += count
        return [*[MissReason.RECOMPUTED] * len(dropped), *missed]

    def count_overlap(self, load: OverlappedLoad) -> list[MissReason]:
        """Count what became of a request's cold blocks. Return why each was computed that was."""
        assert self._tiers.changed.is_owned()
        stats = self._tiers.stats
        num_computed = load.division.first_loaded
        num_loaded = len(load.hits) - num_computed
        stats.hits[Tier.COLD] += num_loaded
        stats.hit_tokens[Tier.COLD] += num_loaded * self._block_size
        for tier in (Tier.COLD, Tier.WARM):  # each cold block passes through a warm slot
            stats.bytes_out[tier] += num_loaded * self._tiers.layout.block_bytes
        stats.misses += num_computed
        stats.miss_reasons[MissReason.RECOMPUTED.value] += num_computed - (load.failure is not None)
        if load.failure:
            stats.miss_reasons[load.failure.value] += 1
        reasons = [MissReason.RECOMPUTED] * num_computed
        return [*reasons[:-1], load.failure] if load.failure and reasons else reasons

    def record_overlap(self, load: OverlappedLoad, loaded: Several[Hit], computed: Several[MissReason]) -> None:
        """Notify observers of a request's cold blocks: those loaded, and why the other ones were computed."""
        assert self._tiers.changed.is_owned()
        observers = self._tiers.observers
        if observers.are_there:
            observers.rest_of_request(
                {Tier.COLD: len(loaded) * self._block_size},
                loaded,
                zip(map(BlockName.of, load.hits), computed, strict=False),
                hot_blocks=self._tiers.index.hot.used_count,
            )

    def _count(
        self, sequence: Sequence, num_missing: int, num_found: int, miss: MissReason | None, num_surplus: int = 0
    ) -> list[MissReason]:
        """Count a request. Return why each missing block is missing.

        miss: why the first missing block is no hit, if another reason than absent is known. num_surplus: blocks after
        the hits that this rank had and dropped.
        """
        assert self._tiers.changed.is_owned()
        stats = self._tiers.stats
        stats.requests += 1
        stats.prompt_tokens += sequence.num_tokens
        stats.misses += num_missing
        stats.collisions += miss is MissReason.COLLISION
        reasons = self._miss_reasons(sequence, num_found) if sequence.is_cacheable else []
        known = [MissReason.OTHER_RANK] * num_surplus + ([miss] if miss else [])
        reasons = [*known, *reasons[len(known) :]][:num_missing]
        if reasons:
            stats.miss_reasons.update(reason.value for reason in reasons)
        if num_absent := num_missing - len(reasons):  # usually all of them
            stats.miss_reasons[MissReason.ABSENT.value] += num_absent
        return reasons + [MissReason.ABSENT] * num_absent

    def _miss_reasons(self, sequence: Sequence, num_hits: int) -> list[MissReason]:
        """Return for each whole block after the hits whether the store has evicted it or never had it."""
        assert self._tiers.changed.is_owned()
        if self._tiers.cold is None or not self._tiers.cold.has_evicted:
            return []
        size = self._block_size
        parent = self._last_hash(sequence)
        rest = bytes(sequence.token_bytes[len(sequence.chain) * size * TOKEN_BYTES :])
        hashes = [block_hash for block_hash, _ in iter_chain(parent, rest, size, self._tiers.hash_function)]
        evicted = map(self._tiers.cold.was_evicted, hashes[num_hits - len(sequence.chain) :])
        return [MissReason.EVICTED if each else MissReason.ABSENT for each in evicted]

    def _names(self, sequence: Sequence, num_found: int) -> list[BlockName]:
        """Name the blocks after those found. A partly filled block, or a private one, has no hash."""
        assert self._tiers.changed.is_owned()
        step, done = self._block_size * TOKEN_BYTES, len(sequence.chain)
        rest = bytes(sequence.token_bytes[done * step :])
        parent = self._last_hash(sequence)
        named: list[BlockName] = []
        if sequence.is_cacheable:
            for block_hash, tokens in iter_chain(parent, rest, self._block_size, self._tiers.hash_function):
                named.append(BlockName(block_hash, parent, tokens))
                parent = block_hash
        unnamed = range(len(named) * step, len(rest), step)
        named += (BlockName(b"", b"", rest[start : start + step]) for start in unnamed)
        return named[num_found - done :]

    def _last_hash(self, sequence: Sequence) -> BlockHash:
        assert self._tiers.changed.is_owned()
        return sequence.chain[-1] if sequence.chain else self._tiers.index.root


def log_misses(sequence: Sequence, misses: Several[MissReason], num_later: int) -> None:
    """Log at debug level what a request found, and its misses by reason. No lock may be held: a handler may wait.

    num_later: cold blocks that still load.
    """
    if misses and _log.isEnabledFor(logging.DEBUG):
        reasons = Counter(reason.value for reason in misses).most_common()
        _log.debug(
            "%d of %d tokens found%s; blocks that are misses: %s",
            sequence.num_cached_tokens,
            sequence.num_tokens,
            f", {num_later} blocks load" if num_later else "",
            ", ".join(f"{count} {name}" for name, count in reasons),
        )


def occupancy(tiers: Tiers, cold: ColdStats | None) -> dict[Tier, TierStats]:
    """Return the sizes of the tiers, counters left at 0; the caller holds the lock.

    cold: what the store says of itself, asked without the lock.
    """
    assert tiers.changed.is_owned()
    block_bytes = tiers.layout.block_bytes
    sizes = {
        tier: TierStats(
            blocks=pool.used_count,
            used_bytes=pool.used_count * block_bytes,
            stored_bytes=pool.used_count * slot_bytes,
            capacity_bytes=pool.capacity * block_bytes,
        )
        for tier, pool, slot_bytes in (
            (Tier.HOT, tiers.index.hot, block_bytes),
            (Tier.WARM, tiers.index.warm, tiers.memory.warm.stride_bytes),
        )
    }
    if cold:
        sizes[Tier.COLD] = TierStats(
            blocks=cold.blocks,
            used_bytes=cold.raw_bytes,
            stored_bytes=cold.live_bytes,
            capacity_bytes=cold.quota_bytes,
            evictions=cold.evicted_blocks,
        )
    return sizes
