"""A scheduler over a daemon: it waits for a prefix that another process computes, and goes on with everything else."""

from __future__ import annotations

import time

import pytest
from daemon_process import OpenCache, Start
from pattern_engine import PatternEngine
from pattern_scheduler import PatternScheduler

from tierkv.scheduling.request import RequestState
from tierkv.values.block import Tier

PROMPT = list(range(33))


def test_a_prefix_of_another_process_is_waited_for_while_others_decode(
    start_daemon: Start, open_cache: OpenCache
) -> None:
    daemon = start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=30.0)
    sequence = first.acquire(PROMPT)
    driver = PatternScheduler(second)
    driver.engine = PatternEngine(second)
    other = driver.submit(list(range(500, 509)), new=200)  # it has a claim of its own
    driver.step()
    requests = [driver.submit([*PROMPT, 90 + i], new=2) for i in range(4)]
    started = time.monotonic()
    for _ in range(20):
        driver.step()
    assert time.monotonic() - started < 10, "no step waits for the other process"
    assert other.num_new == 21
    assert all(each.state is RequestState.WAITING for each in requests)
    assert driver.scheduler.num_following == 4
    PatternEngine(first).compute(sequence, 0)
    first.commit(sequence, len(PROMPT))
    first.release(sequence)
    first.flush()
    computed = driver.computed
    driver.run()
    assert driver.computed - computed <= 200 - 21 + 4 * (2 + 1), "of the prefix nothing was computed again"
    assert requests[0].cached_tokens is not None and requests[0].cached_tokens[Tier.WARM] == 32
    driver.check_idle()
    second.flush()
    assert daemon.status().claims == 0


def test_a_prefix_whose_process_ends_is_computed_here(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=30.0)
    sequence = first.acquire(PROMPT)
    driver = PatternScheduler(second)
    request = driver.submit(PROMPT)
    for _ in range(3):
        driver.step()
    assert request.state is RequestState.WAITING
    first.release(sequence)
    driver.run()
    assert driver.computed == len(PROMPT)
    driver.check_idle()


@pytest.mark.parametrize("wait_s", [0.0, 0.05])
def test_the_wait_for_another_process_has_its_limit(start_daemon: Start, open_cache: OpenCache, wait_s: float) -> None:
    start_daemon()
    first, second = open_cache(compute_wait_s=30.0), open_cache(compute_wait_s=wait_s)
    sequence = first.acquire(PROMPT)
    driver = PatternScheduler(second)
    started = time.monotonic()
    driver.submit(PROMPT)
    driver.run()
    assert time.monotonic() - started < 10
    assert driver.computed == len(PROMPT)
    assert second._daemon is not None and second._daemon.blocks.num_waits == 0, "no step has waited in a call"
    first.release(sequence)


def test_two_processes_that_wait_for_each_other_both_end(start_daemon: Start, open_cache: OpenCache) -> None:
    start_daemon()
    drivers = [PatternScheduler(open_cache(compute_wait_s=30.0), max_step_tokens=4) for _ in range(2)]
    mine, yours = PROMPT, PROMPT[::-1]
    for driver, own, other in ((drivers[0], mine, yours), (drivers[1], yours, mine)):
        driver.submit([*own, 7])
        driver.step()
        driver.submit([*other, 8])
    started = time.monotonic()
    while any(driver.scheduler.has_work for driver in drivers):
        assert time.monotonic() - started < 20
        for driver in drivers:
            if driver.scheduler.has_work:
                driver.step()
                driver.cache.flush()
    assert sum(driver.computed for driver in drivers) <= 2 * len(PROMPT) + 2 * 2 + 4
