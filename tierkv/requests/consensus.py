"""All or none: what one rank found of a prompt is cut to what every rank found, before anyone uses it.

A block that one rank lacks (evicted, damaged, no room) is useless on the others. They drop it from the sequence,
not from their tiers: every rank computes it anew, and the rank that lacked it stores it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tierkv.errors import CapacityError, RankError, StoreError
from tierkv.index.index import Entry
from tierkv.movers.mover import Move
from tierkv.ranks.group import UNABLE, RankGroup
from tierkv.transfer.load import Promoted
from tierkv.transfer.lookup import Hit
from tierkv.transfer.offload import Offloader
from tierkv.transfer.tiers import Tiers
from tierkv.values.block import Tier

__all__ = ["Consensus"]

_HAS_ROOM = 1
_MAX_ROUNDS = 4  # differ, a copy failed, a time-out, unanimous


class Consensus:
    """Makes one rank's hits, and its lack of room, those of all ranks."""

    def __init__(self, ranks: RankGroup, tiers: Tiers, offloader: Offloader) -> None:
        self._ranks = ranks
        self._tiers = tiers
        self._offloader = offloader

    def promote(self, promote: Callable[[], Promoted], *, topic: bytes) -> Promoted:
        """Return what `promote` brought up, cut to the tokens that every rank brought up.

        Raises CapacityError on every rank if one has no room, RankError if no agreement is reached; nothing is
        kept then.
        """
        try:
            promoted = promote()
        except BaseException:  # whatever it is, the others must not go on without this rank
            self._vote(UNABLE, topic)
            raise
        try:
            self._cut_to_agreed(promoted, topic)
        except BaseException:
            self._unpin(promoted.block_table)
            raise
        return promoted

    def take_hot(self, count: int, *, topic: bytes) -> list[int]:
        """Return `count` block ids, each pinned once. Raises CapacityError on every rank if one has no room."""
        try:
            block_ids = self._offloader.take_hot(count)
        except BaseException:
            self._vote(UNABLE, topic)
            raise
        try:
            if self._vote(_HAS_ROOM, topic) == UNABLE:
                raise _no_room()
        except BaseException:
            self._unpin(block_ids)
            raise
        return block_ids

    def _vote(self, vote: int, topic: bytes) -> int:
        """Return the lowest of votes that are not 0; then 0 is a time-out, after which all vote again."""
        for _ in range(_MAX_ROUNDS):
            if lowest := self._ranks.agree_min(vote, topic=topic).lowest:
                return lowest
        raise RankError("a rank did not say in time whether it can go on")

    def _cut_to_agreed(self, promoted: Promoted, topic: bytes) -> None:
        """Vote and cut until all ranks have the same. After a cut each votes again, since a cut may fail."""
        vote = promoted.num_tokens
        failure: CapacityError | None = None
        for _ in range(_MAX_ROUNDS):
            agreed = self._ranks.agree_min(vote, topic=topic)
            if agreed.lowest == UNABLE:
                raise failure or _no_room()
            if agreed.is_unanimous:
                return
            if failure:  # a time-out: the others have to hear of it again
                continue
            try:
                self._cut(promoted, agreed.lowest)
                vote = promoted.num_tokens
            except CapacityError as exc:
                failure, vote = exc, UNABLE
        raise RankError("the ranks found no agreement on how many tokens are cached")

    def _cut(self, promoted: Promoted, num_tokens: int) -> None:
        """Shorten the hits to `num_tokens` tokens, or to the whole blocks of them if a copy fails.

        Registered blocks behind the cut belong to everyone and will not be written by this sequence: fresh ones take
        their places. Raises CapacityError where there are none; the block table then lacks the blocks given up.
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
