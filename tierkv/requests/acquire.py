"""Admission: gives a request its hot blocks, its cached prefix on the way into them."""

from __future__ import annotations

from dataclasses import replace

from tierkv.index.index import Entry
from tierkv.requests.commit import Registrar
from tierkv.requests.consensus import Accord
from tierkv.requests.prefixes import Prefixes, count_by_tier
from tierkv.requests.running import RunningSequences
from tierkv.requests.sequence import Sequence
from tierkv.requests.statistics import RequestTally
from tierkv.transfer.cold_plan import ColdPlan, ColdPlanner
from tierkv.transfer.cold_reading import ColdReading
from tierkv.transfer.daemon_blocks import Claim
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.load import Pinned, Promoted, Promoter
from tierkv.transfer.lookup import Hit, Lookup
from tierkv.transfer.offload import Demoter
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier

__all__ = ["Admission"]


class Admission:
    """Admits requests: finds their cached prefixes, takes their blocks, starts what has to come up.

    daemon: who has the lower tiers instead of this cache, if anybody. planner: says whether cold blocks are loaded,
    computed, or both; without one all are loaded.
    """

    def __init__(
        self,
        tiers: Tiers,
        *,
        prefixes: Prefixes,
        promoter: Promoter,
        reading: ColdReading,
        demoter: Demoter,
        accord: Accord,
        running: RunningSequences,
        registrar: Registrar,
        tally: RequestTally,
        daemon: DaemonTiers | None,
        planner: ColdPlanner | None,
    ) -> None:
        self._tiers = tiers
        self._prefixes = prefixes
        self._promoter = promoter
        self._reading = reading
        self._demoter = demoter
        self._accord = accord
        self._running = running
        self._registrar = registrar
        self._tally = tally
        self._daemon = daemon
        self._planner = planner
        self._block_size = tiers.layout.block_size

    def admit(self, token_bytes: bytes, *, reuse: bool, may_split: bool) -> Sequence:
        """Return a running sequence with a pinned block for every token; see `TierCache.acquire`."""
        num_tokens = len(token_bytes) // TOKEN_BYTES
        if self._daemon and reuse:
            self._daemon.catch_up()
        with self._tiers.changed:
            found = self._prefixes.find(token_bytes, num_tokens - 1) if reuse else Lookup()
            pinned = self._promoter.pin(found)
        claim: Claim | None = None
        plan = ColdPlan()
        try:
            if self._daemon and reuse:
                found, claim = self._daemon.blocks.look_further(found, token_bytes[:-TOKEN_BYTES], pinned.rest)
            elif self._planner:
                plan = self._planner.plan(found, num_tokens, may_split=may_split)
        except BaseException:  # such as an interrupt: this may wait for another process, or look at a file
            self._tiers.unpin_all(Tier.HOT, pinned.hot)
            self._tiers.unpin(pinned.rest.values())
            raise
        later, dropped = plan.later, plan.dropped
        if later or dropped:
            found = replace(found, blocks=found.blocks[: -len(later or dropped)], partial_block=None)
        promoted = self._promote(found, pinned, token_bytes, claim)
        chain = self._chain_of(promoted, found)
        if later and later[0].parent_hash != (chain[-1] if chain else self._tiers.index.root):
            later = []  # what lies between has not come up: they would be taken for the blocks that follow
        blocks, tokens = count_by_tier(len(promoted.hot), self._block_size, promoted.hits)
        sequence = Sequence(
            token_bytes=bytearray(token_bytes),
            block_table=promoted.block_table,
            num_cached_tokens=sum(tokens.values()),
            cached_tokens=tokens,
            chain=chain,
            loads=promoted.loads,
            claim=claim,
            is_cacheable=reuse,
            cold_load=None if promoted.failure or len(later) < len(plan.later) else plan.load,
        )
        try:
            if later and plan.load:
                self._start_split(sequence, later, in_memory=plan.load.kind.in_memory)
            with self._tiers.changed:
                self._running.add(sequence)
                self._tally.add_request(sequence, found, promoted, blocks=blocks, later=later, dropped=dropped)
                self._touch(promoted.hot, promoted.hits)
            if cold := self._tiers.cold:
                used = promoted.hits[len(sequence.chain) - len(promoted.hot) :]
                cold.touch([*sequence.chain, *(hit.block_hash for hit in used)])
                self._demoter.tend()
        except BaseException:
            self._running.release(sequence)
            raise
        return sequence

    def join(self, sequence: Sequence) -> int:
        """Wait for a sequence's split, if it has one; see `TierCache.join`."""
        split, size = sequence.split, self._block_size
        if split is None:
            return sequence.num_cached_tokens
        split.wait()
        sequence.split = None
        sequence.loads += split.loads
        meeting = split.meeting
        if meeting.num_computed < meeting.first_loaded:  # what the engine was to wait for did not come: a gap
            meeting.lose_loaded()
        loaded = split.hits[meeting.first_loaded :]
        sequence.num_cached_tokens += len(loaded) * size
        sequence.cached_tokens[Tier.COLD] += len(loaded) * size
        with self._tiers.changed:
            reasons = self._tally.count_split(split)
            self._registrar.register_loaded(sequence, loaded)
            self._tally.tell_split(split, loaded, reasons)
        if split.failure:
            sequence.cold_load = None  # that many blocks were not loaded
        if split.failed:
            self._reading.give_up(*split.failed)
        self._promoter.keep_warm(loaded)
        if self._tiers.cold:
            self._tiers.cold.touch([hit.block_hash for hit in loaded])
            self._demoter.tend()
        return split.num_before + (meeting.num_computed + len(loaded)) * size

    def _promote(self, found: Lookup, pinned: Pinned, token_bytes: bytes, claim: Claim | None) -> Promoted:
        """Bring up what was found, cut to what all ranks have. Whatever it raises, no promise to compute is left."""
        num_blocks = -(-len(token_bytes) // (self._block_size * TOKEN_BYTES))
        try:
            return self._accord.promote(
                lambda: self._promoter.promote(found, pinned, num_blocks=num_blocks), topic=token_bytes
            )
        except BaseException:
            self._running.end_claim(claim)
            raise
        finally:
            if self._daemon:
                self._daemon.blocks.end_lookup(found)

    def _chain_of(self, promoted: Promoted, found: Lookup) -> list[BlockHash]:
        """Return the hashes of the whole blocks that came up; a block of which a part is of use is not of the chain."""
        size = self._block_size
        num_whole = sum(hit.num_tokens == size and hit is not found.partial_block for hit in promoted.hits)
        chain = [entry.block_hash for entry in promoted.hot]
        chain += (hit.block_hash for hit in promoted.hits[:num_whole])
        return chain

    def _start_split(self, sequence: Sequence, later: list[Hit], *, in_memory: bool) -> None:
        start = len(sequence.chain)
        targets = sequence.block_table[start : start + len(later)]
        sequence.split = self._promoter.split(
            later, targets, num_before=sequence.num_cached_tokens, in_memory=in_memory
        )

    def _touch(self, hot: list[Entry], hits: list[Hit]) -> None:
        """Record the use of what was hot, and of hits that were promoted. The caller holds the lock."""
        assert self._tiers.changed.is_owned()
        index = self._tiers.index
        index.touch_all(hot)  # pinned since the lookup, so still the same blocks
        found = (
            index.get(hit.block_hash, hit.parent_hash, hit.token_bytes, content_digest=hit.content_digest)
            for hit in hits
        )
        index.touch_all(entry for entry in found if entry)
