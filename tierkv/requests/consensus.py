"""Consensus of ranks: what one rank found of a prompt is cut to the minimum over all ranks before it is used.

A block that one rank lacks (evicted, damaged, no room) is useless on the others. They drop it from the sequence,
not from their tiers: every rank computes it anew, and the rank that lacked it stores it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from tierkv.errors import CapacityError, RankError, StoreError
from tierkv.index.index import Entry
from tierkv.movers.mover import Move, Ready
from tierkv.ranks.group import UNABLE, Agreement, RankGroup, agree_min
from tierkv.transfer.load import Promoted
from tierkv.transfer.lookup import Hit
from tierkv.transfer.offload import Offloader
from tierkv.transfer.overlapped_load import OverlappedLoad
from tierkv.transfer.recompute_or_load import ColdCosts, Decision
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import Tier

__all__ = ["AgreedPiece", "Consensus"]

_MAX_ROUNDS = 4  # differ, a copy failed, a time-out, unanimous
_HAS_COLD = -2  # in the place of a number of tokens: the rank has cold blocks, and waits for the decision on them
_NO_COSTS = (0,) * len(ColdCosts._fields)

Decide: TypeAlias = Callable[[Sequence[ColdCosts], bool], Decision]
"""Makes the decision for the costs of the ranks that have cold blocks; the second argument: whether all ranks have."""


class AgreedPiece(NamedTuple):
    """num_blocks: leading blocks that every rank computes next. behind: copies for which its pass waits.

    is_over: no rank loads any more, and nothing is left to compute.
    """

    num_blocks: int
    behind: list[Ready]
    is_over: bool


class Consensus:
    """Makes one rank's hits, and its lack of room, those of all ranks.

    A request costs one agreement, or two if a rank has cold blocks. A sequence that grows costs none as long as the
    last agreement on room said that every rank can take as many blocks.
    """

    def __init__(self, ranks: RankGroup, tiers: Tiers, offloader: Offloader) -> None:
        self._ranks = ranks
        self._tiers = tiers
        self._offloader = offloader
        self._num_granted = 0  # blocks that every rank can take; the same number on every rank

    def promote(
        self,
        load: Callable[[Decision | None], Promoted],
        *,
        costs: ColdCosts | None,
        decide: Decide,
        topic: bytes,
    ) -> Promoted:
        """Return what `load` loaded, cut to the tokens that every rank loaded.

        costs: of the cold blocks that this rank has found, if there are any. load: called with the decision on them;
        with None if there are none, and if a rank did not say its costs in time.
        Raises CapacityError on every rank if one has no room, RankError if no agreement is reached; nothing is
        kept then, but `load` may not have been called.
        """
        decision = self._agree_on_cold(costs, decide, topic) if costs else None
        try:
            promoted = load(decision)
        except BaseException:  # the other ranks must not go on without this one
            self._vote(UNABLE, topic)
            raise
        try:
            self._cut_to_agreed(promoted, topic, None if costs else self._agree_on_found(promoted.num_tokens, topic))
        except BaseException:
            self._unpin(promoted.block_table)
            raise
        self._num_granted = max(0, self._num_granted - len(promoted.block_table))
        return promoted

    def take_hot(self, count: int, *, topic: bytes) -> list[int]:
        """Return `count` block ids, each pinned once. Raises CapacityError on every rank if one has no room.

        Raises RankError if this rank has no room although the ranks know that it had: they go on without it.
        """
        if count <= self._num_granted:
            self._num_granted -= count
            try:
                return self._offloader.take_hot(count)
            except CapacityError as exc:
                raise RankError(f"this rank cannot take the blocks that it promised: {exc}") from exc
        self._num_granted = 0
        try:
            block_ids = self._offloader.take_hot(count)
        except BaseException:
            self._vote(UNABLE, topic)
            raise
        try:
            lowest = self._vote(1 + self._num_obtainable(), topic)
            if lowest == UNABLE:
                raise _no_room()
        except BaseException:
            self._unpin(block_ids)
            raise
        self._num_granted = lowest - 1
        return block_ids

    def next_piece(self, load: OverlappedLoad, *, topic: bytes) -> AgreedPiece:
        """Claim what every rank computes next of the blocks that load: what the slowest loader leaves to the engine.

        Raises RankError if a rank cannot go on, or does not say so in time.
        """
        division = load.division
        for _ in range(_MAX_ROUNDS):
            is_done = load.is_done  # read before the question: a load that is done returns no block to the engine
            wanted = UNABLE if load.has_failed else load.wanted_piece()
            votes = self._ranks.agree((wanted, division.first_loaded, int(is_done)), topic=topic)
            if votes is None:
                continue
            if any(vote[0] == UNABLE for vote in votes):
                load.wait()  # raises this rank's own error
                raise RankError("another rank cannot go on loading a prompt")
            left = max(vote[1] for vote in votes) - division.num_computed
            count = min(max(vote[0] for vote in votes), left)
            is_over = not count and all(vote[2] for vote in votes)
            return AgreedPiece(count, load.claim_agreed(count) if count else [], is_over)
        raise RankError("a rank did not say in time how much of a prompt it has loaded")

    def can_all(self, can: bool, *, topic: bytes) -> bool:
        """Return whether all ranks can, the same on every rank; False if one does not say so in time."""
        return agree_min(self._ranks, 1 if can else UNABLE, topic=topic).lowest == 1

    def _agree_on_cold(self, costs: ColdCosts, decide: Decide, topic: bytes) -> Decision | None:
        """Return what becomes of cold blocks, the same on every rank; None if a rank did not vote in time."""
        votes = self._ranks.agree((_HAS_COLD, *costs), topic=topic)
        if votes is None:
            return None
        if any(vote[0] == UNABLE for vote in votes):
            raise _no_room()
        known = [ColdCosts(*vote[1:]) for vote in votes if vote[0] == _HAS_COLD]
        return decide(known, len(known) == len(votes))

    def _agree_on_found(self, num_tokens: int, topic: bytes) -> Agreement | None:
        """Return the agreement on the tokens of ranks without cold blocks; None if others must load theirs first."""
        votes = self._ranks.agree((num_tokens, *_NO_COSTS), topic=topic)
        if votes is None:
            return Agreement(0, False)
        tokens = [vote[0] for vote in votes]
        if UNABLE in tokens:
            return Agreement(UNABLE, False)
        return None if _HAS_COLD in tokens else Agreement(min(tokens), len(set(tokens)) == 1)

    def _num_obtainable(self) -> int:
        """Return how many more blocks sequences can take: what they do not use can be evicted."""
        pool = self._tiers.index.hot
        with self._tiers.changed:
            return max(0, pool.limit - pool.referenced_count)

    def _vote(self, vote: int, topic: bytes) -> int:
        """Return the lowest of votes that are not 0; then 0 is a time-out, after which all vote again."""
        for _ in range(_MAX_ROUNDS):
            if lowest := agree_min(self._ranks, vote, topic=topic).lowest:
                return lowest
        raise RankError("a rank did not say in time whether it can go on")

    def _cut_to_agreed(self, promoted: Promoted, topic: bytes, first: Agreement | None) -> None:
        """Vote and cut until all ranks have the same. After a cut each votes again, since a cut may fail.

        first: what the ranks agreed on in a first round.
        """
        vote = promoted.num_tokens
        failure: CapacityError | None = None
        for _ in range(_MAX_ROUNDS):
            agreed, first = first or agree_min(self._ranks, vote, topic=topic), None
            if agreed.lowest == UNABLE:
                raise failure or _no_room()
            if agreed.is_unanimous:
                return
            if failure:  # a time-out: vote again, so that the other ranks see it
                continue
            try:
                self._cut(promoted, agreed.lowest)
                vote = promoted.num_tokens
            except CapacityError as exc:
                failure, vote = exc, UNABLE
        raise RankError("the ranks found no agreement on how many tokens are cached")

    def _cut(self, promoted: Promoted, num_tokens: int) -> None:
        """Shorten the hits to `num_tokens` tokens, or to the whole blocks of them if a copy fails.

        Registered blocks after the cut are shared, and this sequence must not write them: fresh blocks replace them.
        Raises CapacityError where there are none; the block table then lacks the dropped blocks.
        """
        size = self._tiers.layout.block_size
        num_whole, num_rest = divmod(num_tokens, size)
        hot, hits, table = promoted.hot, promoted.hits, promoted.block_table
        num_found = len(hot) + len(hits)
        num_shared = len(hot) + sum(hit.num_tokens == size for hit in hits)
        surplus = table[num_whole:num_shared]
        rest = _part(hot, hits, num_whole, num_rest) if num_rest else None
        promoted.hot = hot[:num_whole]
        del table[num_whole:num_shared], hits[max(0, num_whole - len(hot)) :]
        source = surplus[:1] if rest else []  # stays pinned until it is copied
        self._unpin(surplus[len(source) :])
        try:
            fresh = self._offloader.take_hot(len(surplus))
            table[num_whole:num_whole] = fresh
            if rest and (not source or self._copy(source[0], fresh[0], promoted)):
                hits.append(rest)
            promoted.num_surplus += num_found - len(promoted.hot) - len(hits)
        finally:
            self._unpin(source)

    def _copy(self, source: int, target: int, promoted: Promoted) -> bool:
        """Copy a registered block, of which a part is of use, into the sequence's own. False if that fails."""
        tiers = self._tiers
        if arriving := tiers.copies.arriving.get(source):
            arriving.wait()
        try:
            promoted.loads.append(tiers.memory.mover.copy([Move(source, target)]))
        except StoreError:
            return False
        return True

    def _unpin(self, block_ids: list[int]) -> None:
        self._tiers.copies.leave(block_ids)  # a copy of this thread's may still read or write them
        self._tiers.unpin_all(Tier.HOT, block_ids)


def _part(hot: Sequence[Entry], hits: Sequence[Hit], at: int, num_tokens: int) -> Hit:
    """Return the first tokens of the block `at` as a hit of its own."""
    if at >= len(hot):
        return hits[at - len(hot)]._replace(num_tokens=num_tokens)
    entry = hot[at]
    return Hit(entry.block_hash, entry.parent_hash, entry.token_bytes, num_tokens, Tier.HOT, entry, None)


def _no_room() -> CapacityError:
    return CapacityError("another rank has no room in its hot pool", hint="raise hot_bytes, or run fewer sequences")
