"""Plans for blocks that change places: everyone arrives, nobody is overwritten."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tierkv.requests.defragment import Shift, count_breaks, plan_places, plan_shifts


def carry_out(pool: list[str], shifts: list[Shift]) -> list[str]:
    """Shift blocks, named by letters; a place that is free is an empty string."""
    after = list(pool)
    for source, target in shifts:
        assert after[source] and not after[target], "a shift takes a block to a free place"
        after[source], after[target] = "", after[source]
    return after


def test_blocks_are_laid_in_order_and_step_over_those_that_stay() -> None:
    assert plan_places([5, 0, 3], fixed=[1], capacity=6) == {5: 0, 0: 2}


def test_what_lies_in_order_is_not_moved() -> None:
    assert plan_places([0, 1, 2], fixed=[], capacity=4) == {}


def test_blocks_that_change_places_go_by_way_of_a_free_one() -> None:
    shifts = list(plan_shifts({0: 1, 1: 0}, spare=2))
    assert carry_out(["a", "b", ""], shifts) == ["b", "a", ""]


def test_without_a_free_place_circles_stay_as_they_are() -> None:
    assert list(plan_shifts({0: 1, 1: 0}, spare=None)) == []


def test_a_break_is_counted_where_a_block_does_not_follow_the_one_before() -> None:
    assert count_breaks([3, 4, 7, 0]) == 2
    assert count_breaks([3, 4, 7, 0], {3: 0, 4: 1, 7: 2, 0: 3}) == 0


@given(data=st.data(), capacity=st.integers(2, 12))
def test_every_plan_brings_every_block_to_its_place(data: st.DataObject, capacity: int) -> None:
    used = data.draw(st.sets(st.integers(0, capacity - 1), max_size=capacity - 1))
    fixed = data.draw(st.sets(st.sampled_from(sorted(used)))) if used else set()
    order = data.draw(st.permutations(sorted(used - fixed)))
    pool = [chr(97 + place) if place in used else "" for place in range(capacity)]
    places = plan_places(order, fixed, capacity)
    final = fixed | {places.get(place, place) for place in order}
    spare = next(place for place in range(capacity) if place not in final)
    after = carry_out(pool, list(plan_shifts(places, spare)))
    assert [name for place, name in enumerate(after) if name and place not in fixed] == [pool[place] for place in order]
    assert all(after[place] == pool[place] for place in fixed)
