from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tierkv.errors import CapacityError
from tierkv.index.index import Entry, Index
from tierkv.policies import CacheBlock, LRUPolicy
from tierkv.values.block import Tier, as_token_array, chain_content_digest, common_run, hash_block

ROOT = b"r" * 16
TOKENS = [as_token_array([token]).tobytes() for token in range(8)]


def weak_hash(parent: bytes, tokens: bytes) -> bytes:
    """A hash of 4 bits, so that collisions happen all the time."""
    return bytes([hash_block(parent, tokens)[0] & 15]) * 16


few_tokens = st.lists(st.integers(0, 1), min_size=1, max_size=5).map(lambda ids: as_token_array(ids).tobytes())


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


def test_seals_are_chained_from_the_root_whenever_they_are_asked_for() -> None:
    index = make_index()
    first = add(index, None, 1)
    second = add(index, first, 2)
    want = chain_content_digest(chain_content_digest(ROOT, TOKENS[1]), TOKENS[2])
    assert index.content_digest_of(second) == want == index.content_digest_after(first.block_hash, TOKENS[2])
    assert index.content_digest_of(first) == chain_content_digest(ROOT, TOKENS[1])
    index.check()


def test_seals_are_right_in_long_chains_that_come_and_go() -> None:
    index = make_index(num_hot=100)
    wanted: dict[Entry, bytes] = {}
    for first in (1, 2):
        entry, content_digest = None, ROOT
        for number in range(40):
            token = first if number == 0 else number % 8
            entry, content_digest = add(index, entry, token), chain_content_digest(content_digest, TOKENS[token])
            wanted[entry] = content_digest
    for entry in [*reversed(wanted), *wanted]:
        assert index.content_digest_of(entry) == wanted[entry]
    index.check()
    index.evict(index.select_evictions(Tier.HOT, 60), Tier.HOT)
    index.check()
    assert all(index.content_digest_of(entry) == content_digest for entry, content_digest in wanted.items()), (
        "also of what has gone"
    )
    index.check()


def test_a_block_is_not_put_behind_another_one_that_has_taken_its_parents_hash() -> None:
    index = make_index()
    first = add(index, None, 1)
    child = hash_block(first.block_hash, TOKENS[3])
    true_seal = chain_content_digest(index.content_digest_of(first), TOKENS[3])
    forged_seal = chain_content_digest(chain_content_digest(ROOT, TOKENS[2]), TOKENS[3])
    assert index.insert(child, first.block_hash, TOKENS[3], content_digest=forged_seal) is None
    entry = index.insert(child, first.block_hash, TOKENS[3], content_digest=true_seal)
    assert entry and index.content_digest_of(entry) == true_seal
    assert index.insert(child, first.block_hash, TOKENS[3], content_digest=forged_seal) is None
    assert index.get(child, first.block_hash, TOKENS[3], content_digest=forged_seal) is None
    assert index.get(child, first.block_hash, TOKENS[3], content_digest=true_seal) is entry
    index.forget(entry)


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
    assert index.select_evictions(Tier.HOT, 1) == [child]
    assert index.select_evictions(Tier.HOT, 2) == [child, parent]


def test_a_parent_waits_for_all_of_its_children_however_old_it_is() -> None:
    index = make_index()
    parent = add(index, None, 1)
    first, second = add(index, parent, 2), add(index, parent, 3)
    assert index.select_evictions(Tier.HOT, 2) == [first, second]
    assert index.select_evictions(Tier.HOT, 3) == [first, second, parent]


def test_selecting_victims_changes_nothing() -> None:
    index = make_index()
    child = add(index, add(index, None, 1), 2)
    index.select_evictions(Tier.HOT, 2)
    index.check()
    assert index.select_evictions(Tier.HOT, 1) == [child]


def test_the_least_recently_used_leaf_goes_first() -> None:
    index = make_index()
    first, second = add(index, None, 1), add(index, None, 2)
    index.touch(first)
    assert index.select_evictions(Tier.HOT, 1) == [second]


