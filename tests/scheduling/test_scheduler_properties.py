"""Random arrivals, cancellations, priorities and pools: every request ends, with its own tokens, and leaves nothing."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from pattern_engine import open_tiny
from pattern_scheduler import PatternScheduler, next_token

from tierkv.scheduling import scheduler as scheduling
from tierkv.scheduling.request import Request, RequestState
from tierkv.values.block import Tier

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE = 4
LONG = [[(seed * 131 + i * 17) % 900 for i in range(24)] for seed in range(3)]

# A prompt: the beginning of one of a few long ones, and some tokens of its own, so that prefixes are shared often.
prompts = st.builds(
    lambda which, count, own: LONG[which][:count] + own,
    st.integers(0, 2),
    st.integers(0, 24),
    st.lists(st.integers(900, 905), min_size=1, max_size=5),
)
submissions = st.tuples(
    st.just("submit"),
    prompts,
    st.integers(1, 9),
    st.integers(-1, 2),
    st.booleans(),
    st.integers(0, 5).map(bool),
)
events = st.one_of(
    submissions,
    submissions,
    st.tuples(st.just("step"), st.integers(1, 4)),
    st.tuples(st.just("cancel"), st.integers(0, 30)),
    st.tuples(st.just("preempt"), st.integers(0, 30)),
    st.tuples(st.just("reset")),
    st.tuples(st.just("evict"), st.integers(0, 4)),
)


def answer(request: Request) -> list[int]:
    ids = request.token_ids[: request.prompt_tokens]
    for _ in range(request.max_new_tokens):
        ids.append(next_token(ids))
    return ids[request.prompt_tokens :]


def apply(driver: PatternScheduler, event: tuple, requests: list[Request]) -> None:  # type: ignore[type-arg]
    kind, *values = event
    if kind == "submit":
        token_ids, new, priority, partial, use_cache = values
        requests.append(
            driver.submit(token_ids, new=new, priority=priority, partial=partial and use_cache, use_cache=use_cache)
        )
    elif kind == "step":
        for _ in range(values[0]):
            driver.step()
    elif kind == "reset":
        driver.scheduler.reset()
    elif kind == "evict":
        driver.cache.evict(Tier.HOT, values[0])
    elif requests:
        request = requests[values[0] % len(requests)]
        if kind == "cancel":
            driver.verify([request] if request.state is RequestState.RUNNING else [])
            driver.scheduler.finish(request)
        elif request.state is RequestState.RUNNING:
            driver.scheduler.preempt(request)


@settings(max_examples=60)
@given(
    st.lists(events, min_size=1, max_size=40),
    st.integers(12, 40),
    st.integers(3, 40),
    st.one_of(st.none(), st.integers(1, 5)),
    st.integers(1, 8),
)
def test_every_request_ends_with_its_own_tokens_and_leaves_nothing(
    history: list[tuple],  # type: ignore[type-arg]
    hot: int,
    max_step_tokens: int,
    max_running: int | None,
    decode_step_tokens: int,
) -> None:
    with tempfile.TemporaryDirectory() as folder, open_tiny(Path(folder), hot=hot, warm=16) as cache:
        driver = PatternScheduler(cache, max_step_tokens=max_step_tokens, max_running=max_running)
        driver.scheduler.running.decode_step_tokens = min(decode_step_tokens, max_step_tokens)
        requests: list[Request] = []
        for event in history:
            apply(driver, event, requests)
            driver.scheduler.check()
            assert max_running is None or len(driver.scheduler.running) <= max_running
        driver.run(most_steps=60 * len(requests) + 200)  # every request has its turn
        assert not driver.failed, "each of them fits alone"
        for request in requests:
            assert request.state is RequestState.ENDED and request.sequence is None
            want = answer(request)
            assert request.new_ids == want[: request.num_new]
            assert request.num_new == request.max_new_tokens or request not in driver.ended
        for plan in driver.plans:
            assert sum(count for _, count in plan) <= max_step_tokens
        driver.check_idle()


@settings(max_examples=30)
@given(st.lists(st.integers(-2, 3), min_size=2, max_size=60), st.integers(1, 6), st.integers(1, 3))
def test_no_request_is_overtaken_more_often_than_aging_allows(
    priorities: list[int], aging: int, max_running: int
) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        open_tiny(Path(folder)) as cache,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(scheduling, "AGING", aging)
        driver = PatternScheduler(cache, max_running=max_running)
        requests = []
        for at, priority in enumerate(priorities):
            requests.append(driver.submit([at, at + 1], priority=priority))
            if at % 3 == 0:
                driver.step()
        driver.run()
        place = {id(request): at for at, request in enumerate(driver.ended)}
        for at, request in enumerate(requests):
            later = [each for each in requests[at + 1 :] if place[id(each)] < place[id(request)]]
            most = sum(aging * (request.priority - level) for level in range(-2, request.priority))
            assert len(later) <= most + max_running
