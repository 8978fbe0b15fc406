"""The eviction heap, compared with sorting."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tierkv.index.eviction_heap import EvictionHeap


@dataclass(frozen=True)
class Block:
    depth: int


keys = st.integers(0, 5).map(float)
steps = st.lists(st.one_of(st.tuples(keys, st.integers(0, 3)), st.none()), max_size=60)


def drained(heap: EvictionHeap[Block]) -> list[tuple[Block, int]]:
    return list(iter(heap.pop, None))


@given(steps)
def test_the_lowest_key_is_taken_first_and_of_equals_the_deepest(steps: list[tuple[float, int] | None]) -> None:
    heap: EvictionHeap[Block] = EvictionHeap()
    model: list[tuple[float, int, int]] = []  # key, negated depth, stamp
    for number, step in enumerate(steps):
        if step is None:
            taken = heap.pop()
            assert (taken is None) == (not model)
            if taken:
                key, depth, stamp = next(each for each in model if each[2] == taken[1])
                assert (key, depth) == min(model)[:2] and taken[0] == Block(-depth)
                model.remove((key, depth, stamp))
        else:
            key, depth = step
            assert heap.is_before_all(key) == all(key < each[0] for each in model)
            heap.push(key, Block(depth), number)
            model.append((key, -depth, number))
        assert len(heap) == len(model)
        assert heap.first() == (min(model)[:2] if model else None)
        assert sorted(stamp for _, stamp in heap) == [stamp for _, _, stamp in model]


def test_what_comes_far_out_of_order_is_taken_in_order_all_the_same() -> None:
    heap: EvictionHeap[Block] = EvictionHeap()
    for number in range(5000):
        heap.push(float(number), Block(0), number)
    for number in range(5000):
        heap.push(4999.5 - number, Block(0), 5000 + number)
    assert [stamp for _, stamp in drained(heap)] == [
        stamp for number in range(5000) for stamp in (number, 9999 - number)
    ]


def test_items_are_cleared_in_the_columns_and_in_the_heap() -> None:
    heap: EvictionHeap[Block] = EvictionHeap()
    for number in range(3000):
        heap.push(float(number % 2000), Block(0), number)
    heap.pop()
    heap.clear()
    assert (len(heap), heap.pop(), heap.first()) == (0, None, None)
    heap.push(1.0, Block(2), 7)
    assert drained(heap) == [(Block(2), 7)]


def test_what_was_taken_is_not_kept_in_memory() -> None:
    heap: EvictionHeap[Block] = EvictionHeap()
    block = Block(0)
    before = sys.getrefcount(block)
    for number in range(100):
        heap.push(float(number), block, number)
    for _ in range(90):
        heap.pop()
    assert sys.getrefcount(block) == before + 10