@pytest.mark.parametrize("how", ["pinned", "in use"])
def test_a_pinned_or_used_block_and_its_ancestors_are_no_victims(how: str) -> None:
    index = make_index()
    parent = add(index, None, 1)
    child = add(index, parent, 2)
    if how == "pinned":
        index.set_pinned(child, True)
    else:
        index.pin(child, Tier.HOT)
    assert index.select_evictions(Tier.HOT, 2) == []


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
        def select_evictions(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
            return list(itertools.islice(leaves, 1, 1 + count))

    index = make_index(policy=DeclineFirst())
    parent = add(index, None, 1)
    add(index, parent, 2)
    assert index.select_evictions(Tier.HOT, 1) == []
    index.check()


def test_check_sees_a_child_without_its_parent() -> None:
    index = make_index()
    parent = add(index, None, 1)
    add(index, parent, 2)
    index._entries.remove_all([parent])
    with pytest.raises(AssertionError):
        index.check()


def test_an_only_child_with_other_tokens_is_not_walked_to() -> None:
    index = make_index()
    add(index, None, 1)
    assert index.walk(as_token_array([2]).tobytes(), 1) == []


def test_a_walk_does_not_follow_a_hash_that_another_parents_child_has_taken() -> None:
    def by_first_byte(parent: bytes, tokens: bytes) -> bytes:
        return tokens[:1] * 16

    index = make_index()
    for parent_hash, token in ((ROOT, 2), (ROOT, 3), (b"\2" * 16, 4), (b"\2" * 16, 5)):
        entry = index.insert(by_first_byte(parent_hash, TOKENS[token]), parent_hash, TOKENS[token])
        assert entry
        index.attach(entry, Tier.HOT, index.hot.allocate(1)[0])
    walked = index.walk(TOKENS[2] + TOKENS[3], 1)
    assert index.walk(TOKENS[2] + TOKENS[3], 1, 1) == walked[:1]
    assert [entry.token_bytes for entry in walked] == [TOKENS[2]]


@given(st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=12), st.lists(st.integers(0, 1), max_size=6))
def test_a_walk_finds_what_asking_block_by_block_finds(prompts: list[list[int]], wanted: list[int]) -> None:
    index = make_index(num_hot=64)
    for prompt in prompts:
        parent, parent_hash = None, ROOT
        for token in prompt:
            block_hash = weak_hash(parent_hash, TOKENS[token])
            if index.collides(block_hash, parent_hash, TOKENS[token]):
                break
            entry = index.insert(block_hash, parent_hash, TOKENS[token])
            assert entry
            if entry.block_id is None:
                index.attach(entry, Tier.HOT, index.hot.allocate(1)[0])
            parent, parent_hash = entry, entry.block_hash
            assert parent.depth < len(prompt)
    index.check()
    expected: list[Entry] = []
    parent_hash = ROOT
    for token in wanted:
        found = index.get(weak_hash(parent_hash, TOKENS[token]), parent_hash, TOKENS[token])
        if found is None:
            break
        expected.append(found)
        parent_hash = found.block_hash
    assert index.walk(as_token_array(wanted).tobytes(), 1) == expected


@given(st.dictionaries(few_tokens, st.sampled_from([*Tier]), max_size=12), few_tokens)
def test_the_nearest_child_is_the_one_that_comparing_all_of_them_finds(children: dict, wanted: bytes) -> None:
    index = make_index(num_hot=16, num_warm=16)
    best = (0, False)
    for tokens, tier in children.items():
        entry = index.insert(hash_block(ROOT, tokens), ROOT, tokens)
        assert entry
        if tier is not Tier.COLD:
            index.attach(entry, tier, index.pool(tier).allocate(1)[0])
            best = max(best, (common_run(tokens, wanted), tier is Tier.HOT))
    found = index.nearest_child(ROOT, wanted)
    if found is None:
        assert best[0] == 0
    else:
        entry, tier, run = found
        assert entry.place(tier) is not None
        assert common_run(entry.token_bytes, wanted) == run
        assert (run, tier is Tier.HOT) == best


def test_evicting_several_leaves_a_parent_whose_child_stays() -> None:
    index = make_index()
    parent = add(index, None, 1)
    first, second = add(index, parent, 2), add(index, parent, 3)
    assert index.evict([first, parent], Tier.HOT) == [first]
    index.check()
    assert index.evict([second, parent], Tier.HOT) == [second, parent]
    assert len(index) == 0
    index.check()


def test_items_outdated_by_use_do_not_pile_up() -> None:
    index = make_index()
    entry = add(index, None, 1)
    for _ in range(1000):
        index.touch(entry)
    assert index._queues[Tier.HOT].num_pushed < 100
    assert index.select_evictions(Tier.HOT, 1) == [entry]


def test_what_is_used_at_nearly_the_same_time_shares_one_float() -> None:
    times = iter([0.0, 1.0, 1.00005, 1.00009, 2.0])
    index = Index(root=ROOT, num_hot=4, num_warm=1, policy=LRUPolicy(), clock=lambda: next(times))
    first, second, third, later = (add(index, None, token) for token in range(4))
    assert first.last_access is second.last_access is third.last_access
    assert later.last_access == 2.0


def test_an_entry_takes_no_more_than_128_bytes() -> None:
    entry = add(make_index(), None, 1)
    assert sys.getsizeof(entry) <= 128, "one slot more and it is 144, times a million"


def test_the_flags_of_an_entry_are_independent() -> None:
    index = make_index()
    entry = add(index, None, 1)
    assert (entry.in_cold, entry.awaited) == (False, False)
    entry.in_cold = entry.awaited = True
    entry.in_cold = False
    assert (entry.in_cold, entry.awaited) == (False, True)
    entry.in_cold, entry.awaited = True, False
    assert (entry.in_cold, entry.awaited, entry.pinned) == (True, False, False)
    entry.pinned, entry.in_cold = True, False
    assert (entry.in_cold, entry.awaited, entry.pinned) == (False, False, True)


def test_the_tiers_share_the_numbers_of_their_places() -> None:
    index = make_index(num_hot=1000, num_warm=600)
    hot, warm = index.hot.allocate(1000), index.warm.allocate(600)
    assert hot == list(range(1000)) and all(a is b for a, b in zip(hot, warm, strict=False))


