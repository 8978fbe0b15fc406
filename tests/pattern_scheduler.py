"""A scheduler over a cache of patterns: it computes what the plan says, and checks every cached token byte for byte."""

from __future__ import annotations

from collections.abc import Iterable

import xxhash
from pattern_engine import PatternEngine

from tierkv.cache import TierCache
from tierkv.scheduling.request import Request, RequestState
from tierkv.scheduling.scheduler import Scheduler
from tierkv.values.block import Tier, as_token_array, iter_chain

__all__ = ["PatternScheduler", "next_token"]


def next_token(token_ids: list[int]) -> int:
    """Return the token that follows: any function of all tokens before it."""
    return xxhash.xxh3_64_intdigest(as_token_array(token_ids).tobytes()) % 50


class PatternScheduler:
    """Steps a scheduler as an engine does.

    computed: tokens computed so far. ended: requests, in the order of their end. now: the clock.
    """

    def __init__(self, cache: TierCache, *, max_step_tokens: int = 64, max_running: int | None = None) -> None:
        self.cache = cache
        self.engine = PatternEngine(cache)
        self.now = 0.0
        self.computed = 0
        self.ended: list[Request] = []
        self.failed: list[tuple[Request, Exception]] = []
        self.plans: list[list[tuple[Request, int]]] = []
        self.scheduler = Scheduler(cache, max_step_tokens=max_step_tokens, verify=self.verify, clock=lambda: self.now)
        self.scheduler.max_running = max_running

    def submit(
        self, token_ids: list[int], *, new: int = 1, priority: int = 0, use_cache: bool = True, partial: bool = False
    ) -> Request:
        """Let a new request wait."""
        size = self.cache.config.block_size
        token_bytes = as_token_array(token_ids).tobytes()
        request = Request(
            token_ids=list(token_ids),
            prompt_tokens=len(token_ids),
            max_new_tokens=new,
            hashes=tuple(each for each, _ in iter_chain(b"root", token_bytes, size)) if use_cache else (),
            priority=priority,
            use_cache=use_cache,
            keeps_partial=partial,
        )
        self.scheduler.submit(request)
        return request

    def step(self) -> list[Request]:
        """Admit, compute a pass, choose tokens, take blocks. Return the requests that have ended."""
        self.now += 0.01
        before = set(self.scheduler.running)
        self.scheduler.admit()
        self._end_failed()
        for request in self.scheduler.running:
            if request not in before:
                assert request.sequence is not None
                self.engine.check(request.sequence, request.num_computed)
        plan = self.scheduler.running.plan()
        self.plans.append(plan)
        for request, count in plan:
            self._compute(request, count)
        for request, _ in plan:
            if request.num_computed >= request.check_at:
                self.scheduler.running.record_verified(request, request.num_computed)
        ended, outgrown = [], []
        for request, _ in plan:
            if request.num_computed < len(request.token_ids):
                continue
            request.token_ids.append(next_token(request.token_ids))
            request.num_new += 1
            if request.is_prefilling:
                self.scheduler.running.note_decoding(request)
            (ended if request.num_new == request.max_new_tokens else outgrown).append(request)
        for request in ended:
            self.verify([request])
            self.scheduler.finish(request)
        self.scheduler.grow(outgrown)
        self._end_failed()
        self.ended += ended
        self.scheduler.check()
        return ended

    def run(self, most_steps: int = 10_000) -> None:
        """Step until no request is left."""
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                self.scheduler.release_lingering()
                return
            self.step()
        raise AssertionError(f"requests are left after {most_steps} steps")

    def verify(self, requests: Iterable[Request]) -> None:
        """Commit everything that these have computed: a pattern never changes."""
        for request in requests:
            self.scheduler.running.record_verified(request, request.num_computed)

    def check_idle(self) -> None:
        """Raise AssertionError if anything is left of the requests, in the scheduler or in the cache."""
        assert not self.scheduler.has_work and not self.scheduler.sequences()
        assert self.scheduler.num_waiting == self.scheduler.num_following == 0
        self.cache.check()
        assert self.cache._tiers.index.hot.referenced_count == 0
        assert self.cache.stats().tiers[Tier.HOT].blocks <= self.cache.hot.num_blocks

    def _compute(self, request: Request, count: int) -> None:
        assert request.state is RequestState.RUNNING and request.sequence is not None and count > 0
        self.scheduler.running._add_tokens(request, request.sequence)
        self.engine.compute(request.sequence, request.num_computed, request.num_computed + count)
        request.num_computed += count
        self.computed += count

    def _end_failed(self) -> None:
        for request, error in self.scheduler.failed:
            self.scheduler.drop(request)
            self.failed.append((request, error))
        self.scheduler.failed.clear()
