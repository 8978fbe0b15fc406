"""The ranks of a model that is split over several devices, as far as a cache needs to know them.

Each rank has a cache of its own, for its slice of the heads. A cached token is of use only if every rank has
it, so before anyone uses what it found the ranks agree on the smallest number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["UNABLE", "Agreement", "OneRank", "RankGroup"]

UNABLE = -1
"""The vote of a rank that cannot go on: what is asked then happens on no rank."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """What all ranks decided. lowest: the smallest vote, 0 if some rank did not vote in time.

    is_unanimous: every rank voted the same.
    """

    lowest: int
    is_unanimous: bool


class RankGroup(Protocol):
    """The ranks of one model. Every rank makes the same calls in the same order."""

    @property
    def rank(self) -> int:
        """Return this rank's number, from 0."""

    @property
    def size(self) -> int:
        """Return how many ranks there are."""

    def agree_min(self, vote: int, *, topic: bytes) -> Agreement:
        """Return the decision that every rank gets, also one that comes too late to vote. Bounded in time.

        topic: what is voted on, such as the prompt. Raises RankError if the ranks vote on different things, and
        where the decision cannot be known.
        """

    def gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload, in the order of ranks. Raises RankError if one is missing."""


class OneRank:
    """A model on one device: it always agrees with itself."""

    rank = 0
    size = 1

    def agree_min(self, vote: int, *, topic: bytes) -> Agreement:
        """Return the vote."""
        return Agreement(vote, True)

    def gather(self, payload: bytes) -> list[bytes]:
        """Return the payload."""
        return [payload]
