"""Scheduler: decides which requests run, and which one makes room for another."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack

from tierkv.cache import TierCache
from tierkv.errors import CapacityError, ClosedError, RankError
from tierkv.requests.sequence import Sequence
from tierkv.scheduling.other_processes import OtherProcesses
from tierkv.scheduling.prefix_owners import PrefixOwners
from tierkv.scheduling.request import Request, RequestState
from tierkv.scheduling.running import RunningRequests, by_urgency
from tierkv.scheduling.waiting_queue import WaitingQueue

__all__ = ["AGING", "Scheduler"]

AGING = 256
"""A level of priority is worth so many places in the queue: at most so many later requests of the next more urgent
level are started first. So the order of two requests never changes, and every request has its turn."""

_MOST_LOOKS = 32  # beside decoding sequences: waiting requests that one step lets follow another one,
_MOST_STARTS = 16  # and that it starts; more would delay the next tokens
_RETRY_STEPS = 8  # a request without room is tried again after so many steps, or when blocks were released


class Scheduler:
    """Requests over one cache. Not thread-safe. It computes nothing: `running.plan` returns what to compute next.

    A request waits for room, for its turn, or for a block that a running request or another process is computing (see
    `PrefixOwners`). It never waits for a request that itself waits, except for one that waits for another process, and
    that is bounded by `compute_wait_s`. Where blocks are short, the least urgent running request returns to the queue,
    at its old place: its whole blocks stay cached, and its partial block is stored.

    max_running: None for no bound. num_waiting, num_preempted: how many wait, and how often one has been preempted.
    verify: called before requests are preempted, so that all that they have computed may be committed.
    failed: requests that cannot run, with the reason; the caller empties it and ends them.
    """

    def __init__(
        self,
        cache: TierCache,
        *,
        max_step_tokens: int,
        verify: Callable[[Iterable[Request]], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.running: RunningRequests = RunningRequests(cache, max_step_tokens=max_step_tokens, notify=self._advance)
        self.max_running: int | None = None
        self.num_waiting: int = 0
        self.num_preempted: int = 0
        self.failed: list[tuple[Request, Exception]] = []
        self._cache = cache
        self._verify = verify
        self._clock = clock
        self._waiting = WaitingQueue()
        self._owners = PrefixOwners(cache.config.block_size)
        self._others = OtherProcesses(cache, clock=clock)
        self._lingering: list[Request] = []  # ended; requests that copy from them have not begun
        self._num_arrived = 0
        self._num_steps = 0
        self._blocked: tuple[Request, int] | None = None  # the first request that waits for room, and until which step

    @property
    def num_following(self) -> int:
        """Waiting requests that wait for a block that is being computed."""
        return self._owners.num_followers + len(self._others)

    @property
    def has_work(self) -> bool:
        """Whether a request runs or waits."""
        return bool(self.num_waiting or len(self.running))

    def sequences(self) -> list[Sequence]:
        """Return the sequences of all requests, those included whose blocks are only copied from."""
        return [each.sequence for each in (*self.running, *self._lingering) if each.sequence]

    def submit(self, request: Request) -> None:
        """Let a new request wait."""
        assert request.state is RequestState.NEW
        request.order = request.urgency = (self._num_arrived + request.priority * AGING, self._num_arrived)
        self._num_arrived += 1
        request.state = RequestState.WAITING
        self.num_waiting += 1
        self._waiting.push(request)

    def admit(self) -> int:
        """Start waiting requests while there is room. Return how many.

        While sequences decode, it starts no more than fill the next pass, so that they do not wait for it.
        A request that can never start is put into `failed`. Raises ClosedError if the cache is closed.
        """
        self._num_steps += 1
        for each in self._others.ask_again(self._advance):
            self._waiting.push(each)  # its followers go on when it starts or ends
        count, num_looks = 0, 0
        while not self._is_enough(count, num_looks) and (request := self._waiting.take()) is not None:
            try:
                if found := self._owners.find(request):
                    self._follow(request, *found)
                    num_looks += 1
                elif not self._may_start(request):
                    self._waiting.push(request)
                    break
                elif self._others.must_wait(request):
                    self._owners.add(request)
                    num_looks += 1
                elif not self._start(request):
                    self._waiting.push(request)
                    break
                else:
                    count += request.state is RequestState.RUNNING
            except BaseException:
                if request.state is RequestState.WAITING:
                    self._waiting.push(request)
                raise
        self.release_lingering()
        if count and len(self.running) > 1:
            for request in self.running:
                request.had_company = True
        return count

    def grow(self, requests: Iterable[Request]) -> None:
        """Take a block for each request whose tokens have outgrown its blocks. If there is none, preempt."""
        for request in requests:
            while request.state is RequestState.RUNNING and len(request.token_ids) > request.capacity:
                try:
                    self.running.take_room(request)
                except CapacityError as exc:
                    if self.release_lingering():
                        continue
                    if len(self.running) == 1:
                        self.failed.append((request, exc))
                        return
                    self.preempt(max(self.running, key=by_urgency))

    def preempt(self, request: Request) -> None:
        """Let a running request wait again, at its old place. Its whole blocks and its partial one stay cached."""
        self._verify([request])
        try:
            self.running.commit_partial(request)
        finally:
            self._return_to_queue(request)
        request.num_preemptions += 1
        self.num_preempted += 1

    def reset(self) -> None:
        """Let all running requests wait again after an error: nothing more of what they computed is committed."""
        with ExitStack() as ending:  # calls every callback, even if one raises
            for request in self.running:
                ending.callback(self._return_to_queue, request)

    def finish(self, request: Request) -> None:
        """End a request in order: commit its partial block if it keeps it, and release its blocks."""
        try:
            if request.state is RequestState.RUNNING and request.keeps_partial:
                self.running.commit_partial(request)
        finally:
            self.drop(request)

    def drop(self, request: Request) -> None:
        """End a request in any state, and commit nothing. Requests that wait for it go on. May be called twice."""
        state, request.state = request.state, RequestState.ENDED
        if state is RequestState.RUNNING:
            self._leave(request)
            if request.num_sharing:
                self._lingering.append(request)
                return
        elif state is RequestState.WAITING:
            self.num_waiting -= 1
            if request in self._others:
                self._others.remove(request)
            else:
                self._waiting.note_end()
            self._wake(self._owners.leave(request))
            self._end_sharing(request)
        if request not in self._lingering:
            self._release(request)

    def release_lingering(self) -> int:
        """Release the blocks of ended requests from which others may still copy. Return how many requests that were."""
        lingering, self._lingering = self._lingering, []
        for at, request in enumerate(lingering):
            try:
                self._release(request)
            except BaseException:
                self._lingering = lingering[at + 1 :]
                raise
        return len(lingering)

    def check(self) -> None:
        """Raise AssertionError unless lists and states agree, and no request waits for one that computes nothing."""
        self.running.check()
        assert all(each.state is RequestState.RUNNING for each in self.running)
        assert all(each.state is RequestState.ENDED for each in self._lingering)
        self._owners.check()

    def _is_enough(self, num_starts: int, num_looks: int) -> bool:
        """Return whether a step that has started so many requests goes on, because sequences decode."""
        running = self.running
        if not running.is_decoding:
            return False
        return num_looks >= _MOST_LOOKS or num_starts >= _MOST_STARTS or running.fills_a_pass()

    def _may_start(self, request: Request) -> bool:
        """Return whether there is a place and room for a request; preempt less urgent ones for it."""
        if self._blocked and self._blocked[0] is request and self._num_steps < self._blocked[1]:
            return False
        while self.max_running is not None and len(self.running) >= self.max_running:
            if not self._preempt_for(request):
                return False
        if self._cache.ranks.size > 1:  # all ranks get the same answer when they acquire: a question would cost more
            return True
        while len(self.running) and not self._has_room(request, spare=len(self.running)):
            if not self.release_lingering() and not self._preempt_for(request):
                self._blocked = request, self._num_steps + _RETRY_STEPS
                return False
        return True

    def _has_room(self, request: Request, *, spare: int) -> bool:
        """Return whether there is room for a request. spare: for the next block of each request that runs."""
        return self._cache.batching.has_room(request.token_ids, reuse=request.use_cache, spare=spare)

    def _preempt_for(self, request: Request) -> bool:
        """Preempt the least urgent request of a less urgent class that came later in order. Return whether one was.

        None is preempted unless the blocks of all such requests would suffice.
        """
        later = [each for each in self.running if each.priority > request.priority and each.urgency > request.order]
        held = sum(len(each.sequence.block_table) for each in later if each.sequence)
        if not later or not self._has_room(request, spare=len(self.running) - len(later) - held):
            return False
        self.preempt(max(later, key=by_urgency))
        return True

    def _start(self, request: Request) -> bool:
        """Let a request run. Return False if there is no room now: it waits on."""
        request.admitted_at, request.had_company = self._clock(), False
        try:
            request.sequence = self._cache.acquire(
                request.token_ids, reuse=request.use_cache, overlap=request.overlap, wait=False
            )
            self._share(request, request.sequence)
        except BaseException as exc:
            self._release(request)
            if isinstance(exc, CapacityError) and len(self.running):
                if self._cache.ranks.size > 1 and (self.release_lingering() or self._preempt_for(request)):
                    return self._start(request)
                self._blocked = request, self._num_steps + _RETRY_STEPS
                return False
            if not isinstance(exc, Exception) or isinstance(exc, ClosedError | RankError):
                raise
            self.failed.append((request, exc))  # this request alone: the others go on
            return True
        request.state = RequestState.RUNNING
        self.num_waiting -= 1
        self.running.add(request, request.sequence)
        if request.use_cache:
            self._owners.add(request)
            self._advance(request)
        return True

    def _share(self, request: Request, sequence: Sequence) -> None:
        """Copy the partly filled end of a common prefix from the request that has computed it, if that still runs."""
        source = request.source
        if source is None:
            return
        if source.sequence and source.num_verified >= request.source_tokens and self._cache.ranks.size == 1:
            self._cache.batching.share_partial(source.sequence, sequence, request.source_tokens)
        self._end_sharing(request)

    def _end_sharing(self, request: Request) -> None:
        if request.source is not None:
            request.source.num_sharing -= 1
            request.source = None

    def _follow(self, request: Request, owner: Request, num_tokens: int) -> None:
        self._end_sharing(request)
        self._owners.follow(request, owner, num_tokens)
        if request.urgency < owner.urgency:
            owner.urgency = request.urgency
            self.running.sort()

    def _advance(self, owner: Request) -> None:
        self._wake(self._owners.advance(owner))

    def _wake(self, runs: list[list[Request]]) -> None:
        for run in runs:
            self._waiting.push_run(run)

    def _return_to_queue(self, request: Request) -> None:
        self._leave(request)
        request.state = RequestState.WAITING
        request.num_computed = request.num_verified = 0
        request.urgency = request.order
        self.num_waiting += 1
        self._waiting.push(request)
        self._release(request)

    def _leave(self, request: Request) -> None:
        """Remove a request from those that run; requests that wait for it go on."""
        self.running.remove(request)
        self._wake(self._owners.leave(request))

    def _release(self, request: Request) -> None:
        sequence, request.sequence = request.sequence, None
        if sequence is not None:
            self._blocked = None
            self._cache.release(sequence)
