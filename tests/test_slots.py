from __future__ import annotations

import pytest

from tierkv.errors import CapacityError
from tierkv.slots import SlotPool


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
    pool.disown(slot)
    assert pool.free_count == 1
    pool.check()


def test_a_place_disowned_while_in_use_is_freed_by_its_last_user() -> None:
    pool: SlotPool[str] = SlotPool(1)
    (slot,) = pool.allocate(1)
    pool.own(slot, "entry")
    pool.disown(slot)
    assert pool.free_count == 0
    pool.unpin(slot)
    assert pool.free_count == 1


def test_free_runs_are_counted_in_order_of_position() -> None:
    pool: SlotPool[str] = SlotPool(6)
    slots = pool.allocate(6)
    for slot in (slots[0], slots[2], slots[3]):
        pool.unpin(slot)
    assert pool.free_runs() == [1, 2]


def test_check_sees_a_leaked_place() -> None:
    pool: SlotPool[str] = SlotPool(2)
    (slot,) = pool.allocate(1)
    pool._pins[slot] = 0
    with pytest.raises(AssertionError, match="leaked"):
        pool.check()
