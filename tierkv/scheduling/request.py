"""Request: the state of one prompt, from its arrival to its last token."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from tierkv.requests.sequence import Sequence
from tierkv.values.block import BlockHash, Tier

__all__ = ["Order", "Request", "RequestState"]

Order: TypeAlias = "tuple[int, int]"
"""The place of a request in the queue: smaller is earlier. The second number is unique."""


class RequestState(Enum):
    """NEW: not yet in a scheduler. WAITING: holds nothing. RUNNING: holds a sequence. ENDED: never runs again."""

    NEW = "new"
    WAITING = "waiting"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(slots=True, eq=False)
class Request:
    """One prompt in a scheduler. It has a sequence while it runs, and until the requests that copy from it have begun.

    token_ids: of the prompt, then the new ones. max_new_tokens: 0 computes the prompt only.
    hashes, hash_set: of the prompt's whole blocks; empty if the request shares none. overlap: let cold blocks load
    while the first of them are computed. keeps_partial: commit the partly filled last block at the end.
    deadline: when the request ends at the latest, on the scheduler's clock.

    num_computed: leading tokens with K and V. num_verified: those of them after whose pass the model was seen
    unchanged. check_at: so many computed tokens call for a check of the model, because a block is complete, the request
    ends, or others wait for them. claimed_end: while cold blocks load, the tokens before it are computed.
    is_prefilling: no new token was chosen since it started to run.
    capacity: tokens for which the sequence has blocks. had_company: other requests were computed beside it.
    order: place in the queue. urgency: the same, or that of an earlier request that waits for this one's blocks.
    head, followers: see `PrefixOwners`. source, source_tokens: the running request whose block holds the last, partly
    filled part of the prefix that both have in common. num_sharing: requests that still want to copy from this one.
    elsewhere_since: when another process was first found computing the next block.
    """

    token_ids: list[int]
    prompt_tokens: int
    max_new_tokens: int
    hashes: tuple[BlockHash, ...] = ()
    priority: int = 0
    deadline: float | None = None
    use_cache: bool = True
    keeps_partial: bool = False
    overlap: bool = False
    state: RequestState = RequestState.NEW
    sequence: Sequence | None = None
    num_computed: int = 0
    num_verified: int = 0
    check_at: int = 0
    claimed_end: int = 0
    capacity: int = 0
    num_new: int = 0
    is_prefilling: bool = True
    cached_tokens: dict[Tier, int] | None = None
    num_preemptions: int = 0
    admitted_at: float = 0.0
    had_company: bool = False
    order: Order = (0, 0)
    urgency: Order = (0, 0)
    head: BlockHash | None = None
    followers: dict[int, list[Request]] = field(default_factory=dict)
    source: Request | None = None
    source_tokens: int = 0
    num_sharing: int = 0
    elsewhere_since: float | None = None
    hash_set: set[BlockHash] = field(init=False)

    def __post_init__(self) -> None:
        self.hash_set = set(self.hashes)

    @property
    def end_tokens(self) -> int:
        """Tokens that are computed at the end, if no stop token comes first: the last new token is not computed."""
        return self.prompt_tokens + max(0, self.max_new_tokens - 1)

    @property
    def new_ids(self) -> list[int]:
        """The tokens generated so far."""
        return self.token_ids[self.prompt_tokens :]