def test_an_entry_whose_bytes_are_on_their_way_stays_without_a_place() -> None:
    index = make_index()
    entry = add(index, None, 1)
    entry.awaited = True
    index.detach(entry, Tier.HOT)
    index.check()
    assert list(index) == [entry]
    entry.awaited = False
    index.forget(entry)
    assert len(index) == 0


def test_a_new_policy_ranks_what_was_taken_and_not_evicted() -> None:
    index = make_index()
    first, second = add(index, None, 1), add(index, None, 2)
    assert index.select_evictions(Tier.HOT, 2) == [first, second]
    index.set_policy(LRUPolicy())
    assert index.select_evictions(Tier.HOT, 2) == [first, second]
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

    @rule(count=st.integers(1, 6), tier=st.sampled_from([Tier.HOT, Tier.WARM]), which=st.integers(1, 63))
    def evict_some(self, count: int, tier: Tier, which: int) -> None:
        """Evict some of the evictions in one call; what has a child left in the tier must stay."""
        evictions = self.index.select_evictions(tier, count)
        asked = [evicted for number, evicted in enumerate(evictions) if which >> number & 1]
        for evicted in self.index.evict(asked, tier):
            self.where[tier].remove(evicted)
        for evicted in asked:
            has_child = any(child in self.where[tier] for child in evicted.children)
            assert (evicted in self.where[tier]) == has_child

    @precondition(lambda self: len(self.index))
    @rule(which=st.integers(0, 30))
    def walk(self, which: int) -> None:
        """Every entry is found by walking to it."""
        entries = sorted(self.index, key=lambda entry: entry.block_hash)
        chain = [entries[which % len(entries)]]
        while chain[0].depth:
            chain.insert(0, chain[0].parent)
        tokens = b"".join(entry.token_bytes for entry in chain)
        assert self.index.walk(tokens, 1) == chain

    @precondition(lambda self: len(self.index))
    @rule(which=st.sets(st.integers(0, 30)))
    def use_several(self, which: set[int]) -> None:
        entries = sorted(self.index, key=lambda entry: entry.block_hash)
        self.index.touch_all([entries[number] for number in {number % len(entries) for number in which}])

    @rule(count=st.integers(1, 4), tier=st.sampled_from([Tier.HOT, Tier.WARM]))
    def evict(self, count: int, tier: Tier) -> None:
        in_use = {entry for entry, _ in self.held[tier]}
        for evicted in self.index.select_evictions(tier, count):
            assert evicted not in in_use and not evicted.pinned
            assert not any(child in self.where[tier] for child in evicted.children or ())
            self.index.detach(evicted, tier)
            self.where[tier].remove(evicted)

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


class Faulty(LRUPolicy):
    """Raises in the method that `fails_in` names. score: what a score is then, unless that raises."""

    fails_in = ""
    score: Any = None

    def score_block(self, block: CacheBlock) -> float:
        if self.fails_in == "score_block":
            raise ZeroDivisionError
        return self.score if self.fails_in == "score" else super().score_block(block)

    def update_on_access(self, block: CacheBlock) -> None:
        if self.fails_in == "update_on_access":
            raise ZeroDivisionError

    def update_on_insert(self, block: CacheBlock, parent: CacheBlock | None) -> None:
        if self.fails_in == "update_on_insert":
            raise ZeroDivisionError


def test_a_policy_that_fails_at_an_insertion_leaves_no_entry_without_bytes() -> None:
    policy = Faulty()
    index = make_index(policy=policy)
    policy.fails_in = "update_on_insert"
    with pytest.raises(ZeroDivisionError):
        index.insert(bytes([1]) * 16, ROOT, b"a" * 4)
    assert not len(index)
    (slot,) = index.hot.allocate(1)
    with pytest.raises(ZeroDivisionError):
        index.extend(ROOT, [(bytes([2]) * 16, b"b" * 4)], [slot])
    assert not len(index)
    index.unpin(Tier.HOT, slot)
    assert index.hot.free_count == index.hot.capacity
    index.check()


@pytest.mark.parametrize("fault", ["score_block", "update_on_access", "score"])
@pytest.mark.parametrize("score", [float("nan"), None, "text"])
def test_no_block_is_kept_for_ever_because_a_policy_failed(
    fault: str, score: Any, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Faulty()
    policy.score = score
    index = make_index(policy=policy)
    entries = []
    for number in range(3):
        entry = index.insert(bytes([number + 1]) * 16, ROOT, bytes([number]) * 4)
        assert entry
        index.attach(entry, Tier.HOT, *index.hot.allocate(1))
        entries.append(entry)
    policy.fails_in = fault
    index.unpin_all(Tier.HOT, [0, 1, 2])
    with contextlib.suppress(ZeroDivisionError):
        index.touch_all(entries)
    index.check()
    assert len(index.select_evictions(Tier.HOT, 4)) == 3
    policy.fails_in = ""
    assert len(index.select_evictions(Tier.HOT, 4)) == 3
    assert len([each for each in caplog.records if "eviction policy" in each.getMessage()]) <= 1
