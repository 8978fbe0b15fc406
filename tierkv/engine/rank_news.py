"""What the first rank of a split model decides before a step, and sends the others in one message.

Requests come, are cancelled and expire on the first rank alone. Every rank then takes the same news into the same
queue, so all of them admit, preempt and compute the same requests in the same passes.
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from typing import Any, NamedTuple, Protocol

import numpy as np

from tierkv.engine.generation import ModelRequest
from tierkv.engine.request_builder import RequestBuilder
from tierkv.engine.sampling import Sampler, SamplingOptions
from tierkv.errors import RankError
from tierkv.ranks.group import RankGroup

__all__ = ["FollowedNews", "LeadingNews", "LocalNews", "News", "NewsSource"]

_END = b"end"


class News(NamedTuple):
    """New requests in order, and requests that end, each with the reason."""

    arrivals: list[ModelRequest]
    ends: list[tuple[ModelRequest, str]]


class NewsSource(Protocol):
    """Where a step's news comes from."""

    def exchange(self, arrivals: list[ModelRequest], ends: list[tuple[ModelRequest, str]]) -> News:
        """Return the news that every rank takes now. The arguments: what has come on this rank."""


class LocalNews:
    """The news of the only rank, or of ranks whose callers all make the same calls."""

    def exchange(self, arrivals: list[ModelRequest], ends: list[tuple[ModelRequest, str]]) -> News:
        """Return what has come on this rank."""
        return News(arrivals, ends)


class LeadingNews:
    """The first rank's side: sends what has come, once a step."""

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._numbers: dict[ModelRequest, int] = {}
        self._num_sent = 0

    def exchange(self, arrivals: list[ModelRequest], ends: list[tuple[ModelRequest, str]]) -> News:
        """Send what has come, and return it. Raises RankError if the others do not read."""
        known = self._numbers
        if arrivals:
            known = {request: number for request, number in known.items() if request.finish_reason is None}
            known |= {request: number for number, request in enumerate(arrivals, self._num_sent)}
            self._numbers = known
            self._num_sent += len(arrivals)
        sent_ends = [(known[request], reason) for request, reason in ends if request in known]
        self._ranks.send(json.dumps([[_fields_of(each, known[each]) for each in arrivals], sent_ends]).encode())
        return News(arrivals, ends)

    def send_end(self) -> None:
        """Let the other ranks know that no more steps follow."""
        self._ranks.send(_END)


class FollowedNews:
    """Another rank's side: takes what the first one sent."""

    def __init__(self, ranks: RankGroup, builder: RequestBuilder) -> None:
        self._ranks = ranks
        self._builder = builder
        self._requests: dict[int, ModelRequest] = {}
        self._message: bytes | None = None
        self.is_over: bool = False

    def wait(self, timeout_s: float) -> bool:
        """Return whether there is news for a step, after so many seconds at most. Raises RankError."""
        if self._message is None and not self.is_over:
            self._message = self._ranks.receive(timeout_s=timeout_s)
            if self._message == _END:
                self._message, self.is_over = None, True
        return self._message is not None

    def exchange(self, arrivals: list[ModelRequest], ends: list[tuple[ModelRequest, str]]) -> News:
        """Return what the first rank sent. Raises RankError if requests have come on this rank."""
        if arrivals:  # requests that end here never came here
            raise RankError("requests come to the first rank only")
        assert self._message is not None, "a step follows a message"
        message, self._message = self._message, None
        sent, sent_ends = json.loads(message)
        new = {fields["id"]: _request_of(fields, self._builder) for fields in sent}
        if new:
            self._requests = {n: each for n, each in self._requests.items() if each.finish_reason is None} | new
        return News(list(new.values()), [(self._requests[n], reason) for n, reason in sent_ends if n in self._requests])


def _fields_of(request: ModelRequest, number: int) -> dict[str, Any]:
    """Return what another rank needs to compute a request that has not started."""
    return {
        "id": number,
        "token_ids": base64.b64encode(np.array(request.token_ids, dtype="<u4").tobytes()).decode(),
        "max_new_tokens": request.max_new_tokens,
        "use_cache": request.use_cache,
        "keeps_partial": request.keeps_partial,
        "overlap": request.overlap,
        "priority": request.priority,
        "stop_ids": sorted(request.stop_ids),
        "sampling": asdict(request.sampler.options),
        "state": request.sampler.state,
    }


def _request_of(fields: dict[str, Any], builder: RequestBuilder) -> ModelRequest:
    """Return the request of another rank. Its caller and its deadline are there; no caller reads its tokens here."""
    sampler = Sampler(SamplingOptions(**fields["sampling"]), state=fields["state"])
    request = builder.build_received(
        np.frombuffer(base64.b64decode(fields["token_ids"]), dtype="<u4"),
        sampler,
        max_new_tokens=fields["max_new_tokens"],
        stop_ids=frozenset(fields["stop_ids"]),
        use_cache=fields["use_cache"],
        keeps_partial=fields["keeps_partial"],
    )
    request.overlap, request.priority = fields["overlap"], fields["priority"]
    return request
