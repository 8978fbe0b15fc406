"""StepLoop: one forward pass after the other over all running requests of a runner, whichever thread calls it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass
from threading import RLock

import torch

from tierkv.cache import TierCache
from tierkv.engine.attention import AttentionSwitch
from tierkv.engine.deadlines import Deadlines
from tierkv.engine.forward_pass import ForwardPass
from tierkv.engine.generation import ModelRequest
from tierkv.engine.model_identity import ModelCheck
from tierkv.engine.outbox import Outbox
from tierkv.engine.pass_runner import PassRunner
from tierkv.engine.rank_news import FollowedNews, LocalNews, NewsSource
from tierkv.engine.request_builder import RequestBuilder
from tierkv.engine.verified_commits import VerifiedCommits
from tierkv.errors import ClosedError, ConfigError
from tierkv.ranks.monitor import RankMonitor
from tierkv.scheduling.request import RequestState
from tierkv.scheduling.scheduler import Scheduler

__all__ = ["Counters", "StepLoop"]

_MOST_ARRIVALS = 256
"""New requests that one step takes into the queue beside decoding sequences; more would delay their next tokens."""


@dataclass(slots=True)
class Counters:
    """What a step loop has done so far. computed_tokens: of prompts and new ones; cached_tokens: of prompts."""

    steps: int = 0
    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    new_tokens: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0


class StepLoop:
    """The requests of one runner and its engine, and the passes that compute them.

    `submit`, `cancel` and `has_work` may be called by any thread; the others hold `lock`. A step is: take new requests
    and cancellations, admit, launch a pass, launch the choice of tokens, commit the pass before while the device
    computes, wait for the tokens. That is the only wait for the device.

    lock: held during a step; between two steps the model and the block tables are the caller's. may_overlap: let cold
    blocks load while the first of them are computed. builder: makes its requests. monitor: of a rank of a split model.
    """

    def __init__(
        self,
        cache: TierCache,
        forward_pass: ForwardPass,
        attention: AttentionSwitch,
        model_check: ModelCheck,
        builder: RequestBuilder,
        *,
        max_step_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
        monitor: RankMonitor | None = None,
    ) -> None:
        self.lock: RLock = RLock()
        self.builder: RequestBuilder = builder
        self.counters: Counters = Counters()
        self.may_overlap: bool = cache.config.compute_or_load
        self._clock = clock
        self.scheduler: Scheduler = Scheduler(
            cache, max_step_tokens=max_step_tokens, verify=lambda requests: self.commits.verify(requests), clock=clock
        )
        self.commits: VerifiedCommits = VerifiedCommits(self.scheduler.running.record_verified, model_check)
        self.outbox: Outbox = Outbox(self.cancel)
        self._cache = cache
        self._passes = PassRunner(forward_pass, self.commits, self.outbox, self.scheduler.running)
        self._attention = attention
        self._arrivals: deque[ModelRequest] = deque()
        self._cancelled: deque[tuple[ModelRequest, str]] = deque()
        self._deadlines = Deadlines()
        self._open: set[ModelRequest] = set()
        self._wake: Callable[[], None] | None = None
        self._news: NewsSource = LocalNews()
        self._monitor = monitor
        if monitor:
            monitor.on_failure = self._notify_readers

    @property
    def is_attached(self) -> bool:
        """Whether a thread of its own steps this loop."""
        return self._wake is not None

    @property
    def num_waiting(self) -> int:
        """Requests that do not run yet, or no more."""
        return self.scheduler.num_waiting + len(self._arrivals)

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return bool(self._arrivals or self._cancelled or self.outbox.is_pending or self.scheduler.has_work)

    def submit(self, requests: Iterable[ModelRequest]) -> None:
        """Let new requests wait; the next step admits them if there is room.

        Raises ConfigError on ranks that follow another one's steps.
        """
        self.require_requests()
        for request in requests:
            request.overlap = self.may_overlap
            self._open.add(request)
            self._arrivals.append(request)
        if wake := self._wake:
            wake()

    def require_requests(self) -> None:
        """Raise ConfigError unless requests may come to this rank."""
        if isinstance(self._news, FollowedNews):
            raise ConfigError("requests come to the first rank's engine: this one follows its steps")

    def cancel(self, request: ModelRequest, reason: str = "cancelled") -> None:
        """Let the next step end a request. It does nothing if the request has ended."""
        self.cancel_later(request, reason)
        if wake := self._wake:
            wake()

    def cancel_later(self, request: ModelRequest, reason: str = "cancelled") -> None:
        """Do as `cancel`, but take no lock: the garbage collector may call this anywhere."""
        if request.state is not RequestState.ENDED:
            self._cancelled.append((request, reason))

    @property
    def is_joint(self) -> bool:
        """Whether the first rank decides for several ranks what each step takes into the queue."""
        return not isinstance(self._news, LocalNews)

    def attach(self, wake: Callable[[], None], news: NewsSource | None = None) -> None:
        """Let a thread step this loop. wake: called when there is something to do. Raises ConfigError for a second.

        news: of all ranks, if there are several.
        """
        with self.lock:
            if self._wake is not None:
                raise ConfigError("the runner has an engine already")
            self._wake = wake
            self._news = news or LocalNews()

    def detach(self) -> None:
        """End what `attach` began, and its bounds: calls of the runner step again, each in its own thread."""
        with self.lock:
            self._wake = None
            self._news = LocalNews()
            self.scheduler.max_running = None
            self.scheduler.running.decode_step_tokens = self.scheduler.running.max_step_tokens

    def open_requests(self, owner: object = None) -> list[ModelRequest]:
        """Return the requests that have not ended; with an owner, its own."""
        return [each for each in list(self._open) if owner is None or each.owner is owner]

    def fail_all(self, error: BaseException, *, owner: object = None) -> None:
        """End the requests that have not ended, with an error, and notify their readers."""
        with self.lock:
            for request in self.open_requests(owner):
                self.fail(request, error)
            self.scheduler.release_lingering()
            self.outbox.deliver()

    def _notify_readers(self, error: BaseException) -> None:
        """Let no reader wait for a step that may never end: another thread holds the lock for it."""
        for request in self.open_requests():
            request.error = request.error or error
            if request.reader is not None:
                with suppress(RuntimeError):  # the event loop of a reader may be closed
                    if woken := request.reader.end(request):
                        wake, call = woken
                        wake(call)

    def abandon(self, requests: Iterable[ModelRequest]) -> None:
        """End requests whose caller has gone. What they have computed and verified is kept as they wanted.

        Raises what the cache raises, after all of them hold nothing any more.
        """
        if self._cache.calls.is_forked:
            return
        if self.is_joint:  # the other ranks must end them in the same step
            for request in requests:
                self.cancel(request)
            return
        with self.lock, ExitStack() as ending:  # calls every callback, even if one raises
            ending.callback(self.scheduler.release_lingering)
            for request in requests:
                if request.state is not RequestState.ENDED:
                    ending.callback(self._note_end, request, "cancelled")
                    ending.callback(self.scheduler.finish, request)

    def step(self, *, deliver_late: bool = False) -> bool:
        """Compute one pass. Return whether one was computed; if not, all requests wait for other processes.

        deliver_late: keep its tokens, but for first ones, in the outbox until the next step has launched its pass.
        Raises what the model raises, ConfigError if it has changed, and ClosedError. Then nothing of the pass is
        committed, and every request that ran waits to be computed again.
        """
        self._cache.calls.require_own_process()
        steps: list[tuple[ModelRequest, int]] = []
        monitored = self._monitor.step() if self._monitor else nullcontext()
        with self.lock, monitored, torch.inference_mode(), self._attention:
            try:
                self._take_news()
                if self.scheduler.has_work:
                    if self.scheduler.admit():
                        self.commits.is_model_known = False  # so this pass is checked while the device computes it
                    self._end_failed()
                steps = self.scheduler.running.plan()  # type: ignore[assignment]
                if steps:
                    self._compute(steps)
                    self.counters.steps += 1
            except BaseException:
                self.commits.drop()
                for request in self.open_requests():
                    request.sampler.num_drawn = request.num_new  # a token may be drawn and not added
                self.scheduler.reset()
                raise
            finally:
                if deliver_late and steps and len(self.scheduler.running):
                    self.outbox.deliver_first()
                else:
                    self.outbox.deliver()
            return bool(steps)

    def finish(self, request: ModelRequest, reason: str) -> None:
        """End a request in order, and notify its reader with the next delivery. Called inside a step."""
        if request.state is RequestState.ENDED:
            return
        if request.keeps_partial and request.sequence is not None:
            self.commits.verify([request])
        try:
            self.scheduler.finish(request)
        except ClosedError:
            raise
        except Exception as exc:  # noqa: BLE001 - of this request alone, which holds nothing any more
            request.error = exc
        finally:
            self._note_end(request, reason)

    def fail(self, request: ModelRequest, error: BaseException) -> None:
        """End a request with an error. Called inside a step."""
        if request.state is RequestState.ENDED:
            return
        try:
            self.scheduler.drop(request)
        finally:
            request.error = error
            self._note_end(request, "error")

    def _note_end(self, request: ModelRequest, reason: str) -> None:
        counters = self.counters
        self._open.discard(request)
        request.finish_reason = reason
        if request.error is not None:
            counters.failed += 1
        elif reason == "cancelled":
            counters.cancelled += 1
        elif reason == "deadline":
            counters.expired += 1
        else:
            counters.finished += 1
        if not request.last_token_at:
            request.last_token_at = self._clock()
        self.outbox.end(request)

    # One step

    def _take_news(self) -> None:
        """Take new requests into the queue, and end those that are cancelled or expired."""
        most = _MOST_ARRIVALS if self.scheduler.running.is_decoding else len(self._arrivals)
        arrivals = [self._arrivals.popleft() for _ in range(min(len(self._arrivals), most))]
        arrivals = [each for each in arrivals if each.state is not RequestState.ENDED]
        ends = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        ends += [(each, "deadline") for each in self._deadlines.expired(self._clock())]
        news = self._news.exchange(arrivals, ends)
        for request in news.arrivals:
            self._open.add(request)
            self.counters.submitted += 1
            self.scheduler.submit(request)
            self._deadlines.add(request)
        for request, reason in news.ends:
            self.finish(request, reason)
        if not self.is_joint:  # else the other ranks must know
            for request in self._deadlines.expired(self._clock()):
                self.finish(request, "deadline")

    def _end_failed(self) -> None:
        failed, self.scheduler.failed = self.scheduler.failed, []
        for request, error in failed:
            assert isinstance(request, ModelRequest)
            self.fail(request, error)

    def _compute(self, steps: list[tuple[ModelRequest, int]]) -> None:
        """Run one forward pass, and end the requests that end with it."""
        outcome = self._passes.run(steps)
        self.counters.computed_tokens += outcome.num_computed
        self.counters.cached_tokens += outcome.num_cached
        self.counters.new_tokens += outcome.num_new
        for request, error in outcome.failed:
            self.fail(request, error)
        for request, reason in outcome.ended:
            self.finish(request, reason)
        if outcome.outgrown:
            self.scheduler.grow(outcome.outgrown)
            self._end_failed()
