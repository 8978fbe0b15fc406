"""A preempted request goes on with the tokens that it would have got, from what was kept of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_requests import greedy, sampled, tokens

from tierkv.engine.engine import Engine
from tierkv.engine.generation import GenerationOptions, ModelRequest
from tierkv.engine.runner import Runner
from tierkv.engine.sampling import SamplingOptions
from tierkv.scheduling.scheduler import Scheduler
from tierkv.values.block import Tier

Open = Callable[..., Runner]
SAMPLED = GenerationOptions(
    max_new_tokens=40, stop_ids=frozenset(), sampling=SamplingOptions(temperature=0.8, top_k=40, top_p=0.95, seed=11)
)


@pytest.mark.parametrize("options", [greedy(40), SAMPLED], ids=["greedy", "seeded sampling"])
def test_preempted_requests_get_the_tokens_of_uninterrupted_ones(open_one: Open, options: GenerationOptions) -> None:
    runner = open_one(hot=9, warm=64)
    prompts = [tokens(20 + i, seed=i) for i in range(5)]
    want = [runner.generate([each], options)[0].token_ids for each in prompts]
    runner.cache.evict_everywhere()
    with Engine(runner) as engine:
        streams = [engine.submit(each, options, priority=i) for i, each in enumerate(prompts)]
        assert [each.result().token_ids for each in streams] == want
        assert engine.stats().preempted
    runner.cache.evict_everywhere()
    assert [g.token_ids for g in runner.generate(prompts, options)] == want, "and without an engine"


@pytest.mark.parametrize("at", [1, 2, 17, 30])
@pytest.mark.parametrize("options", [greedy(40), SAMPLED], ids=["greedy", "seeded sampling"])
def test_a_request_that_is_preempted_at_any_token_goes_on_from_the_warm_tier(
    open_one: Open, monkeypatch: pytest.MonkeyPatch, options: GenerationOptions, at: int
) -> None:
    runner = open_one()
    prompt = tokens(35)
    (want,) = runner.generate([prompt], GenerationOptions(**_fields(options), use_cache=False))
    admit = Scheduler.admit
    preempted: list[int] = []

    def preempt_once(self: Scheduler) -> int:
        for request in list(self.running):
            if request.num_new == at and not preempted:
                self.preempt(request)
                preempted.append(request.num_computed)
                runner.cache.flush()
                runner.cache.evict(Tier.HOT)
        return admit(self)

    monkeypatch.setattr(Scheduler, "admit", preempt_once)
    before = runner.step_loop.counters.computed_tokens
    assert [event.token_id for event in runner.stream([prompt], options)] == want.token_ids
    assert preempted == [0] and runner.cache.stats().tiers[Tier.WARM].hits
    assert runner.step_loop.counters.computed_tokens - before == 35 + 39, "its partial block was kept too"


def _fields(options: GenerationOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("max_new_tokens", "stop_ids", "sampling")}


def test_the_first_request_of_the_queue_is_not_preempted(open_one: Open) -> None:
    runner = open_one(hot=9)
    requests: list[ModelRequest] = []
    with Engine(runner) as engine:
        streams = [engine.submit(tokens(16, seed=i), greedy(80)) for i in range(4)]
        requests = [each._request for each in streams]
        assert [len(each.result().token_ids) for each in streams] == [80] * 4
    assert requests[0].num_preemptions == 0
    assert sum(each.num_preemptions for each in requests) > 0


def test_logits_of_a_preempted_request_are_those_of_its_tokens(open_one: Open) -> None:
    runner = open_one(hot=9)
    prompts = [tokens(16, seed=i) for i in range(3)]
    want = [runner.generate([each], greedy(60, keep_logits=True))[0] for each in prompts]
    got = runner.generate(prompts, greedy(60, keep_logits=True))
    assert runner.step_loop.scheduler.num_preempted
    for one, other in zip(got, want, strict=True):
        assert one.logits is not None and other.logits is not None
        assert one.logits.shape == other.logits.shape
        assert torch.allclose(one.logits, other.logits, atol=1e-3)


def test_an_error_amid_a_step_costs_other_streams_no_token(open_one: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = open_one()
    (want,) = runner.generate([tokens(20)], sampled(12, use_cache=False))
    first = runner.stream([tokens(20)], sampled(12))
    got = [next(first).token_id for _ in range(3)]
    commit = runner._commits.commit
    calls = 0

    def interrupt() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # behind the choice of the tokens, before they are added
            raise KeyboardInterrupt
        commit()

    with monkeypatch.context() as patch:
        patch.setattr(runner._commits, "commit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            runner.generate([tokens(9, seed=2)], greedy(4))
    got += [event.token_id for event in first]
    assert got == want.token_ids
