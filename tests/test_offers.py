"""The order in which blocks are offered for eviction, against sorting."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tierkv.index.eviction_heap import Offers


@dataclass(frozen=True)
class Block:
    depth: int


keys = st.integers(0, 5).map(float)
steps = st.lists(st.one_of(st.tuples(keys, st.integers(0, 3)), st.none()), max_size=60)


def drained(offers: Offers[Block]) -> list[tuple[Block, int]]:
    return list(iter(offers.pop, None))


@given(steps)
def test_the_lowest_key_is_taken_first_and_of_equals_the_deepest(steps: list[tuple[float, int] | None]) -> None:
    offers: Offers[Block] = Offers()
    model: list[tuple[float, int, int]] = []  # key, negated depth, stamp
    for number, step in enumerate(steps):
        if step is None:
            taken = offers.pop()
            assert (taken is None) == (not model)
            if taken:
                key, depth, stamp = next(each for each in model if each[2] == taken[1])
                assert (key, depth) == min(model)[:2] and taken[0] == Block(-depth)
                model.remove((key, depth, stamp))
        else:
            key, depth = step
            assert offers.is_before_all(key) == all(key < each[0] for each in model)
            offers.push(key, Block(depth), number)
            model.append((key, -depth, number))
        assert len(offers) == len(model)
        assert offers.first() == (min(model)[:2] if model else None)
        assert sorted(stamp for _, stamp in offers) == [stamp for _, _, stamp in model]


def test_what_comes_far_out_of_order_is_taken_in_order_all_the_same() -> None:
    offers: Offers[Block] = Offers()
    for number in range(5000):
        offers.push(float(number), Block(0), number)
    for number in range(5000):
        offers.push(4999.5 - number, Block(0), 5000 + number)
    assert [stamp for _, stamp in drained(offers)] == [
        stamp for number in range(5000) for stamp in (number, 9999 - number)
    ]


def test_offers_are_cleared_wherever_they_lie() -> None:
    offers: Offers[Block] = Offers()
    for number in range(3000):
        offers.push(float(number % 2000), Block(0), number)
    offers.pop()
    offers.clear()
    assert (len(offers), offers.pop(), offers.first()) == (0, None, None)
    offers.push(1.0, Block(2), 7)
    assert drained(offers) == [(Block(2), 7)]


def test_what_was_taken_is_not_kept_in_memory() -> None:
    offers: Offers[Block] = Offers()
    block = Block(0)
    before = sys.getrefcount(block)
    for number in range(100):
        offers.push(float(number), block, number)
    for _ in range(90):
        offers.pop()
    assert sys.getrefcount(block) == before + 10
