"""Committer: registers the blocks that a sequence has computed or loaded, so that other requests find them."""

from __future__ import annotations

from tierkv.errors import ConfigError
from tierkv.index.index import Entry
from tierkv.movers.mover import Ready
from tierkv.requests.sequence import BlockUsers, Sequence
from tierkv.transfer.lookup import Hit, find_partial
from tierkv.transfer.offload import Offloader
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier, iter_chain
from tierkv.values.checks import check_count
from tierkv.values.events import EventKind

__all__ = ["Committer"]


class Committer:
    """Enters blocks into the index, shares those that another sequence has computed too, queues new ones to be written.

    write_through: whether each new block is written down at once. users: of the blocks of running sequences.
    """

    def __init__(
        self,
        tiers: Tiers,
        offloader: Offloader,
        *,
        users: BlockUsers,
        write_through: bool,
    ) -> None:
        self._tiers = tiers
        self._offloader = offloader
        self._users = users
        self._write_through = write_through

    def commit(self, sequence: Sequence, num_computed_tokens: int, *, partial_block: bool) -> int:
        """Register whole blocks of the tokens computed, and with `partial_block` the rest. Return how many were new.

        Of a sequence that is marked inexact, only its exact tokens.
        """
        if type(num_computed_tokens) is not int:  # once a step and sequence: no call in the usual case
            num_computed_tokens = check_count("num_computed_tokens", num_computed_tokens, least=None)
        if not 0 <= num_computed_tokens <= sequence.num_tokens:
            raise ConfigError(f"{num_computed_tokens} tokens computed of a sequence of {sequence.num_tokens}")
        if sequence.exact_tokens is not None:
            num_computed_tokens = min(num_computed_tokens, sequence.exact_tokens)
        size = self._tiers.layout.block_size
        num_new = 0
        if num_computed_tokens // size <= len(sequence.chain) and not (
            partial_block or self._tiers.observers.are_there
        ):
            return 0  # most decode steps: no lock, and no event on the GPU
        with self._tiers.changed:
            if partial_block:
                sequence.wait_all()  # the partial block may be loading, and no pass has waited for it
            written = self._tiers.memory.mover.mark()
            first = len(sequence.chain)
            before = sequence.block_table[first:]
            try:
                num_new += self._register_all(sequence, num_computed_tokens // size, written)
            finally:  # other requests that find these blocks wait until they are written, also if a policy has failed
                after = sequence.block_table[first : num_computed_tokens // size]
                own = [mine for mine, now in zip(before, after, strict=False) if mine == now]  # not those shared now
                self._tiers.copies.note_computing(own, written)
            num_partial = num_computed_tokens - len(sequence.chain) * size
            if partial_block and sequence.is_cacheable and num_partial > 0:
                num_new += self._register(sequence, len(sequence.chain), num_partial, written)
        if self._tiers.observers.are_there:
            self._tiers.observers.use(sequence.block_table)
        return num_new

    def register_loaded(self, sequence: Sequence, loaded: list[Hit]) -> None:
        """Register cold blocks that continue a sequence's chain and are loading; the caller holds the lock.

        It ends at the first that does not fit the chain: a collision, or a sequence that stays private.
        """
        assert self._tiers.changed.is_owned()
        size, index = self._tiers.layout.block_size, self._tiers.index
        written = self._tiers.memory.mover.mark()
        for hit in loaded:
            if not sequence.is_cacheable or hit.parent_hash != self._last_hash(sequence):
                break
            entry = self._tiers.insert(hit)
            if entry is None:
                break
            entry.in_cold = True
            self._register(sequence, len(sequence.chain), size, written, kind=EventKind.PROMOTE)
            index.touch(entry)

    def _last_hash(self, sequence: Sequence) -> BlockHash:
        return sequence.chain[-1] if sequence.chain else self._tiers.index.root

    def _register_all(self, sequence: Sequence, num_blocks: int, written: Ready) -> int:
        """Register the leading whole blocks of a sequence. Return how many no tier had. The caller holds the lock.

        Most blocks are new: runs of them go into the index, and into the queue of writes, in one pass each.
        """
        assert self._tiers.changed.is_owned()
        tiers, size, first = self._tiers, self._tiers.layout.block_size, len(sequence.chain)
        if first >= num_blocks or not sequence.is_cacheable:
            return 0
        step = size * TOKEN_BYTES
        tokens = bytes(memoryview(sequence.token_bytes)[first * step : num_blocks * step])
        named = list(iter_chain(self._last_hash(sequence), tokens, size, tiers.hash_function))
        num_new = 0
        while (at := len(sequence.chain)) < num_blocks and sequence.is_cacheable:
            added: list[Entry] = []
            if not tiers.chosen.marked:
                table = sequence.block_table[at:num_blocks]
                added = tiers.index.extend(self._last_hash(sequence), named[at - first :], table)
            if not added:
                num_new += self._register(sequence, at, size, written)
                continue
            sequence.chain += [entry.block_hash for entry in added]
            num_new += len(added)
            if tiers.observers.are_there:
                for entry in added:
                    tiers.observers.block(EventKind.REGISTER, Tier.HOT, entry, slot=entry.block_id)
            if self._write_through:
                self._offloader.write_down_all(added, written)
        return num_new

    def _register(
        self,
        sequence: Sequence,
        at: int,
        num_tokens: int,
        written: Ready,
        *,
        kind: EventKind = EventKind.REGISTER,
    ) -> int:
        """Make one computed block findable. Return 1 if no tier had it. The caller holds the lock.

        kind: how it came to be hot, for observers.
        """
        assert self._tiers.changed.is_owned()
        tiers, index = self._tiers, self._tiers.index
        parent = sequence.chain[at - 1] if at else index.root
        start = at * self._tiers.layout.block_size * TOKEN_BYTES
        tokens = bytes(sequence.token_bytes[start : start + num_tokens * TOKEN_BYTES])
        block_hash = self._tiers.hash_function(parent, tokens)
        if index.collides(block_hash, parent, tokens):
            tiers.stats.collisions += 1
            sequence.is_cacheable = False
            return 0
        if num_tokens < self._tiers.layout.block_size:
            if find_partial(index, tiers.sources, parent, tokens, num_tokens):
                return 0
            self._offloader.write_partial(block_hash, parent, tokens, sequence.block_table[at], written)
            return 1
        entry = index.insert(block_hash, parent, tokens)
        if entry is None:
            sequence.is_cacheable = False
            return 0
        sequence.chain.append(block_hash)
        if tiers.chosen.marked and kind is EventKind.REGISTER:
            tiers.chosen.spare(entry)  # evicted, and computed anew
        if entry.block_id is not None:
            self._share(sequence, at, entry.block_id)
            return 0
        is_new = entry.warm_slot is None and not entry.in_cold
        tiers.attach(entry, Tier.HOT, sequence.block_table[at], kind)
        if is_new and self._write_through:
            self._offloader.write_down(entry, written)
        return int(is_new)

    def _share(self, sequence: Sequence, at: int, block_id: int) -> None:
        """Let a sequence use the block that is registered instead of its own copy; the caller holds the lock."""
        assert self._tiers.changed.is_owned()
        own = sequence.block_table[at]
        if own == block_id:
            return
        self._tiers.index.hot.pin(block_id)
        if arriving := self._tiers.copies.arriving.get(block_id):
            sequence.loads.append(arriving)
        sequence.block_table[at] = block_id
        self._users.replace(own, block_id)
        self._tiers.index.unpin(Tier.HOT, own)
