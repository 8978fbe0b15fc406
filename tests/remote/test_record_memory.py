"""Memory of values: used again once nothing refers to it, never before."""

from __future__ import annotations

import gc

from tierkv.remote_tiers.record_memory import RecordMemory

SIZE = 3 << 20


def address(array: object) -> int:
    return int(array.__array_interface__["data"][0])  # type: ignore[attr-defined]


def test_memory_is_used_again_once_its_last_view_is_gone() -> None:
    memory = RecordMemory()
    first = memory.take(SIZE)
    view = first[10:20][2:]
    where = address(first)
    view[:] = 7
    del first
    gc.collect()
    second = memory.take(SIZE)
    assert address(second) != where, "a view of a view still refers to it"
    second[:] = 1
    assert (view == 7).all()
    del view
    gc.collect()
    third = memory.take(SIZE - 5)
    assert address(third) == where and third.size == SIZE - 5


def test_many_values_at_a_time_have_memory_of_their_own() -> None:
    memory = RecordMemory()
    taken = [memory.take(SIZE) for _ in range(20)]
    for number, each in enumerate(taken):
        each[:] = number
    assert all((each == number).all() for number, each in enumerate(taken))
    del taken, each
    gc.collect()
    assert len(memory._idle) == 8, "a bounded number is kept"


def test_a_piece_that_is_much_too_long_is_not_used() -> None:
    memory = RecordMemory()
    long = memory.take(16 << 20)
    where = address(long)
    del long
    gc.collect()
    assert address(memory.take(1 << 20)) != where or len(memory._idle) == 0
    assert memory.take(100).size == 100
