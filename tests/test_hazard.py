"""How often blocks are used again, by idle time, and what keeping them is worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.errors import ConfigError
from tierkv.policies.density import hazards, hit_densities
from tierkv.policies.idle_buckets import NUM_BUCKETS, bucket_of, buckets_of
from tierkv.policies.use_history import UseHistory, smoothed_gap
from tierkv.values.prefill import MEASURED_PREFILL, PrefillModel


@given(st.floats(0, 1e9))
def test_one_idle_time_and_many_fall_into_the_same_buckets(idle_s: float) -> None:
    nearby = {int(buckets_of(np.array([idle_s * factor]))[0]) for factor in (1 - 1e-12, 1.0, 1 + 1e-12)}
    assert bucket_of(idle_s) in nearby


def test_a_bucket_is_half_an_octave() -> None:
    assert [bucket_of(idle_s) for idle_s in (0.0, 1.0, 1.5, 2.0, 4.0)] == [0, 9, 10, 11, 13]
    assert bucket_of(1e12) == NUM_BUCKETS - 1
    assert bucket_of(-1.0) == bucket_of(float("-inf")) == 0


def row(counts: dict[int, float]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    values = np.zeros((1, NUM_BUCKETS))
    for bucket, number in counts.items():
        values[0, bucket] = number
    return values


def test_a_hazard_is_the_share_of_those_that_are_still_waiting() -> None:
    chances = hazards(row({3: 50, 5: 25}), row({NUM_BUCKETS - 1: 25}), weight=1e-9, default=0.5)[0]
    assert chances[[3, 4, 5]] == pytest.approx([0.5, 0.0, 0.5], abs=1e-6)


def test_what_is_still_idle_says_nothing_of_later_times() -> None:
    chances = hazards(row({5: 10}), row({3: 1000, NUM_BUCKETS - 1: 10}), weight=1e-9, default=0.5)[0]
    assert chances[5] == pytest.approx(0.5, abs=1e-3)


def test_a_kind_without_evidence_behaves_as_all_kinds_together() -> None:
    used = np.concatenate([row({3: 1000}), row({})])
    unused = np.concatenate([row({NUM_BUCKETS - 1: 1000}), row({})])
    chances = hazards(used, unused, weight=10.0, default=0.04)
    assert chances[1] == pytest.approx(chances[0], abs=0.01)


def test_a_kind_without_evidence_is_believed_to_differ_from_others_as_it_was_said() -> None:
    used = np.concatenate([row({3: 1000}), row({}), row({})])
    unused = np.concatenate([row({NUM_BUCKETS - 1: 9000}), row({}), row({})])
    belief = np.array([[1.0], [0.5], [2.0]])
    chances = hazards(used, unused, weight=10.0, default=0.04, belief=belief)
    assert chances[1, 3] == pytest.approx(chances[0, 3] / 2, rel=0.02)
    assert chances[2, 3] == pytest.approx(chances[0, 3] * 2, rel=0.02)
    certain = hazards(row({3: 1000}), row({}), weight=10.0, default=0.04, belief=5.0)
    assert certain.max() < 1, "a chance of 1 would make what follows worth nothing"


@given(st.floats(0.01, 1e5), st.floats(0.01, 1e5), st.integers(1, 15))
def test_many_equal_gaps_at_once_are_averaged_as_one_after_the_other(before_s: float, gap_s: float, many: int) -> None:
    one_by_one = before_s
    for _ in range(many):
        one_by_one = smoothed_gap(one_by_one, gap_s, 1)
    assert smoothed_gap(before_s, gap_s, many) == pytest.approx(one_by_one)
    assert smoothed_gap(before_s, gap_s, 10_000) == pytest.approx(gap_s, abs=0.01 * abs(before_s - gap_s))


def test_the_first_gap_is_taken_as_it_is() -> None:
    assert smoothed_gap(0.0, 7.0, 1) == 7.0


def test_the_same_chance_for_each_half_octave_makes_density_fall_with_idle_time() -> None:
    densities = hit_densities(np.full((1, NUM_BUCKETS), 0.04))[0]
    assert densities[0] == densities[1]  # the first two are less than an instant apart
    assert (np.diff(densities)[1:] < 0).all()


def test_density_counts_hits_by_the_second_up_to_the_best_stop() -> None:
    chances = np.full((1, NUM_BUCKETS), 1e-9)
    chances[0, 20] = 0.5  # 45.25 to 64 s
    start = 2.0**5.5
    expected = 0.5 / (0.75 * (64 - start))
    assert hit_densities(chances)[0, 20] == pytest.approx(expected, rel=1e-6)
    waiting = 2.0**5.5 - 2.0**5
    assert hit_densities(chances)[0, 19] == pytest.approx(0.5 / (waiting + 0.75 * (64 - start)), rel=1e-6)


def test_seconds_of_prefill_are_the_sum_over_the_tokens() -> None:
    model = PrefillModel(token_s=1.0, context_s=0.5)
    assert model.seconds(10, 3) == pytest.approx(sum(1 + 0.5 * before for before in (10, 11, 12)))
    assert model.seconds(0, 7) + model.seconds(7, 5) == pytest.approx(model.seconds(0, 12))


def test_a_fit_finds_the_model_that_was_measured() -> None:
    lengths = [512, 4096, 32768]
    found = PrefillModel.fit(lengths, [MEASURED_PREFILL.seconds(0, length) for length in lengths])
    assert found.token_s == pytest.approx(MEASURED_PREFILL.token_s)
    assert found.context_s == pytest.approx(MEASURED_PREFILL.context_s)


def test_the_measured_model_is_the_fit_of_the_published_measurements() -> None:
    fit = PrefillModel.fit([1024, 8192, 32768], [0.0349946, 0.2781182, 1.6642530])
    assert fit.token_s == pytest.approx(MEASURED_PREFILL.token_s, rel=0.01)
    assert fit.context_s == pytest.approx(MEASURED_PREFILL.context_s, rel=0.01)


def test_tokens_that_become_cheaper_with_length_are_taken_as_equal() -> None:
    assert PrefillModel.fit([100, 1000], [1.0, 5.0]) == PrefillModel(token_s=0.0075, context_s=0.0)


@pytest.mark.parametrize(("lengths", "seconds"), [([10], [1.0]), ([10, 20], [1.0, 0.0])])
def test_measurements_that_make_no_model_are_refused(lengths: list[int], seconds: list[float]) -> None:
    with pytest.raises(ConfigError):
        PrefillModel.fit(lengths, seconds)


def test_tokens_that_cost_nothing_are_refused() -> None:
    with pytest.raises(ConfigError):
        PrefillModel(token_s=0.0, context_s=1.0)


def test_a_row_is_taken_over_by_a_later_block_and_then_not_mistaken_for_the_first() -> None:
    history = UseHistory(1)
    row, tag = history.row_of(b"a" * 16)
    history.tags[row] = tag
    assert history.find(b"a" * 16) == row == 0
    assert history.find(b"b" * 16) is None
    assert len(history) == 1
