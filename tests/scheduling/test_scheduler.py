"""The scheduler: who runs, who waits for whom, who makes room; with patterns in place of a model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pattern_engine import open_tiny
from pattern_scheduler import PatternScheduler, next_token

from tierkv.cache import TierCache
from tierkv.errors import CapacityError
from tierkv.requests.batching import Batching
from tierkv.scheduling import scheduler as scheduling
from tierkv.scheduling.request import RequestState
from tierkv.values.block import Tier

SIZE = 4
Make = Callable[..., PatternScheduler]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    caches: list[TierCache] = []

    def make_one(hot: int = 64, **options: Any) -> PatternScheduler:
        caches.append(open_tiny(tmp_path / str(len(caches)), hot=hot))
        return PatternScheduler(caches[-1], **options)

    yield make_one
    for cache in caches:
        cache.close()


def prompt(count: int, seed: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 1000 for i in range(count)]


def answer(token_ids: list[int], count: int) -> list[int]:
    ids = list(token_ids)
    for _ in range(count):
        ids.append(next_token(ids))
    return ids[len(token_ids) :]


def test_requests_get_their_tokens_whatever_their_sizes(make: Make) -> None:
    driver = make(max_step_tokens=7)
    requests = [driver.submit(prompt(n, seed=n), new=n % 5 + 1) for n in (1, 3, 4, 9, 16, 17)]
    driver.run()
    for request in requests:
        assert request.new_ids == answer(request.token_ids[: request.prompt_tokens], request.max_new_tokens)
    driver.check_idle()


def test_more_urgent_requests_start_first_and_equal_ones_in_the_order_of_their_arrival(make: Make) -> None:
    driver = make(max_running=1)
    requests = {
        name: driver.submit(prompt(5, seed), priority=p)
        for seed, (name, p) in enumerate([("first", 0), ("late", 2), ("second", 0), ("urgent", -1), ("later", 2)])
    }
    driver.run()
    assert [name for each in driver.ended for name, r in requests.items() if r is each] == [
        *("urgent", "first", "second", "late", "later")
    ]


def test_a_less_urgent_request_is_overtaken_a_bounded_number_of_times(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "AGING", 8)
    driver = make(max_running=1)
    driver.submit(prompt(5, 1))
    low = driver.submit(prompt(5, 2), priority=2)
    for seed in range(3, 60):
        driver.submit(prompt(5, seed))
        driver.step()
    driver.run()
    assert 10 < driver.ended.index(low) <= 2 * 8 + 2


def test_a_prefix_that_a_running_request_computes_is_waited_for_and_computed_once(make: Make) -> None:
    driver = make(max_step_tokens=8)
    shared = prompt(32, 1)
    first = driver.submit(shared + prompt(3, 2), new=2)
    driver.step()
    followers = [driver.submit(shared + prompt(3, 10 + i), new=2) for i in range(5)]
    other = driver.submit(prompt(5, 99))
    driver.step()
    assert driver.scheduler.num_following == 5, "they wait for it, and hold nothing"
    assert other.state is not RequestState.WAITING, "and nothing else waits for them"
    assert all(each.sequence is None for each in followers)
    driver.run()
    assert driver.computed == 32 + 6 * 3 + 6 + 5
    assert [each.new_ids for each in (first, *followers)] == [
        answer(each.token_ids[:35], 2) for each in (first, *followers)
    ]
    driver.check_idle()


def test_requests_that_wait_for_a_prefix_start_together_once_it_is_there(make: Make) -> None:
    driver = make(max_step_tokens=256)
    shared = prompt(16, 1)
    requests = [driver.submit(shared + prompt(2, 10 + i), new=3) for i in range(6)]
    driver.step()
    assert [each for each, _ in driver.plans[-1]] == requests[:1]
    driver.step()
    assert {each for each, _ in driver.plans[-1]} == set(requests)


@pytest.mark.parametrize("new", [1, 9], ids=["it has just ended", "it still runs"])
def test_the_partly_filled_end_of_a_common_prefix_is_copied(make: Make, new: int) -> None:
    driver = make()
    shared = prompt(4 * SIZE + 2, 1)
    requests = [driver.submit([*shared, 500 + i], new=new) for i in range(4)]  # none of them fills the block
    requests.append(driver.submit(list(shared), new=new))  # all of it but the last token
    driver.run()
    assert driver.computed == len(shared) + 4 + 1 + 5 * (new - 1)
    assert requests[1].cached_tokens is not None and sum(requests[1].cached_tokens.values()) == len(shared)
    driver.check_idle()


def test_a_partly_filled_end_is_there_as_soon_as_it_is_computed(make: Make) -> None:
    driver = make(max_step_tokens=8)
    shared = prompt(2 * SIZE + 1, 1)
    driver.submit(shared, new=30)
    follower = driver.submit([*shared, 500], new=2)
    while driver.scheduler.num_following or follower.state is RequestState.WAITING:
        driver.step()
    assert len(driver.plans) == 3, "a piece, the rest, and then both"
    assert follower.cached_tokens is not None and sum(follower.cached_tokens.values()) == len(shared)
    driver.run()
    driver.check_idle()


@pytest.mark.parametrize("how", ["dropped", "preempted", "an error"])
def test_requests_that_wait_for_a_prefix_go_on_when_its_owner_goes(make: Make, how: str) -> None:
    driver = make(max_step_tokens=8)
    shared = prompt(40, 1)
    owner = driver.submit([*shared, 1], new=2)
    followers = [driver.submit([*shared, 10 + i], new=2) for i in range(3)]
    driver.step()
    driver.step()
    assert driver.scheduler.num_following == 3
    if how == "dropped":
        driver.scheduler.drop(owner)
    elif how == "preempted":
        driver.scheduler.preempt(owner)
    else:
        driver.scheduler.reset()
    driver.run()
    ended = followers if how == "dropped" else [owner, *followers]
    assert set(driver.ended) == set(ended)
    assert driver.computed <= 40 + 4 + 4 + 8, "what was committed is not computed again"
    driver.check_idle()


def test_a_request_that_waits_for_a_prefix_can_be_dropped(make: Make) -> None:
    driver = make(max_step_tokens=8)
    shared = prompt(40, 1)
    owner = driver.submit([*shared, 1])
    followers = [driver.submit([*shared, 10 + i]) for i in range(3)]
    driver.step()
    for each in followers[:2]:
        driver.scheduler.drop(each)
        driver.scheduler.drop(each)
    driver.run()
    assert driver.ended == [owner, followers[2]]
    driver.check_idle()


def test_an_urgent_request_that_waits_for_a_prefix_makes_its_owner_urgent(make: Make) -> None:
    driver = make(max_step_tokens=8)
    shared = prompt(40, 1)
    between = driver.submit(prompt(40, 2))
    owner = driver.submit([*shared, 1], priority=1)
    driver.step()
    urgent = driver.submit([*shared, 2], priority=-1)
    driver.run()
    assert driver.ended.index(owner) < driver.ended.index(between)
    assert driver.ended.index(urgent) < driver.ended.index(between)


def test_without_room_for_new_tokens_the_least_urgent_request_waits_again_and_loses_none(make: Make) -> None:
    driver = make(hot=8)
    requests = [driver.submit(prompt(2 * SIZE, seed), new=2 * SIZE, priority=seed) for seed in range(3)]
    driver.run()
    assert driver.scheduler.num_preempted > 0
    assert requests[0].num_preemptions == 0 and requests[2].num_preemptions > 0
    for each in requests:
        assert each.new_ids == answer(each.token_ids[: 2 * SIZE], 2 * SIZE)
    driver.check_idle()


def test_a_preempted_request_goes_on_with_its_partial_block_from_the_warm_tier(make: Make) -> None:
    driver = make(hot=16)
    request = driver.submit(prompt(3 * SIZE + 2, 1), new=8)
    driver.step()
    driver.step()
    computed = driver.computed
    driver.scheduler.preempt(request)
    driver.cache.flush()
    driver.cache.evict(Tier.HOT)
    driver.run()
    assert driver.computed == computed + 7 - 1, "nothing was computed again"
    assert request.new_ids == answer(request.token_ids[: request.prompt_tokens], 8)
    driver.check_idle()


def test_an_urgent_request_takes_the_room_of_less_urgent_ones(make: Make) -> None:
    driver = make(hot=10)
    low = [driver.submit(prompt(3 * SIZE, seed), new=4, priority=1) for seed in range(3)]
    driver.step()
    urgent = driver.submit(prompt(4 * SIZE, 9), new=2)
    driver.run()
    assert driver.ended[0] is urgent
    assert any(each.num_preemptions for each in low) and urgent.num_preemptions == 0
    for each in low:
        assert each.new_ids == answer(each.token_ids[: 3 * SIZE], 4)
    driver.check_idle()


def test_blocks_that_a_running_request_uses_need_no_more_room(make: Make) -> None:
    driver = make(hot=10)
    shared = prompt(6 * SIZE, 1)
    requests = [driver.submit([*shared, i], new=3) for i in range(3)]
    for _ in range(2):
        driver.step()
    assert len(driver.scheduler.running) == 2, "seven blocks of the first, one of the second, one for each to grow"
    driver.run()
    assert driver.ended == requests and driver.scheduler.num_preempted == 0
    driver.check_idle()


def test_nothing_is_preempted_in_vain(make: Make) -> None:
    driver = make(hot=10)
    pinned = driver.cache.acquire(prompt(4 * SIZE, 50))  # the caller's own
    low = driver.submit(prompt(2 * SIZE, 1), new=4, priority=1)
    driver.step()
    urgent = driver.submit(prompt(8 * SIZE, 9), new=2)
    for _ in range(2):
        driver.step()
    assert low.num_preemptions == 0 and urgent.state is RequestState.WAITING
    driver.cache.release(pinned)
    driver.run()
    driver.check_idle()


def test_a_request_for_which_there_is_no_room_fails_alone(make: Make) -> None:
    driver = make(hot=8)
    held = driver.cache.acquire(prompt(5 * SIZE, 50))
    big, small = driver.submit(prompt(6 * SIZE, 1)), driver.submit(prompt(SIZE, 2), new=3)
    driver.run()
    assert [(each, type(error)) for each, error in driver.failed] == [(big, CapacityError)]
    assert driver.ended == [small]
    driver.cache.release(held)
    driver.check_idle()


def test_decoding_sequences_get_a_token_in_every_step_beside_a_long_prompt(make: Make) -> None:
    driver = make(max_step_tokens=64)
    driver.scheduler.running.decode_step_tokens = 6
    decoding = [driver.submit(prompt(5, seed), new=12) for seed in range(3)]
    driver.step()
    driver.submit(prompt(60, 9))
    for _ in range(8):
        driver.step()
        plan = dict(driver.plans[-1])
        assert all(plan[each] == 1 for each in decoding)
        assert sum(plan.values()) <= 3 + 6
    driver.run()
    driver.check_idle()


@pytest.mark.parametrize("size", [1, 30])
def test_a_burst_of_requests_does_not_start_at_once_beside_decoding_sequences(make: Make, size: int) -> None:
    driver = make(hot=1000, max_step_tokens=256)
    driver.scheduler.running.decode_step_tokens = 40
    decoding = driver.submit(prompt(5, 999), new=200)
    driver.step()
    for seed in range(100):
        driver.submit(prompt(size, seed), new=2)
    starts = []
    while driver.scheduler.num_waiting:
        before = driver.scheduler.num_waiting
        driver.step()
        starts.append(before - driver.scheduler.num_waiting)
    assert max(starts) == (16 if size == 1 else 2), "what fills a pass, and few at once"
    assert decoding.num_new > len(starts)
    driver.run()
    for seed in range(100):
        driver.submit(prompt(size, 1000 + seed))
    driver.step()
    assert not driver.scheduler.num_waiting, "without decoding sequences all start at once"
    driver.run()
    driver.check_idle()


def test_more_decoding_sequences_than_a_step_takes_have_their_turns(make: Make) -> None:
    driver = make(max_step_tokens=3)
    requests = [driver.submit(prompt(2, seed), new=10) for seed in range(7)]
    driver.run()
    assert max(driver.ended.index(each) for each in requests) == 6
    assert len(driver.plans) < 7 * 10
    driver.check_idle()


def test_requests_that_use_no_cache_share_nothing(make: Make) -> None:
    driver = make()
    for _ in range(3):
        driver.submit(prompt(17, 1), use_cache=False)
    driver.run()
    assert driver.computed == 3 * 17
    assert driver.cache.match(prompt(17, 1)).num_cached_tokens == 0


class Elsewhere:
    """Another process that computes a prompt's blocks, block by block."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num_tokens: int | None = 0
        self.num_questions = 0
        monkeypatch.setattr(Batching, "has_other_processes", True)
        monkeypatch.setattr(Batching, "computed_elsewhere", self.ask)

    def ask(self, token_ids: list[int]) -> int | None:
        self.num_questions += 1
        return self.num_tokens


