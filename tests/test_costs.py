"""What work costs by its size: drawn between what was measured, and believed less the longer ago that was."""

from __future__ import annotations

import pytest

from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.transfer.recompute_or_load import CostBySize, LoadKind, RecomputeOrLoad


def test_the_cost_of_a_pass_is_drawn_between_what_was_measured() -> None:
    costs = CostBySize()
    assert costs.estimate(100) is None
    costs.add(0, 1.0)
    assert costs.estimate(100) is None
    for seconds in (5.0, 0.03, 0.03):  # the first one compiled something
        costs.add(100, seconds)
    costs.add(1000, 0.12)
    assert costs.estimate(1) == costs.estimate(100) == 0.03
    assert costs.estimate(2000) == 0.24
    middle = costs.estimate(550)
    assert middle is not None and abs(middle - 0.075) < 1e-9


def test_a_cost_is_believed_less_until_it_is_measured_again() -> None:
    costs = CostBySize()
    costs.add(4, 1.0)
    for _ in range(200):
        costs.forget(4)
    forgotten = costs.estimate(4)
    assert forgotten is not None and forgotten < 0.1
    costs.add(4, 1.0)
    assert costs.estimate(4) == 1.0


def test_works_that_are_done_all_the_time_do_not_keep_an_odd_one_of_another_size_believed() -> None:
    costs = CostBySize()
    costs.add(1, 0.001)
    costs.add(64, 5.0)  # something else kept the disk busy
    for _ in range(300):
        costs.forget(64)
        costs.add(1, 0.001)
    forgotten, larger = costs.estimate(64), costs.estimate(200)
    assert forgotten is not None and forgotten < 0.02
    assert larger is not None and larger > 5.0, "a size that nobody asked about is forgotten by nobody"


def test_what_was_measured_long_ago_is_forgotten() -> None:
    """A disk that was slow and is fast now, or the other way round, is believed after a few measurements."""
    costs = CostBySize()
    for seconds, num_works in ((9.0, 100), (0.5, 5), (4.0, 5)):
        for _ in range(num_works):
            costs.add(10, seconds)
        assert costs.estimate(10) == seconds


def test_a_remote_tier_is_asked_until_loading_and_computing_are_measured_and_loading_takes_longer() -> None:
    choice = RecomputeOrLoad(block_size=4, piece_tokens=40)
    alone = LoadKind(in_memory=False, is_remote=True)
    assert choice.is_worth_asking(10, 2)
    choice.pass_costs.add(42, 1.0)
    choice.pass_costs.add(2, 0.1)
    assert choice.is_worth_asking(10, 2)
    choice.load_costs[alone].add(10, 0.8)
    assert choice.is_worth_asking(10, 2)
    choice.load_costs[alone].add(10, 0.95)
    choice.load_costs[alone].add(10, 0.95)
    assert not choice.is_worth_asking(10, 2)
    assert choice.is_worth_asking(11, 2), "both at once is not measured yet"
    choice.load_costs[alone._replace(overlaps=True)].add(11, 2.0)
    assert not choice.is_worth_asking(11, 2)
    assert sum(not choice.is_worth_asking(10, 2) for _ in range(100)) < 10, "what is not tried is believed less"


def test_of_two_passes_the_one_that_compiled_a_kernel_does_not_count_but_of_two_loads_the_slow_one_does() -> None:
    choice = RecomputeOrLoad(block_size=256, piece_tokens=256)
    for costs, expected in ((choice.pass_costs, 0.016), (choice.load_costs[LoadKind(in_memory=False)], 0.858)):
        for seconds in (0.016, 1.7):
            costs.add(512, seconds)
        assert costs.estimate(512) == pytest.approx(expected)
    store = LoadOrCompute(block_size=256)
    for seconds in (0.016, 1.7):
        store.record_compute(512, seconds)
        store.record_load(2, origin=Origin.DISK, seconds=seconds)
    assert store.compute_s(512) == 0.016 and store.load_s(2, origin=Origin.DISK) == pytest.approx(0.858)
