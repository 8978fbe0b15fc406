"""Acquirer: gives a request its hot blocks, and loads its cached prefix into them."""

from __future__ import annotations

from collections.abc import Sequence as Items
from contextlib import suppress
from dataclasses import dataclass, field, replace

from tierkv.background.active_calls import ActiveCalls, while_open
from tierkv.errors import ClosedError, ConfigError
from tierkv.index.index import Entry
from tierkv.requests.commit import Committer
from tierkv.requests.consensus import Consensus
from tierkv.requests.sequence import RunningSequences, Sequence
from tierkv.requests.statistics import RequestStatistics, log_misses
from tierkv.storage.outcomes import MissReason
from tierkv.transfer.cold_reading import ColdReading
from tierkv.transfer.daemon_blocks import Claim
from tierkv.transfer.daemon_tiers import DaemonTiers
from tierkv.transfer.load import Loader, Pinned, Promoted
from tierkv.transfer.lookup import Hit, Lookup, count_by_tier
from tierkv.transfer.offload import Offloader
from tierkv.transfer.overlapped_load import OverlappedLoad
from tierkv.transfer.recompute_or_load import ColdCosts, ColdPlan, Decision, LoadKind, RecomputeOrLoad
from tierkv.transfer.remote_lookup import look_remotely
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import TOKEN_BYTES, BlockHash, Tier
from tierkv.values.checks import check_count, check_seconds

__all__ = ["Acquirer"]


@dataclass(slots=True)
class _Wanted:
    """What a request loads: what was found, without the cold blocks that the plan leaves for later or drops.

    costs: of the cold blocks, if they may be computed instead.
    """

    found: Lookup
    num_tokens: int
    costs: ColdCosts | None = None
    plan: ColdPlan = field(default_factory=ColdPlan)


