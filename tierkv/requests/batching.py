"""Batching: what an engine with one loop for many sequences asks, so that none of them stops the others."""

from __future__ import annotations

from tierkv.background.active_calls import ActiveCalls, while_open
from tierkv.movers.mover import Move
from tierkv.requests.consensus import Consensus
from tierkv.requests.sequence import RunningSequences, Sequence
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, Tier, TokenIds, as_token_array

__all__ = ["Batching"]


class Batching:
    """Questions before `TierCache.acquire`, and partial blocks shared between running sequences.

    calls: of the cache, which closes only after calls in here have ended.
    """

    def __init__(
        self,
        tiers: Tiers,
        running: RunningSequences,
        daemon: DaemonTiers | None,
        *,
        calls: ActiveCalls,
        consensus: Consensus | None = None,
    ) -> None:
        self.calls: ActiveCalls = calls
        self._tiers = tiers
        self._running = running
        self._daemon = daemon
        self._consensus = consensus

    @property
    def has_other_processes(self) -> bool:
        """Whether other processes may compute blocks that this cache would find."""
        return self._daemon is not None and self._daemon.blocks.wait_s > 0

    @while_open
    def has_room(self, token_ids: TokenIds, *, reuse: bool, spare: int = 0) -> bool:
        """Return whether the hot pool has room for a prompt, and for `spare` more blocks, beside what is in use.

        A block whose write to a lower tier is in flight counts as in use. So True may become False and False may become
        True without a call. Of several ranks all must have room; all ask together.
        """
        has_room = self._has_room(token_ids, reuse=reuse, spare=spare)
        return self._consensus.can_all(has_room, topic=b"room") if self._consensus else has_room

    def _has_room(self, token_ids: TokenIds, *, reuse: bool, spare: int) -> bool:
        size = self._tiers.layout.block_size
        hot = self._tiers.index.hot
        missing = -(-len(token_ids) // size) + spare - (hot.limit - hot.referenced_count)
        if missing <= 0 or not reuse:
            return missing <= 0
        token_bytes = as_token_array(token_ids).tobytes()[:-TOKEN_BYTES]
        with self._tiers.changed:
            for entry in self._tiers.index.walk(token_bytes, size):
                if entry.block_id is None:
                    break
                missing -= hot.reference_count(entry.block_id) > 0  # shared with a running sequence
        return missing <= 0

    @while_open
    def computed_elsewhere(self, token_ids: TokenIds) -> int | None:
        """Return how many leading tokens of a prompt are there, if another process computes the block after them.

        None if no other process does. Waits for no process, leases and claims nothing.
        """
        if self._daemon is None:
            return None
        token_bytes = as_token_array(token_ids).tobytes()
        self._daemon.catch_up()
        with self._tiers.changed:
            found = self._tiers.find(token_bytes, len(token_bytes) // TOKEN_BYTES - 1)
        return self._daemon.blocks.computed_elsewhere(found, token_bytes[:-TOKEN_BYTES])

    @while_open
    def share_partial(self, source: Sequence, target: Sequence, num_tokens: int) -> int:
        """Copy a partly filled block of one running sequence into another one's. Return how many tokens that saves.

        num_tokens: leading tokens that both have in common, with exact K and V in `source`; only the last, partial
        block of them is copied, and only if `target` has found all whole blocks before it. The copy is queued on the
        current stream, behind the passes that wrote the block. Raises StoreError if it fails.
        """
        self._running.require(source)
        self._running.require(target)
        size = self._tiers.layout.block_size
        at, rest = divmod(num_tokens, size)
        saved = num_tokens - target.num_cached_tokens
        first, last = at * size * TOKEN_BYTES, num_tokens * TOKEN_BYTES
        if (
            not 0 < saved <= rest
            or target.overlapped_load
            or source.overlapped_load
            or (source.exact_tokens is not None and num_tokens > source.exact_tokens)
            or target.num_tokens <= num_tokens
            or source.block_table[:at] != target.block_table[:at]
            or source.token_bytes[first:last] != target.token_bytes[first:last]
        ):
            return 0
        for each in (source, target):  # a copy may still arrive in either block
            each.wait_all()
        move = Move(source.block_table[at], target.block_table[at])
        target.loads.append(self._tiers.memory.mover.copy([move]))
        target.num_cached_tokens = target.piece_end = num_tokens
        target.cached_tokens[Tier.HOT] += saved
        with self._tiers.changed:
            self._tiers.stats.hit_tokens[Tier.HOT] += saved
        return saved
