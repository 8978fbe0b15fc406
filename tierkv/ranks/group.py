"""The ranks of a model that is split over several devices, as a cache sees them.

Each rank has a cache for its slice of the heads. A cached token is useful only if every rank has it, so the ranks first
agree on the smallest number of tokens found.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["UNABLE", "Agreement", "OneRank", "RankGroup"]

UNABLE = -1
"""The vote of a rank that cannot continue: the operation then happens on no rank."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """The decision of all ranks. lowest: the smallest vote, 0 if some rank did not vote in time.

    is_unanimous: all ranks cast the same vote.
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
        """Return the decision, the same on every rank, also on a rank that votes too late. Bounded in time.

        topic: the subject of the vote, such as the prompt. Raises RankError if the ranks vote on different topics, and
        if the decision cannot be read.
        """

    def gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload, in the order of ranks. Raises RankError if a payload is missing."""


class OneRank:
    """The only rank of a model on one device."""

    rank = 0
    size = 1

    def agree_min(self, vote: int, *, topic: bytes) -> Agreement:
        """Return the vote."""
        return Agreement(vote, True)

    def gather(self, payload: bytes) -> list[bytes]:
        """Return the payload."""
        return [payload]
