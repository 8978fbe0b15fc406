from __future__ import annotations

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tierkv.index.children import Siblings


@dataclass(frozen=True)
class Child:
    token_bytes: bytes


tokens = st.binary(max_size=3)


@given(st.sets(tokens), st.sets(tokens), tokens)
def test_children_are_kept_in_the_order_of_their_token_ids(added: set[bytes], removed: set[bytes], at: bytes) -> None:
    children = {each: Child(each) for each in added}
    siblings: Siblings[Child] = Siblings()
    for child in children.values():
        siblings.add(child)
    for each in removed & added:
        siblings.remove(children[each])
    left = sorted(added - removed)
    assert [child.token_bytes for child in siblings] == left
    assert (len(siblings), bool(siblings)) == (len(left), bool(left))
    assert siblings.find(at) is (children[at] if at in left else None)
    assert [child.token_bytes for child in siblings.upwards(at)] == [each for each in left if each >= at]
    assert [child.token_bytes for child in siblings.downwards(at)] == [each for each in left[::-1] if each < at]


def test_thousands_of_children_stay_in_order_in_short_runs() -> None:
    children = [Child(number.to_bytes(4, "big")) for number in range(5000)]
    siblings: Siblings[Child] = Siblings()
    for child in random.Random(0).sample(children, len(children)):
        siblings.add(child)
    assert list(siblings) == children
    assert max(map(len, siblings._runs)) <= 512
    for at in (0, 2500, 4999):
        assert list(siblings.upwards(children[at].token_bytes)) == children[at:]
        assert list(siblings.downwards(children[at].token_bytes)) == children[:at][::-1]
    for child in random.Random(1).sample(children, len(children)):
        siblings.remove(child)
    assert not siblings


def test_an_only_child_is_told_from_several() -> None:
    first, second = Child(b"a"), Child(b"b")
    siblings = Siblings(second, first)
    assert siblings.only() is None
    siblings.remove(second)
    assert siblings.only() is first
