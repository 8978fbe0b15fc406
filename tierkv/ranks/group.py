"""The ranks of a model that is split over several devices, as a cache sees them.

Each rank has a cache for its slice of the heads. A cached token is useful only if every rank has it, so the ranks first
agree on the smallest number of tokens found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["UNABLE", "Agreement", "OneRank", "RankGroup", "Vote", "agree_min"]

Vote = tuple[int, ...]
"""What one rank says in a round: whole numbers, equally many on every rank."""

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

    def agree(self, vote: Sequence[int], *, topic: bytes) -> list[Vote] | None:
        """Return the votes of all ranks, in the order of ranks; None if a rank did not vote in time.

        The answer is the same on every rank, also on a rank that votes too late. Bounded in time.
        topic: the subject of the vote, such as the prompt. Raises RankError if the ranks vote on different topics, and
        if the decision cannot be read.
        """

    def gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload, in the order of ranks. Raises RankError if a payload is missing."""

    def send(self, message: bytes) -> None:
        """Send a message from the first rank to all others. Raises RankError if one of them has read none for long."""

    def receive(self, *, timeout_s: float) -> bytes | None:
        """Return the next message of the first rank; None if none comes in time. Raises RankError if it has gone."""


class OneRank:
    """The only rank of a model on one device."""

    rank = 0
    size = 1

    def agree(self, vote: Sequence[int], *, topic: bytes) -> list[Vote] | None:
        """Return the vote."""
        return [tuple(vote)]

    def gather(self, payload: bytes) -> list[bytes]:
        """Return the payload."""
        return [payload]

    def send(self, message: bytes) -> None:
        """Do nothing: there is no other rank."""

    def receive(self, *, timeout_s: float) -> bytes | None:
        """Return None: there is no other rank."""
        return None


def agree_min(ranks: RankGroup, vote: int, *, topic: bytes) -> Agreement:
    """Return the smallest vote of all ranks, the same on every rank. Raises as `RankGroup.agree` does.

    Of a rank that votes with several numbers the first one counts.
    """
    votes = ranks.agree((vote,), topic=topic)
    if votes is None:
        return Agreement(0, False)
    numbers = [each[0] for each in votes]
    return Agreement(min(numbers), len(set(numbers)) == 1)
