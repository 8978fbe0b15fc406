"""Engine: serves requests that come at any time, over one runner, in a thread of its own."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from tierkv.engine.generation import GenerationOptions
from tierkv.engine.rank_news import FollowedNews, LeadingNews
from tierkv.engine.runner import Runner
from tierkv.engine.token_stream import TokenStream
from tierkv.errors import ClosedError, ConfigError, QueueFullError, RankError
from tierkv.ranks.group import RankGroup
from tierkv.scheduling.request import RequestState
from tierkv.values.checks import check_count, check_seconds

__all__ = ["Engine", "EngineStats"]

_log = logging.getLogger(__name__)

_POLL_S = 0.002  # while all requests wait for other processes
_FOLLOW_S = 1.0  # how long a rank waits for the first one's next step before it looks whether it is closing
_LAST_STEP_S = 10.0  # how long `close` waits for a step that is under way


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine does now, and what it has done so far.

    running, waiting: requests now; following: those of the waiting ones whose next block another request or process is
    computing. preempted: how often a running request had to wait again. rejected: requests that found the queue full.
    finished, cancelled, expired, failed: requests that have ended. steps: forward passes. new_tokens: that were chosen.
    computed_tokens: of prompts and new ones; cached_tokens: of prompts that were not computed.
    """

    running: int
    waiting: int
    following: int
    submitted: int
    rejected: int
    preempted: int
    finished: int
    cancelled: int
    expired: int
    failed: int
    steps: int
    new_tokens: int
    computed_tokens: int
    cached_tokens: int


