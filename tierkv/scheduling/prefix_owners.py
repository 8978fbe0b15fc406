"""PrefixOwners: which running request computes which blocks, and which requests wait for them.

Two prompts share a block if their chained hashes of it are equal; then all blocks before it are equal too. So an owner
is known by one hash, that of the next block which it computes (its head): a request that has this hash in its chain
needs that block and perhaps some after it. The comparison of a request with all owners is one intersection of sets, and
how far both have a prefix in common is a binary search.
"""

from __future__ import annotations

from array import array
from bisect import insort
from operator import attrgetter

from tierkv.scheduling.request import Request
from tierkv.values.block import BlockHash, common_run

__all__ = ["PrefixOwners"]

_by_order = attrgetter("order")


class PrefixOwners:
    """The owners and their followers. A hash only decides how long a request waits, never what it finds.

    Request.head: the hash under which it is known here; None if it computes no whole block of its prompt.
    Request.followers: for a number of tokens, the requests that wait until the owner has computed so many, in order.
    num_followers: requests that wait for an owner; some may have ended.
    """

    def __init__(self, block_size: int) -> None:
        self.num_followers: int = 0
        self._size = block_size
        self._heads: dict[BlockHash, Request] = {}

    def add(self, request: Request) -> None:
        """Make a request the owner of its blocks after its first `num_verified` tokens."""
        self._move_head(request)

    def find(self, request: Request) -> tuple[Request, int] | None:
        """Return the owner that computes a block which this request lacks, and how many tokens they have in common.

        The last token of a prompt is never among them: a request computes at least that one.
        """
        if not self._heads:
            return None
        owners = [self._heads[head] for head in request.hash_set.intersection(self._heads)]
        if len(owners) > 1:
            owners.sort(key=_by_order)  # a set's order differs between processes, and so between ranks
        for owner in owners:
            common = self._common_tokens(request, owner)
            if common > owner.num_verified and owner is not request:
                return owner, common
        return None

    def follow(self, request: Request, owner: Request, num_tokens: int) -> None:
        """Let a request wait until its owner has computed `num_tokens` tokens, or leaves."""
        insort(owner.followers.setdefault(num_tokens, []), request, key=_by_order)
        self.num_followers += 1
        request.source, request.source_tokens = owner, num_tokens
        owner.num_sharing += 1

    def advance(self, owner: Request) -> list[list[Request]]:
        """Note that an owner has computed and committed up to `num_verified`. Return the requests that may go on.

        Each list is in order.
        """
        self._move_head(owner)
        return self._take(owner, [each for each in owner.followers if each <= owner.num_verified])

    def leave(self, owner: Request) -> list[list[Request]]:
        """Note that a request computes nothing more. Return the requests that waited for it."""
        self._drop_head(owner)
        return self._take(owner, list(owner.followers))

    def _take(self, owner: Request, thresholds: list[int]) -> list[list[Request]]:
        woken = [owner.followers.pop(each) for each in thresholds]
        self.num_followers -= sum(map(len, woken))
        return woken

    def check(self) -> None:
        """Raise AssertionError unless each owner is known by the next block that it computes."""
        for head, owner in self._heads.items():
            assert owner.head == head == owner.hashes[owner.num_verified // self._size]

    def _move_head(self, owner: Request) -> None:
        at = owner.num_verified // self._size
        head = owner.hashes[at] if at < len(owner.hashes) else None
        if head == owner.head:
            return
        self._drop_head(owner)
        if head is not None and head not in self._heads:  # else the other owner is as good
            self._heads[head] = owner
            owner.head = head

    def _drop_head(self, owner: Request) -> None:
        if owner.head is not None:
            del self._heads[owner.head]
            owner.head = None

    def _common_tokens(self, request: Request, owner: Request) -> int:
        """Return how many leading tokens two prompts have in common, without the last token of the request's."""
        low, high = 0, min(len(request.hashes), len(owner.hashes))
        while low < high:  # chained hashes are equal up to some block, and differ from there on
            middle = (low + high) // 2
            if request.hashes[middle] == owner.hashes[middle]:
                low = middle + 1
            else:
                high = middle
        start = low * self._size
        stop = min(start + self._size, owner.prompt_tokens)
        parts = (array("I", each.token_ids[start:stop]).tobytes() for each in (request, owner))
        return min(start + common_run(*parts), len(request.token_ids) - 1)
