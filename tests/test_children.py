from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tierkv.index.children import Children


@dataclass(frozen=True)
class Child:
    token_bytes: bytes


tokens = st.binary(max_size=3)


@given(st.sets(tokens), st.sets(tokens), tokens)
def test_children_are_kept_in_the_order_of_their_token_ids(added: set[bytes], removed: set[bytes], at: bytes) -> None:
    children = {each: Child(each) for each in added}
    sorted_children: Children[Child] = Children()
    for child in children.values():
        sorted_children.add(child)
    for each in removed & added:
        sorted_children.remove(children[each])
    left = sorted(added - removed)
    assert [child.token_bytes for child in sorted_children] == left
    assert (len(sorted_children), bool(sorted_children)) == (len(left), bool(left))
    assert sorted_children.find(at) is (children[at] if at in left else None)
    after, before = sorted_children.around(at)
    assert [child.token_bytes for child in after] == [each for each in left if each >= at]
    assert [child.token_bytes for child in before] == [each for each in left[::-1] if each < at]


def test_thousands_of_children_stay_in_order_in_short_runs() -> None:
    children = [Child(number.to_bytes(4, "big")) for number in range(5000)]
    sorted_children: Children[Child] = Children()
    for child in random.Random(0).sample(children, len(children)):
        sorted_children.add(child)
    assert list(sorted_children) == children
    assert max(map(len, sorted_children._runs)) <= 512
    for at in (0, 2500, 4999):
        after, before = sorted_children.around(children[at].token_bytes)
        assert list(after) == children[at:]
        assert list(before) == children[:at][::-1]
    for child in random.Random(1).sample(children, len(children)):
        sorted_children.remove(child)
    assert not sorted_children


def test_an_only_child_is_told_from_several() -> None:
    first, second = Child(b"a"), Child(b"b")
    sorted_children = Children(second, first)
    assert sorted_children.only() is None
    sorted_children.remove(second)
    assert sorted_children.only() is first