class Engine:
    """Continuous batching over a runner. Thread-safe; a context manager; `close` may be called twice.

    A request is admitted at the next step that has room for it. The prompts of new requests are computed in pieces, so
    that decoding sequences keep their pace. A prefix that several requests share is computed once. Where blocks are
    short, the least urgent request waits again and goes on later with the same tokens.

    While the engine is open, `Runner.generate` and `Runner.stream` are requests of it.
    Each rank of a split model has an engine; all are made together, with the same options. The first rank's takes
    requests, and sends the others before each step what has come; those follow until it is closed. A step that fails
    then ends all engines.
    max_running: requests that are computed together at most. max_waiting: others in the queue at most.
    decode_step_tokens: tokens of prompts in a pass beside decoding sequences at most.
    Raises ConfigError if the runner has an engine, or if other ranks have other options.

    >>> loaded = load_model(None, cache_dir=Path("models"))
    >>> with open_runner(loaded, CacheConfig(block_size=16)) as runner, Engine(runner) as engine:
    ...     streams = [engine.submit([1, 2, n], GenerationOptions(max_new_tokens=3)) for n in range(4)]
    ...     [len(stream.result().token_ids) for stream in streams]
    [3, 3, 3, 3]
    """

    def __init__(
        self, runner: Runner, *, max_running: int = 256, max_waiting: int = 4096, decode_step_tokens: int = 512
    ) -> None:
        self.runner = runner
        self._loop = runner.step_loop
        self._max_waiting = check_count("max_waiting", max_waiting, least=1)
        max_running = check_count("max_running", max_running, least=1)
        decode_step_tokens = check_count("decode_step_tokens", decode_step_tokens, least=1)
        self._wake = threading.Event()
        self._closing = threading.Lock()
        self._ends_at: float | None = None  # once it closes
        self._num_rejected = 0
        self._error: BaseException | None = None  # of a rank that follows
        ranks = runner.cache.ranks
        self._leading: LeadingNews | None = None
        self._followed: FollowedNews | None = None
        if ranks.size > 1:
            _require_same(
                ranks, (max_running, decode_step_tokens, runner.max_step_tokens, runner.compute_or_load, runner.sparse)
            )
            self._leading = LeadingNews(ranks) if ranks.rank == 0 else None
            self._followed = FollowedNews(ranks, self._loop.builder) if ranks.rank else None
        self._loop.attach(self._wake.set, self._leading or self._followed)
        self._loop.builder.leads = self._leading is not None
        with self._loop.lock:
            scheduler = self._loop.scheduler
            scheduler.max_running = max_running
            scheduler.running.decode_step_tokens = min(decode_step_tokens, scheduler.running.max_step_tokens)
        run = self._run if self._followed is None else self._follow
        self._thread = threading.Thread(target=run, name="tierkv-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def submit(
        self,
        token_ids: Sequence[int],
        options: GenerationOptions | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        number: int = 0,
    ) -> TokenStream:
        """Let a request wait for its turn; return its stream at once.

        priority: lower is more urgent. A level is worth 256 places in the queue, so every request has its turn.
        deadline_s: seconds from now after which the request ends with what it has, waiting or running.
        number: which of several equal prompts of one seed this is: each number gets an answer of its own.
        Raises ConfigError for a bad request and on other ranks than the first, CapacityError for one that never fits
        the hot pool, QueueFullError if `max_waiting` requests wait, and ClosedError.
        """
        self.runner.cache.calls.require_own_process()
        self._loop.require_requests()
        chosen = options or GenerationOptions()
        check_count("priority", priority, least=None)
        check_count("number", number)
        deadline = None if deadline_s is None else time.perf_counter() + check_seconds("deadline_s", deadline_s)
        request = self._loop.builder.build_one(token_ids, chosen, number=number)
        request.priority, request.deadline, request.owner = priority, deadline, self
        with self._closing:  # after `close` has begun, no request would be ended
            if self._ends_at is not None:
                raise ClosedError("the engine is closed")
            if self._loop.num_waiting >= self._max_waiting:
                self._num_rejected += 1
                raise QueueFullError(
                    f"{self._max_waiting} requests wait already", hint="try again later, or raise max_waiting"
                )
            stream = TokenStream(request, self._loop, self.runner.cache.calls)
            self._loop.submit([request])
        return stream

    def stats(self) -> EngineStats:
        """Return what the engine does now, and what it has done so far."""
        scheduler, counters = self._loop.scheduler, self._loop.counters
        return EngineStats(
            running=len(scheduler.running),
            waiting=self._loop.num_waiting,
            following=scheduler.num_following,
            submitted=counters.submitted,
            rejected=self._num_rejected,
            preempted=scheduler.num_preempted,
            finished=counters.finished,
            cancelled=counters.cancelled,
            expired=counters.expired,
            failed=counters.failed,
            steps=counters.steps,
            new_tokens=counters.new_tokens,
            computed_tokens=counters.computed_tokens,
            cached_tokens=counters.cached_tokens,
        )

    def close(self, *, wait_s: float = 5.0) -> None:
        """Take no more requests, let those that have started end, and stop the thread.

        Requests that have not started end at once, the others after `wait_s` seconds at the latest, with what they have
        and the finish reason "shutdown". A step that is under way is waited for, ten seconds at most. On another rank
        than the first this waits as long for the first rank's engine to close.
        """
        wait_s = check_seconds("wait_s", wait_s)
        if self.runner.cache.calls.is_forked:
            return
        with self._closing:
            if self._ends_at is None:
                self._ends_at = time.perf_counter() + wait_s
        self._wake.set()
        if threading.current_thread() is self._thread:
            return
        self._thread.join(wait_s + _LAST_STEP_S)
        if self._thread.is_alive():
            _log.error("a step of the engine does not end: its requests are abandoned")
            for request in self._loop.open_requests(self):
                request.error = request.error or ClosedError("the engine was closed while a step did not end")
                if request.reader is not None:
                    request.reader.end(request)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until the engine has ended, on another rank than the first until the first rank's has. Return whether.

        Raises RankError on a rank that could not follow the first one.
        """
        self._thread.join(timeout_s)
        if self._error is not None:
            raise self._error
        return not self._thread.is_alive()

    def _follow(self) -> None:
        """Step whenever the first rank does, until its engine is closed."""
        followed = self._followed
        assert followed is not None
        error: BaseException = ClosedError("the engine is closed")
        try:
            while not followed.is_over:
                if followed.wait(_FOLLOW_S):
                    self._loop.step()
                elif self._ends_at is not None and time.perf_counter() >= self._ends_at + _LAST_STEP_S:
                    raise RankError("the first rank's engine has not ended in time")
        except BaseException as exc:  # noqa: BLE001 - raised by `wait`
            error = self._error = exc
            _log.exception("the engine follows the first rank no more")
        finally:
            with self._closing:
                self._ends_at = self._ends_at or time.perf_counter()
            self._loop.detach()
            self._loop.fail_all(error)

    def _run(self) -> None:
        """Step while there is work, until the engine is closed. Whatever happens, every stream ends."""
        error: BaseException = ClosedError("the engine is closed")
        try:
            while not self._is_over():
                self._wake.clear()
                if not self._loop.has_work:
                    self._wake.wait()
                    continue
                try:
                    if not self._loop.step(deliver_late=True):
                        self._wake.wait(_POLL_S)
                except ClosedError:
                    raise
                except Exception as exc:
                    if self._leading:
                        raise  # the other ranks may be in another step by now
                    _log.warning("a step of the engine failed, and its requests with it: %s", exc)
                    self._loop.fail_all(exc)
        except BaseException as exc:  # noqa: BLE001 - handed to every reader below
            error = exc
            if not isinstance(exc, ClosedError):
                _log.exception("the engine has ended")
        finally:
            with self._closing:
                self._ends_at = self._ends_at or time.perf_counter()
            self._end_leading()
            self._loop.detach()
            self._loop.builder.leads = False
            self._loop.fail_all(error, owner=self)

    def _end_leading(self) -> None:
        """Send the other ranks that no more steps follow, and end the requests that they no more compute."""
        if self._leading is None:
            return
        try:
            self._leading.send_end()
        except RankError as exc:
            _log.error("the other ranks may go on waiting for this one: %s", exc)
        self._loop.fail_all(ClosedError("the engine is closed"))

    def _is_over(self) -> bool:
        """Return whether the thread ends now. Ends the requests whose time is over."""
        if self._ends_at is None:
            return False
        is_late = time.perf_counter() >= self._ends_at
        with self._loop.lock:
            for request in self._loop.open_requests(self):
                if is_late or (request.state is not RequestState.RUNNING and not request.num_preemptions):
                    if self._leading:  # in the same step as on the other ranks
                        self._loop.cancel_later(request, "shutdown")
                    else:
                        self._loop.finish(request, "shutdown")
            self._loop.outbox.deliver()
        return (is_late and not self._leading) or not self._loop.open_requests(self)


def _require_same(ranks: RankGroup, options: tuple[object, ...]) -> None:
    """Raise ConfigError unless all ranks have these options."""
    if len(set(ranks.gather(repr(options).encode()))) > 1:
        raise ConfigError("the ranks' engines have different options: they would compute different passes")
