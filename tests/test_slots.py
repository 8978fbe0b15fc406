from __future__ import annotations

import pytest

from tierkv.errors import CapacityError
from tierkv.index.slots import SlotPool


def test_allocation_takes_all_or_nothing() -> None:
    pool: SlotPool[str] = SlotPool(3)
    pool.allocate(2)
    with pytest.raises(CapacityError):
        pool.allocate(2)
    assert pool.free_count == 1
    pool.check()


def test_what_is_allocated_together_lies_together() -> None:
    pool: SlotPool[str] = SlotPool(8)
    first = pool.allocate(4)
    for slot in first:
        pool.unpin(slot)
    assert pool.allocate(4) == [0, 1, 2, 3]


def test_an_owned_place_survives_its_last_user() -> None:
    pool: SlotPool[str] = SlotPool(1)
    (slot,) = pool.allocate(1)
    pool.own(slot, "entry")
    assert pool.unpin(slot)
    assert pool.free_count == 0
    pool.disown_all((slot,))
    assert pool.free_count == 1
    pool.check()


def test_a_place_disowned_while_in_use_is_freed_by_its_last_user() -> None:
    pool: SlotPool[str] = SlotPool(1)
    (slot,) = pool.allocate(1)
    pool.own(slot, "entry")
    pool.disown_all((slot,))
    assert pool.free_count == 0
    pool.unpin(slot)
    assert pool.free_count == 1


def test_free_runs_are_counted_in_order_of_position() -> None:
    pool: SlotPool[str] = SlotPool(6)
    slots = pool.allocate(6)
    for slot in (slots[0], slots[2], slots[3]):
        pool.unpin(slot)
    assert pool.free_runs() == [1, 2]


def test_a_place_with_several_users_is_referenced_once() -> None:
    pool: SlotPool[str] = SlotPool(3)
    slots = pool.allocate(2)
    pool.own(0, "kept")
    pool.pin_all(slots)
    assert pool.referenced_count == 2
    pool.unpin_all(slots)
    assert pool.referenced_count == 2
    pool.unpin_all(slots)
    assert pool.referenced_count == 0
    pool.pin(0)
    assert pool.referenced_count == 1
    pool.check()


def test_places_never_used_are_one_run_with_free_ones_before_them() -> None:
    pool: SlotPool[str] = SlotPool(6)
    slots = pool.allocate(3)
    assert pool.free_runs() == [3]
    pool.unpin_all([slots[0], slots[2]])
    assert pool.free_runs() == [1, 4]
    assert pool.allocate(3) == [0, 2, 3]
    pool.check()


def test_unpinning_several_tells_whose_places_nobody_uses_any_more() -> None:
    pool: SlotPool[str] = SlotPool(3)
    slots = pool.allocate(3)
    pool.own(0, "kept")
    pool.own(1, "used")
    pool.pin_all([1])
    idle: list[str] = []
    assert pool.unpin_all(slots, idle) == 2
    assert idle == ["kept"]
    assert pool.free_count == 1
    pool.check()


@pytest.mark.parametrize("call", ["pin", "unpin"])
def test_a_free_place_can_be_neither_pinned_nor_unpinned(call: str) -> None:
    pool: SlotPool[str] = SlotPool(1)
    with pytest.raises(AssertionError):
        getattr(pool, f"{call}_all")([0])


def test_the_lowest_free_places_go_first_however_many_are_asked_for() -> None:
    pool: SlotPool[str] = SlotPool(64)
    pool.unpin_all(pool.allocate(64))
    assert pool.allocate(2) == [0, 1]
    assert pool.allocate(40) == [*range(2, 42)]
    assert pool.allocate(1) == [42]
    pool.check()


def test_check_sees_a_leaked_place() -> None:
    pool: SlotPool[str] = SlotPool(2)
    (slot,) = pool.allocate(1)
    pool.pins[slot] = 0
    with pytest.raises(AssertionError, match="leaked"):
        pool.check()


def test_what_changes_places_keeps_its_owner_and_its_users() -> None:
    pool: SlotPool[str] = SlotPool(6)
    pool.allocate(4)
    pool.own(3, "d")
    for slot in (0, 1):
        pool.unpin(slot)
    pool.rearrange({3: 0, 2: 1})
    pool.check()
    assert (pool.owners[0], pool.pins[0], pool.pins[1]) == ("d", 1, 1)
    assert pool.free_runs() == [4]
    assert pool.fragmentation() == 0.0
    assert pool.allocate(1) == [2]


def test_a_limit_below_what_is_taken_leaves_no_room_and_an_excess() -> None:
    pool: SlotPool[str] = SlotPool(4)
    slots = pool.allocate(3)
    pool.set_limit(2)
    assert (pool.free_count, pool.excess_count) == (0, 1)
    pool.unpin_all(slots[:2])
    assert (pool.free_count, pool.excess_count) == (1, 0)
    with pytest.raises(CapacityError):
        pool.allocate(2)
    pool.set_limit(4)
    assert pool.free_count == 3
    assert pool.peak_count == 3
    pool.check()


def test_a_place_that_is_free_or_owned_gets_no_owner() -> None:
    pool: SlotPool[str] = SlotPool(4)
    first, second = pool.allocate(2)
    pool.own_all([first], ["a"])
    with pytest.raises(AssertionError, match="cannot be owned"):
        pool.own_all([first], ["b"])
    with pytest.raises(AssertionError, match="cannot be owned"):
        pool.own_all([3], ["c"])
    pool.own_all([second], ["d"])
    assert pool.owners == ["a", "d", None, None]