class Acquirer:
    """Starts requests: finds their cached prefixes, takes their blocks, starts the loads. Owns their sequences.

    daemon: has the lower tiers instead of this cache, if there is one. choice: decides whether cold blocks are loaded,
    computed, or both; without it all are loaded. calls: of the cache, for the methods that sequences call.
    """

    def __init__(
        self,
        tiers: Tiers,
        *,
        calls: ActiveCalls,
        loader: Loader,
        reading: ColdReading,
        offloader: Offloader,
        consensus: Consensus | None,
        running: RunningSequences,
        committer: Committer,
        statistics: RequestStatistics,
        daemon: DaemonTiers | None,
        choice: RecomputeOrLoad | None,
    ) -> None:
        self.calls = calls
        self._tiers = tiers
        self._loader = loader
        self._reading = reading
        self._offloader = offloader
        self._consensus = consensus
        self._running = running
        self._committer = committer
        self._statistics = statistics
        self._daemon = daemon
        self._choice = choice
        self._block_size = tiers.layout.block_size

    def acquire(self, token_bytes: bytes, *, reuse: bool, overlap: bool, wait: bool = True) -> Sequence:
        """Return a running sequence with a pinned block for every token; see `TierCache.acquire`."""
        if not token_bytes:
            raise ConfigError("a prompt needs at least one token")
        if not self._tiers.observers.are_there:
            return self._acquire(token_bytes, reuse=reuse, overlap=overlap, wait=wait)
        with self._tiers.observers.span("acquire") as detail:
            sequence = self._acquire(token_bytes, reuse=reuse, overlap=overlap, wait=wait)
            detail["tokens"], detail["cached tokens"] = sequence.num_tokens, sequence.num_cached_tokens
        return sequence

    def _acquire(self, token_bytes: bytes, *, reuse: bool, overlap: bool, wait: bool) -> Sequence:
        num_tokens = len(token_bytes) // TOKEN_BYTES
        if self._daemon and reuse:
            self._daemon.catch_up()
        with self._tiers.changed:
            found = self._tiers.find(token_bytes, num_tokens - 1) if reuse else Lookup()
            pinned = self._loader.pin(found)
        if reuse and self._tiers.remote:
            found, pinned = self._look_remotely(found, pinned, token_bytes, overlap=overlap)
        claim: Claim | None = None
        wanted = _Wanted(found, num_tokens)
        try:
            if self._daemon and reuse:
                rest = token_bytes[:-TOKEN_BYTES]
                wanted.found, claim = self._daemon.blocks.look_further(found, rest, pinned.rest, wait=wait)
            elif self._choice and found.blocks:
                wanted.costs = self._choice.costs(found, num_tokens, overlap=overlap)
        except BaseException:  # such as an interrupt: this may wait for another process, or look at a file
            self._unpin(pinned)
            raise
        promoted = self._promote(wanted, pinned, token_bytes, claim)
        found, plan = wanted.found, wanted.plan
        later, dropped = plan.later, plan.dropped
        promoted.num_surplus += plan.num_surplus
        chain = self._chain_of(promoted, found)
        if later and later[0].parent_hash != (chain[-1] if chain else self._tiers.index.root):
            later = []  # a block before them was not loaded, so they do not continue the chain
        blocks, tokens = count_by_tier(len(promoted.hot), self._block_size, promoted.hits)
        num_cached_tokens = sum(tokens.values())
        sequence = Sequence(
            owner=self,
            token_bytes=bytearray(token_bytes),
            block_table=promoted.block_table,
            num_cached_tokens=num_cached_tokens,
            cached_tokens=tokens,
            chain=chain,
            piece_end=num_cached_tokens,
            loads=promoted.loads,
            claim=claim,
            is_cacheable=reuse,
            cold_load=None if promoted.failure or len(later) < len(plan.later) else plan.load,
        )
        try:
            if later and plan.load:
                self._start_load(sequence, later, plan.load.kind)
            with self._tiers.changed:
                self._running.add(sequence)
                misses = self._statistics.add_request(
                    sequence, found, promoted, blocks=blocks, later=later, dropped=dropped
                )
                self._touch(promoted.hot, promoted.hits)
            log_misses(sequence, misses, len(later))
            if cold := self._tiers.cold:
                used = promoted.hits[len(sequence.chain) - len(promoted.hot) :]
                cold.notes.touch([*sequence.chain, *(hit.block_hash for hit in used)])
                self._offloader.maintain_store()
            if remote := self._tiers.remote:
                remote.touch(sequence.chain)
        except BaseException:
            self._running.release(sequence)
            raise
        return sequence

    def _look_remotely(
        self, found: Lookup, pinned: Pinned, token_bytes: bytes, *, overlap: bool
    ) -> tuple[Lookup, Pinned]:
        """Ask the remote tiers for what was not found. Return what there is now, pinned."""
        max_tokens = len(token_bytes) // TOKEN_BYTES - 1
        if overlap and self._choice:
            num_blocks = max_tokens // self._block_size
            num_missing = num_blocks - len(found.hot) - len(found.blocks)
            num_rest = max_tokens + 1 - num_blocks * self._block_size
            if num_missing > 0 and not self._choice.is_worth_asking(num_missing, num_rest):
                return found, pinned
        before = pinned
        try:
            if not look_remotely(self._tiers, found, token_bytes, max_tokens):
                return found, pinned
            with self._tiers.changed:
                found = self._tiers.find(token_bytes, max_tokens)
                pinned = self._loader.pin(found)
        except BaseException:
            self._unpin(before)
            raise
        self._unpin(before)
        return found, pinned

    def _unpin(self, pinned: Pinned) -> None:
        self._tiers.unpin_all(Tier.HOT, pinned.hot)
        self._tiers.unpin(pinned.rest.values())

    def release(self, sequence: Sequence) -> None:
        """End a sequence; see `TierCache.release`. Once the cache is closed there is nothing to do."""
        with suppress(ClosedError):
            self._release(sequence)

    @while_open
    def _release(self, sequence: Sequence) -> None:
        try:
            self._running.require(sequence)
        except ConfigError:
            if getattr(sequence, "is_released", False):  # by now: another thread may have been faster
                return
            raise
        self._running.release(sequence)

    @while_open
    def next_piece(self, sequence: Sequence, *, wait: bool) -> range:
        """Return the tokens that the engine should compute next; see `Overlap.next_piece`."""
        self._running.require(sequence)
        start = sequence.piece_end
        if load := sequence.overlapped_load:
            while True:
                count, is_over = self._claim_piece(sequence, load)
                if count:
                    sequence.piece_end += count * self._block_size
                    return range(start, sequence.piece_end)
                if is_over:
                    break
                if not wait:
                    return range(start, start)
                load.wait()
            start = self._end_load(sequence, load)
        sequence.piece_end = sequence.num_tokens
        return range(start, sequence.piece_end)

    @while_open
    def record(self, sequence: Sequence, seconds: float, *, num_tokens: int | None) -> None:
        """Record what a step of a sequence took; see `Overlap.record`."""
        self._running.require(sequence)
        seconds = check_seconds("seconds", seconds)
        if num_tokens is not None:
            num_tokens = check_count("num_tokens", num_tokens)
        load = sequence.cold_load
        if num_tokens is None:
            sequence.cold_load = None
        if self._choice is None:
            return
        with self._tiers.changed:
            if num_tokens is not None:
                self._choice.pass_costs.add(num_tokens, seconds)
            elif load:
                self._choice.record_load(load, seconds)

    def _claim_piece(self, sequence: Sequence, load: OverlappedLoad) -> tuple[int, bool]:
        """Return how many blocks the engine computes next, and whether the load is over."""
        if self._consensus:
            piece = self._consensus.next_piece(load, topic=bytes(sequence.token_bytes))
            sequence.loads += piece.behind
            return piece.num_blocks, piece.is_over
        is_done = load.is_done  # read before the question: a load that is done returns no block to the engine
        return load.next_piece(), is_done

    def _start_load(self, sequence: Sequence, later: list[Hit], kind: LoadKind) -> None:
        """Begin to load cold blocks into a sequence's own while the engine computes the first of them."""
        assert self._choice
        start = len(sequence.chain)
        sequence.overlapped_load = OverlappedLoad(
            self._tiers,
            self._choice,
            later,
            sequence.block_table[start : start + len(later)],
            num_before=sequence.num_cached_tokens,
            kind=kind,
            read=self._reading.read_one,
            after=self._tiers.memory.mover.mark(),
        )

    def _end_load(self, sequence: Sequence, load: OverlappedLoad) -> int:
        """Wait for a sequence's load, and make its blocks part of the sequence. Return how many tokens have K and V.

        All blocks that the load left to the engine are computed and committed.
        """
        size, division = self._block_size, load.division
        load.wait()
        sequence.overlapped_load = None
        sequence.loads += load.copies
        if division.num_computed < division.first_loaded:  # blocks that the engine was to wait for did not come: a gap
            division.discard_loaded()
        loaded = load.hits[division.first_loaded :]
        sequence.num_cached_tokens += len(loaded) * size
        sequence.cached_tokens[Tier.COLD] += len(loaded) * size
        with self._tiers.changed:
            reasons = self._statistics.count_overlap(load)
            self._committer.register_loaded(sequence, loaded)
            self._statistics.record_overlap(load, loaded, reasons)
        log_misses(sequence, reasons, 0)
        if load.failure:
            sequence.cold_load = None  # that many blocks were not loaded
        if load.failed:
            self._reading.fail(*load.failed)
        self._loader.keep_warm(loaded)
        if self._tiers.cold:
            self._tiers.cold.notes.touch([hit.block_hash for hit in loaded])
            self._offloader.maintain_store()
        return load.num_before + (division.num_computed + len(loaded)) * size

    def _promote(self, wanted: _Wanted, pinned: Pinned, token_bytes: bytes, claim: Claim | None) -> Promoted:
        """Load what was found, cut to what all ranks have. After an error no claim is left, and nothing pinned."""
        num_blocks = -(-len(token_bytes) // (self._block_size * TOKEN_BYTES))
        looked_up, is_begun = wanted.found, False

        def load(decision: Decision | None) -> Promoted:
            nonlocal is_begun
            self._follow(decision, wanted)
            is_begun = True
            return self._loader.promote(wanted.found, pinned, num_blocks=num_blocks)

        try:
            if self._consensus is None:
                return load(self._decide([wanted.costs], True) if wanted.costs else None)
            return self._consensus.promote(load, costs=wanted.costs, decide=self._decide, topic=token_bytes)
        except BaseException:
            if not is_begun:
                self._unpin(pinned)
            self._running.end_claim(claim)
            raise
        finally:
            if self._daemon:
                self._daemon.blocks.end_lookup(looked_up)

    def _decide(self, costs: Items[ColdCosts], are_all: bool) -> Decision:
        assert self._choice
        return self._choice.decide(costs, are_all=are_all)

    def _follow(self, decision: Decision | None, wanted: _Wanted) -> None:
        """Cut what is loaded first to what the decision on its cold blocks leaves of it."""
        if wanted.costs is None:
            return
        found = wanted.found
        if decision is None:  # the ranks did not answer in time: nothing counts as cached
            wanted.found = Lookup(found.hot, miss=MissReason.OTHER_RANK)
            return
        assert self._choice
        plan = wanted.plan = self._choice.plan(found, wanted.num_tokens, wanted.costs, decision)
        if plan.num_kept is not None:
            wanted.found = replace(found, blocks=found.blocks[: plan.num_kept], partial_block=None)

    def _chain_of(self, promoted: Promoted, found: Lookup) -> list[BlockHash]:
        """Return the hashes of the whole blocks that were loaded; a block used in part is not in the chain."""
        size = self._block_size
        num_whole = sum(hit.num_tokens == size and hit is not found.partial_block for hit in promoted.hits)
        chain = [entry.block_hash for entry in promoted.hot]
        chain += (hit.block_hash for hit in promoted.hits[:num_whole])
        return chain

    def _touch(self, hot: list[Entry], hits: list[Hit]) -> None:
        """Record the use of what was hot, and of hits that were promoted. The caller holds the lock."""
        assert self._tiers.changed.is_owned()
        index = self._tiers.index
        index.touch_all(hot)  # pinned since the lookup, so still the same blocks
        if hits:
            found = (self._tiers.entry_of(hit) for hit in hits)
            index.touch_all([entry for entry in found if entry])
