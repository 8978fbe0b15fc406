"""Two sides work towards each other: every block is one side's, whoever is faster and whatever fails."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from tierkv.transfer.overlapped_load import BlockDivision


@given(
    num_blocks=st.integers(0, 40),
    turns=st.lists(st.tuples(st.sampled_from(["claim", "load", "compute"]), st.integers(1, 5)), max_size=120),
    fails_at=st.none() | st.integers(0, 39),
)
def test_every_block_is_computed_or_loaded_and_none_twice(
    num_blocks: int, turns: list[tuple[str, int]], fails_at: int | None
) -> None:
    division = BlockDivision(num_blocks)
    claimed: list[int] = []
    loaded: list[int] = []
    computed = 0
    for turn, count in turns:
        if turn == "compute":
            computed += division.claim_compute(count)
        elif turn == "claim":
            block = division.claim_load()
            claimed += [] if block is None else [block]
        elif claimed:
            block = claimed.pop(0)
            if block == fails_at:
                break
            if division.note_loaded(block):
                loaded.append(block)
    division.end_loading()
    computed += division.claim_compute(num_blocks)
    assert sorted([*range(computed), *loaded]) == list(range(num_blocks))
    assert division.first_loaded == computed == division.num_computed
    assert division.claim_load() is None and not division.claim_compute(1)


def each(seconds: float) -> Callable[[int], float | None]:
    return lambda count: count * seconds


def test_the_engine_gets_what_it_computes_before_the_loader_is_through_with_the_rest() -> None:
    assert BlockDivision(32).next_piece(compute_s=each(1.0), load_s=3.0, most=100) == 24
    assert BlockDivision(32).next_piece(compute_s=each(3.0), load_s=1.0, most=100) == 8
    assert BlockDivision(32).next_piece(compute_s=each(1.0), load_s=1.0, most=8) == 8


def test_a_pass_that_costs_the_same_whatever_its_size_is_only_worth_it_where_the_load_takes_longer() -> None:
    assert BlockDivision(32).next_piece(compute_s=lambda _: 40.0, load_s=1.0, most=8) == 0
    assert BlockDivision(32).next_piece(compute_s=lambda _: 20.0, load_s=1.0, most=32) == 12


def test_a_load_that_is_much_faster_is_waited_for() -> None:
    assert BlockDivision(32).next_piece(compute_s=each(100.0), load_s=1.0, most=8) == 0


def test_before_anything_is_measured_the_engine_takes_a_whole_piece() -> None:
    assert BlockDivision(32).next_piece(compute_s=lambda _: None, load_s=1.0, most=8) == 8


def test_blocks_that_load_too_slowly_are_computed_although_the_loader_has_claimed_them() -> None:
    division = BlockDivision(4)
    while division.claim_load() is not None:
        pass
    assert division.note_loaded(3)
    assert division.next_piece(compute_s=each(1.0), load_s=2.0, most=8) == 2
    assert division.note_loaded(2)
    assert not division.note_loaded(1), "what has been computed is not loaded any more"
    assert division.first_loaded == division.num_computed == 2


def test_the_last_blocks_are_computed_too_where_that_is_faster_than_waiting_for_them() -> None:
    division = BlockDivision(1)
    assert division.claim_load() == 0
    assert division.next_piece(compute_s=each(1.0), load_s=2.0, most=8) == 1
    assert not division.note_loaded(0)


def test_a_block_that_was_announced_and_did_not_arrive_is_computed() -> None:
    division = BlockDivision(4)
    assert [division.claim_load() for _ in range(3)] == [3, 2, 1]
    assert division.note_loaded(3) and division.note_loaded(2)
    division.end_loading(3)
    assert division.claim_compute(4) == 3
    assert division.first_loaded == 3
