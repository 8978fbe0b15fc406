"""Load or compute: what was measured decides, and a wait is given up when computing the rest is faster."""

from __future__ import annotations

import pytest

from tierkv import ConfigError, LoadOrCompute


def test_blocks_are_loaded_until_both_ways_are_measured() -> None:
    choice = LoadOrCompute(block_size=256)
    assert choice.worth_loading(32, in_memory=False, num_rest_tokens=32) == 32
    choice.record_load(32, in_memory=False, seconds=9.0)
    assert choice.worth_loading(32, in_memory=False, num_rest_tokens=32) == 32
    choice.record_compute(8192, 0.2)
    assert choice.worth_loading(32, in_memory=False, num_rest_tokens=32) == 0
    assert choice.worth_loading(32, in_memory=True, num_rest_tokens=32) == 32, "another kind of load"
    assert choice.worth_loading(0, in_memory=True, num_rest_tokens=32) == 0


def test_the_way_that_is_not_chosen_is_tried_again() -> None:
    choice = LoadOrCompute(block_size=256)
    choice.record_compute(8192, 0.2)
    choice.record_load(32, in_memory=False, seconds=0.3)
    asked = 0
    while not choice.worth_loading(32, in_memory=False, num_rest_tokens=32):
        asked += 1
        assert asked < 60
    assert asked > 5
    choice.record_load(32, in_memory=False, seconds=0.3)
    assert not choice.worth_loading(32, in_memory=False, num_rest_tokens=32), "it was measured anew"


@pytest.mark.parametrize(
    ("num_left", "num_read", "waited_s", "is_worth"),
    [(32, 0, 0.05, True), (32, 0, 0.11, False), (24, 8, 0.045, True), (24, 8, 0.07, False), (1, 31, 5.0, False)],
)
def test_a_wait_is_worth_it_as_long_as_the_rest_comes_sooner_than_it_can_be_computed(
    num_left: int, num_read: int, waited_s: float, is_worth: bool
) -> None:
    choice = LoadOrCompute(block_size=256)
    assert choice.worth_waiting(num_left, num_read=num_read, waited_s=waited_s), "nothing is measured"
    choice.record_compute(8192, 0.2)
    assert choice.worth_waiting(num_left, num_read=num_read, waited_s=waited_s) == is_worth


@pytest.mark.parametrize("seconds", [float("nan"), -1.0, float("inf"), True])
def test_nonsense_is_refused(seconds: float) -> None:
    choice = LoadOrCompute(block_size=256)
    with pytest.raises(ConfigError):
        choice.record_compute(1, seconds)
    with pytest.raises(ConfigError):
        choice.record_load(1, in_memory=True, seconds=seconds)
