from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tierkv.block import Tier, as_token_array, hash_block
from tierkv.errors import CapacityError
from tierkv.index import Entry, Index
from tierkv.policies import CacheBlock, LRUPolicy

ROOT = b"r" * 16


def make_index(num_hot: int = 4, num_warm: int = 4, policy: LRUPolicy | None = None) -> Index:
    clock = itertools.count(1)
    return Index(
        root=ROOT,
        num_hot=num_hot,
        num_warm=num_warm,
        policy=policy or LRUPolicy(),
        clock=lambda: float(next(clock)),
    )


def add(index: Index, parent: Entry | None, token: int, tier: Tier = Tier.HOT) -> Entry:
    """Insert a one-token block whose bytes lie in a tier, with no user."""
    parent_hash = parent.block_hash if parent else ROOT
    tokens = as_token_array([token]).tobytes()
    entry = index.insert(hash_block(parent_hash, tokens), parent_hash, tokens)
    assert entry
    (slot,) = index.pool(tier).allocate(1)
    index.attach(entry, tier, slot)
    index.unpin(tier, slot)
    return entry


def test_a_collision_is_not_a_hit() -> None:
    index = make_index()
    entry = add(index, None, 1)
    other = as_token_array([2]).tobytes()
    assert index.get(entry.block_hash, ROOT, other) is None
    assert index.collides(entry.block_hash, ROOT, other)
    assert index.insert(entry.block_hash, ROOT, other) is None


def test_a_hash_equal_to_the_root_is_a_collision() -> None:
    index = make_index()
    assert index.insert(ROOT, ROOT, b"\1\0\0\0") is None
    assert index.collides(ROOT, ROOT, b"\1\0\0\0")


def test_a_block_without_its_parent_is_not_inserted() -> None:
    assert make_index().insert(b"x" * 16, b"unknown parent..", b"\1\0\0\0") is None


def test_children_go_before_their_parents() -> None:
    index = make_index()
    parent = add(index, None, 1)
    child = add(index, parent, 2)
    assert index.select_victims(Tier.HOT, 1) == [child]
    assert index.select_victims(Tier.HOT, 2) == [child, parent]


def test_selecting_victims_changes_nothing() -> None:
    index = make_index()
    child = add(index, add(index, None, 1), 2)
    index.select_victims(Tier.HOT, 2)
    index.check()
    assert index.select_victims(Tier.HOT, 1) == [child]


def test_the_least_recently_used_leaf_goes_first() -> None:
    index = make_index()
    first, second = add(index, None, 1), add(index, None, 2)
    index.touch(first)
    assert index.select_victims(Tier.HOT, 1) == [second]


@pytest.mark.parametrize("how", ["pinned", "in use"])
def test_a_pinned_or_used_block_and_its_ancestors_are_no_victims(how: str) -> None:
    index = make_index()
    parent = add(index, None, 1)
    child = add(index, parent, 2)
    if how == "pinned":
        index.set_pinned(child, True)
    else:
        index.pin(child, Tier.HOT)
    assert index.select_victims(Tier.HOT, 2) == []


def test_an_entry_without_bytes_stays_while_it_has_children() -> None:
    index = make_index()
    parent = add(index, None, 1)
    child = add(index, parent, 2, Tier.WARM)
    index.detach(parent, Tier.HOT)
    assert parent in set(index)
    index.check()
    index.detach(child, Tier.WARM)
    assert len(index) == 0


def test_a_policy_may_decline_a_block_but_not_take_its_parent() -> None:
    class DeclineFirst(LRUPolicy):
        def select_victims(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
            return list(itertools.islice(leaves, 1, 1 + count))

    index = make_index(policy=DeclineFirst())
    parent = add(index, None, 1)
    add(index, parent, 2)
    assert index.select_victims(Tier.HOT, 1) == []
    index.check()


def test_check_sees_a_child_without_its_parent() -> None:
    index = make_index()
    parent = add(index, None, 1)
    add(index, parent, 2)
    del index._entries[parent.block_hash]
    with pytest.raises(AssertionError):
        index.check()


class IndexMachine(RuleBasedStateMachine):
    """Random inserts, pins, touches and evictions against sets of names."""

    @initialize(num_hot=st.integers(1, 6), num_warm=st.integers(1, 6))
    def start(self, num_hot: int, num_warm: int) -> None:
        self.index = make_index(num_hot, num_warm)
        self.held: dict[Tier, list[tuple[Entry, int]]] = {Tier.HOT: [], Tier.WARM: []}
        self.where: dict[Tier, set[Entry]] = {Tier.HOT: set(), Tier.WARM: set()}

    @rule(parent=st.integers(0, 30), token=st.integers(0, 3), tier=st.sampled_from([Tier.HOT, Tier.WARM]))
    def insert(self, parent: int, token: int, tier: Tier) -> None:
        entries = sorted(self.index, key=lambda entry: entry.block_hash)
        above = entries[parent % len(entries)] if entries and parent else None
        parent_hash = above.block_hash if above else ROOT
        tokens = as_token_array([token]).tobytes()
        known = self.index.get(hash_block(parent_hash, tokens), parent_hash, tokens)
        if known and known.place(tier) is not None:
            return
        try:
            (slot,) = self.index.pool(tier).allocate(1)
        except CapacityError:
            assert self.index.pool(tier).free_count == 0
            return
        entry = self.index.insert(hash_block(parent_hash, tokens), parent_hash, tokens)
        assert entry
        self.index.attach(entry, tier, slot)
        self.where[tier].add(entry)
        self.held[tier].append((entry, slot))

    @precondition(lambda self: any(self.held.values()))
    @rule(which=st.integers(0, 30))
    def release(self, which: int) -> None:
        tier = Tier.HOT if self.held[Tier.HOT] else Tier.WARM
        _, slot = self.held[tier].pop(which % len(self.held[tier]))
        self.index.unpin(tier, slot)

    @precondition(lambda self: len(self.index))
    @rule(which=st.integers(0, 30), pinned=st.booleans(), tier=st.sampled_from([Tier.HOT, Tier.WARM]))
    def use(self, which: int, pinned: bool, tier: Tier) -> None:
        entries = sorted(self.index, key=lambda entry: entry.block_hash)
        entry = entries[which % len(entries)]
        self.index.touch(entry)
        self.index.set_pinned(entry, pinned)
        slot = entry.place(tier)
        if slot is not None:
            self.index.pin(entry, tier)
            self.held[tier].append((entry, slot))

    @rule(count=st.integers(1, 4), tier=st.sampled_from([Tier.HOT, Tier.WARM]))
    def evict(self, count: int, tier: Tier) -> None:
        in_use = {entry for entry, _ in self.held[tier]}
        for victim in self.index.select_victims(tier, count):
            assert victim not in in_use and not victim.pinned
            assert not any(child in self.where[tier] for child in victim.children or ())
            self.index.detach(victim, tier)
            self.where[tier].remove(victim)

    @invariant()
    def everything_holds(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        for tier, entries in self.where.items():
            assert {entry for entry in self.index if entry.place(tier) is not None} == entries
            assert self.index.pool(tier).used_count == len(entries)


TestIndexMachine = IndexMachine.TestCase
TestIndexMachine.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