def test_a_prefix_that_another_process_computes_is_waited_for_and_nothing_else_is(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = make()
    elsewhere = Elsewhere(monkeypatch)
    shared = prompt(32, 1)
    waiting = [driver.submit([*shared, i], new=2) for i in range(20)]
    driver.step()
    assert driver.scheduler.num_following == 20 and elsewhere.num_questions == 1, "one asks for all"
    elsewhere.num_tokens = 16
    for _ in range(10):
        driver.step()
    assert elsewhere.num_questions <= 12 and not driver.ended
    elsewhere.num_tokens = None
    driver.run()
    assert driver.computed == 32 + 20 * 2
    assert len(driver.ended) == len(waiting)
    driver.check_idle()


def test_another_process_is_waited_for_no_longer_than_the_limit(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make()
    Elsewhere(monkeypatch)
    request = driver.submit(prompt(32, 1))
    while not driver.ended:
        driver.step()
    assert driver.now == pytest.approx(driver.cache.config.compute_wait_s, abs=0.1)
    assert driver.ended == [request]
    driver.check_idle()


def test_a_request_that_waits_for_another_process_can_be_dropped(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make()
    elsewhere = Elsewhere(monkeypatch)
    first, second = driver.submit(prompt(32, 1)), driver.submit(prompt(32, 1))
    driver.step()
    driver.scheduler.drop(first)
    elsewhere.num_tokens = None
    driver.run()
    assert driver.ended == [second]
    driver.check_idle()


def count_calls(call: Callable[[], object]) -> int:
    """Return how many functions the scheduler's own code calls in a call, Python's and C's."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call") and "scheduling" in frame.f_code.co_filename

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count


def most_calls_of_a_step(driver: PatternScheduler, kind: str, num_waiting: int) -> int:
    shared = prompt(64, 1)
    driver.submit(prompt(5, 9999), new=400)
    driver.step()
    for i in range(num_waiting):
        own = {"equal prompts": shared, "one prefix": [*shared, i, i + 1], "unlike prompts": prompt(66, i)}
        driver.submit(own[kind], new=20)
    costs = []
    for _ in range(150):
        costs.append(count_calls(driver.scheduler.admit))
        driver.step()
    assert driver.ended
    return max(costs)


@pytest.mark.parametrize("kind", ["equal prompts", "one prefix", "unlike prompts"])
def test_a_step_costs_no_more_if_more_requests_wait(make: Make, kind: str) -> None:
    few, many = (most_calls_of_a_step(make(hot=200, max_running=4, max_step_tokens=8), kind, n) for n in (128, 4096))
    assert many < 1.1 * few + 50


def test_ended_requests_leave_the_queue_although_none_starts(make: Make) -> None:
    driver = make(max_running=1)
    driver.submit(prompt(5, 1), new=200)
    driver.submit(prompt(5, 2), new=1)  # the first of the queue: those behind it are not looked at
    driver.step()
    for i in range(5000):
        driver.scheduler.drop(driver.submit(prompt(5, i)))
        if not i % 100:
            driver.step()
    assert sum(len(run) for _, run in driver.scheduler._waiting._heap) < 200


def test_an_error_while_a_request_starts_leaves_it_in_the_queue(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make()
    request = driver.submit(prompt(9, 1))
    with monkeypatch.context() as patch:
        patch.setattr(driver.scheduler, "_share", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            driver.step()
    assert request.sequence is None
    driver.cache.check()
    driver.run()
    assert driver.ended == [request]
    driver.check_idle()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_request_that_cannot_be_acquired_fails_alone(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = make()
    acquire = driver.cache.acquire

    def fail_some(token_ids: list[int], **options: Any) -> Any:
        if token_ids[0] == 77:
            raise MemoryError("no")
        return acquire(token_ids, **options)

    monkeypatch.setattr(driver.cache, "acquire", fail_some)
    good, bad = driver.submit(prompt(9, 1), new=3), driver.submit([77, 1, 2])
    driver.run()
    assert driver.ended == [good] and [each for each, _ in driver.failed] == [bad]
    driver.check_idle()
