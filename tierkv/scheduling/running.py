"""RunningRequests: the requests with a sequence, what each computes next, and what of it is committed."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from operator import attrgetter

from tierkv.cache import TierCache
from tierkv.requests.sequence import Sequence
from tierkv.scheduling.request import Order, Request

__all__ = ["RunningRequests", "by_urgency"]

by_urgency: Callable[[Request], Order] = attrgetter("urgency")
"""The key of a sort: the most urgent request first."""


class RunningRequests:
    """Decoding requests, a token a step, and those whose prompts are computed in pieces, by urgency.

    max_step_tokens: of one pass. decode_step_tokens: at most so many of them are of prompts while a sequence decodes.
    notify: called when a request has computed and committed more, so that requests that wait for that go on.
    """

    def __init__(self, cache: TierCache, *, max_step_tokens: int, notify: Callable[[Request], None]) -> None:
        self.max_step_tokens = max_step_tokens
        self.decode_step_tokens = max_step_tokens
        self._decoding: list[Request] = []
        self._prefilling: list[Request] = []
        self._cache = cache
        self._size = cache.config.block_size
        self._notify = notify

    def __len__(self) -> int:
        return len(self._decoding) + len(self._prefilling)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._decoding + self._prefilling)

    @property
    def is_decoding(self) -> bool:
        """Whether a request decodes."""
        return bool(self._decoding)

    def fills_a_pass(self) -> bool:
        """Return whether the prompts that are computed fill the next pass beside the decoding requests."""
        room = self.decode_step_tokens
        for request in self._prefilling:
            room -= len(request.token_ids) - request.num_computed
            if room <= 0:
                return True
        return False

    def add(self, request: Request, sequence: Sequence) -> None:
        """Add a request that has just got its sequence."""
        request.sequence = sequence
        request.num_computed = request.num_verified = request.claimed_end = sequence.num_cached_tokens
        request.capacity = len(sequence.block_table) * self._size
        if request.cached_tokens is None:
            request.cached_tokens = dict(sequence.cached_tokens)
        request.is_prefilling = True
        insort(self._prefilling, request, key=by_urgency)
        request.check_at = self._next_check(request)

    def remove(self, request: Request) -> None:
        """Remove a request; its sequence is the caller's to release."""
        (self._prefilling if request.is_prefilling else self._decoding).remove(request)

    def note_decoding(self, request: Request) -> None:
        """Note that a request's prompt is computed: from now on it computes a token a step."""
        self._prefilling.remove(request)
        request.is_prefilling = False
        self._decoding.append(request)

    def sort(self) -> None:
        """Put the requests whose prompts are computed in order again, after an urgency has changed."""
        self._prefilling.sort(key=by_urgency)

    def the_only(self) -> Request | None:
        """Return the request that runs alone; None if there are several or none."""
        return next(iter(self)) if len(self) == 1 else None

    def plan(self) -> list[tuple[Request, int]]:
        """Return how many tokens each request computes next, decoding ones first. Waits while all of them load."""
        room, decoding = self.max_step_tokens, self._decoding
        if len(decoding) > room:  # in turn
            self._decoding = decoding[room:] + decoding[:room]
            decoding = decoding[:room]
        steps = [(request, 1) for request in decoding]
        if steps and self._prefilling:
            room = min(room - len(steps), self.decode_step_tokens)
        for request in self._prefilling:
            if not room:
                break
            if count := min(room, self._num_computable(request)):
                steps.append((request, count))
                room -= count
        while not steps and self._prefilling:
            request = next(each for each in self._prefilling if each.sequence and each.sequence.overlapped_load)
            self._claim_piece(request, wait=True)
            if count := min(room, self._num_computable(request)):
                steps.append((request, count))
        return steps

    def record_verified(self, request: Request, num_tokens: int) -> None:
        """Commit the whole blocks of a request's first `num_tokens` tokens, which are computed."""
        sequence = request.sequence
        if sequence is None or num_tokens <= request.num_verified:
            return
        request.num_verified = num_tokens
        if num_tokens // self._size > len(sequence.chain):
            self._add_tokens(request, sequence)
            self._cache.commit(sequence, num_tokens)
        if request.head is not None or request.followers:
            self._notify(request)
        request.check_at = self._next_check(request)

    def take_room(self, request: Request) -> None:
        """Take blocks for all tokens of a request. Raises CapacityError, nothing taken."""
        assert request.sequence is not None
        self._cache.append(request.sequence, request.token_ids[request.sequence.num_tokens :])
        request.capacity = len(request.sequence.block_table) * self._size

    def commit_partial(self, request: Request) -> None:
        """Commit everything that a request has computed and that is verified, its partly filled block too."""
        if request.sequence is not None and request.use_cache:
            self._add_tokens(request, request.sequence)
            self._cache.commit(request.sequence, request.num_verified, partial_block=True)

    def check(self) -> None:
        """Raise AssertionError unless every request is in one list, in order, and has blocks for its tokens."""
        assert len(set(self)) == len(self)
        assert self._prefilling == sorted(self._prefilling, key=by_urgency)
        for request in self:
            assert request.sequence is not None
            assert request.num_verified <= request.num_computed <= len(request.token_ids) <= request.capacity
            assert request.sequence.num_tokens <= len(request.token_ids)

    def _num_computable(self, request: Request) -> int:
        """Return how many tokens of a request may be computed now; while its cold blocks load, those of its claim."""
        assert request.sequence is not None
        if request.sequence.overlapped_load is None:
            return len(request.token_ids) - request.num_computed
        if request.claimed_end == request.num_computed:
            self._claim_piece(request, wait=False)
        is_loading = request.sequence.overlapped_load is not None
        end = request.claimed_end if is_loading else len(request.token_ids)
        return end - request.num_computed

    def _claim_piece(self, request: Request, *, wait: bool) -> None:
        """Take the next piece of a request whose cold blocks load; all that it has claimed is computed."""
        assert request.sequence is not None
        piece = request.sequence.overlap.next_piece(wait=wait)
        if piece.start != request.num_computed:  # loaded blocks lie between
            request.num_computed = request.num_verified = piece.start
            self._notify(request)
            request.check_at = self._next_check(request)
        request.claimed_end = piece.stop

    def _next_check(self, request: Request) -> int:
        """Return the number of computed tokens at which the model must be looked at again."""
        done = request.num_verified
        awaited = min((each for each in request.followers if each > done), default=request.end_tokens)
        return min((done // self._size + 1) * self._size, request.end_tokens, awaited)

    def _add_tokens(self, request: Request, sequence: Sequence) -> None:
        """Add new tokens to a sequence that has blocks for them: the cache gets them a block at a time."""
        if (first := sequence.num_tokens) < (last := min(len(request.token_ids), request.capacity)):
            self._cache.append(sequence, request.token_ids[first:last])
