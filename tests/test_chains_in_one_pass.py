"""What is done to a chain in one pass does the same as block by block."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tierkv.index.entry import MOST_NOTE, NOTE_SHIFT, PINNED
from tierkv.index.eviction_policy import CacheBlock, EvictionPolicy
from tierkv.index.index import Entry, Index
from tierkv.index.score_order import ScoreOrder
from tierkv.policies import HitDensityPolicy, LRUPolicy, block_classes, density, make_policy
from tierkv.policies.idle_buckets import NUM_BUCKETS
from tierkv.values.block import Tier, hash_block

ROOT = b"r" * 16
SLOTS = 600


class OneByOne:
    """An order that answers for a chain only block by block."""

    def __init__(self, order: object) -> None:
        self._order = order
        for name in ("add", "remove_all", "push", "pop", "goes_first", "clear"):
            setattr(self, name, getattr(order, name))

    def __iter__(self) -> Iterator[object]:
        return iter(self._order)  # type: ignore[call-overload,no-any-return]

    def __len__(self) -> int:
        return len(self._order)  # type: ignore[arg-type]


class SlowDensity(HitDensityPolicy):
    """Does block by block what the base does for a chain."""

    def update_on_insert_all(self, blocks: list[CacheBlock], parent: CacheBlock | None) -> None:  # type: ignore[override]
        for block in blocks:
            self.update_on_insert(block, parent)
            parent = block

    def update_on_access_all(self, blocks: Sequence[CacheBlock]) -> None:
        for block in blocks:
            self.update_on_access(block)

    def select_evictions(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        return list(itertools.islice(leaves, count))  # an override, so the index asks for one block at a time

    def new_order(self) -> OneByOne:  # type: ignore[override]
        return OneByOne(super().new_order())


class SlowLRU(LRUPolicy):
    def select_evictions(self, count: int, leaves: Iterator[CacheBlock]) -> list[CacheBlock]:
        return list(itertools.islice(leaves, count))

    def new_order(self) -> OneByOne:
        return OneByOne(ScoreOrder(self))


class Requests:
    """Random requests against an index. one_by_one: inserts each block by itself."""

    def __init__(self, policy: EvictionPolicy, seed: int, *, one_by_one: bool) -> None:
        clock = (number / 8 for number in itertools.count(1))
        self.index = Index(root=ROOT, num_hot=SLOTS, num_warm=1, policy=policy, clock=lambda: next(clock))
        self.index._time = lambda: self.now  # type: ignore[method-assign]  # a request is one moment
        self.now = 1.0
        self.chance = random.Random(seed)
        self.one_by_one = one_by_one
        self.evicted: list[list[bytes]] = []

    def run(self, count: int) -> None:
        for _ in range(count):
            self.now += self.chance.random() * 4
            family, length, fork = self.chance.randrange(12), self.chance.randrange(1, 90), self.chance.randrange(1, 60)
            self.request([(family, at, 0 if at < fork else self.chance.randrange(2)) for at in range(length)])

    def request(self, blocks: list[tuple[int, int, int]]) -> None:
        index, parent = self.index, ROOT
        named: list[tuple[bytes, bytes]] = []
        for block in blocks:
            tokens = b"%04d%04d%04d" % block
            parent = hash_block(parent, tokens)
            named.append((parent, tokens))
        known = index.walk(b"".join(tokens for _, tokens in named), 3)
        held = [entry.block_id for entry in known if entry.block_id is not None]
        assert len(held) == len(known)
        index.hot.pin_all(held)
        missing = len(named) - len(known)
        if missing > index.hot.free_count:
            gone = index.select_evictions(Tier.HOT, missing - index.hot.free_count)
            self.evicted.append([entry.block_hash for entry in gone])
            index.evict(gone, Tier.HOT)
        slots = index.hot.allocate(missing)
        index.touch_all(known)
        last = known[-1].block_hash if known else ROOT
        if self.one_by_one:
            for (block_hash, tokens), slot in zip(named[len(known) :], slots, strict=True):
                entry = index.insert(block_hash, last, tokens)
                assert entry
                index.attach(entry, Tier.HOT, slot)
                last = block_hash
        else:
            assert len(index.extend(last, named[len(known) :], slots)) == missing
        index.unpin_all(Tier.HOT, [*held, *slots])


def learning() -> tuple[EvictionPolicy, EvictionPolicy]:
    return HitDensityPolicy(), SlowDensity()


def forgetting() -> tuple[EvictionPolicy, EvictionPolicy]:
    """Return policies whose history has lost most blocks when they are evicted."""
    return HitDensityPolicy(num_rows=64), SlowDensity(num_rows=64)


def in_odd_order() -> tuple[EvictionPolicy, EvictionPolicy]:
    """Return policies that learn nothing and rank the classes in an order that no traffic would teach."""
    both = HitDensityPolicy(), SlowDensity()
    for policy in both:
        policy.interval_begun = lambda: None  # type: ignore[method-assign]
        policy.densities = [
            [(1 + kind * 37 % 41) / (1 + bucket) for bucket in range(NUM_BUCKETS)] for kind in range(policy.num_classes)
        ]
    return both


def lru() -> tuple[EvictionPolicy, EvictionPolicy]:
    return LRUPolicy(), SlowLRU()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policies", [learning, forgetting, in_odd_order, lru])
def test_the_same_blocks_are_evicted(policies: Callable[[], tuple[EvictionPolicy, EvictionPolicy]], seed: int) -> None:
    fast, slow = (
        Requests(policy, seed, one_by_one=one_by_one)
        for policy, one_by_one in zip(policies(), (False, True), strict=True)
    )
    for each in (fast, slow):
        each.run(150)
        each.index.check()
    assert sum(map(len, fast.evicted)) > 2000
    assert fast.evicted == slow.evicted


def assert_same_state(fast: HitDensityPolicy, slow: HitDensityPolicy) -> None:
    """Compare all that the policies know."""
    for name in ("tags", "times", "gaps", "earlier", "totals", "forks", "classes"):
        assert list(getattr(fast.history, name)) == list(getattr(slow.history, name)), name
    for name in ("now", "block_tokens", "sample_mask", "revision", "densities", "_used", "_lost", "_num_uses"):
        assert getattr(fast, name) == getattr(slow, name), name


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_rows", [16, 1 << 10, 1 << 13])
def test_a_chain_in_one_pass_teaches_the_same_as_block_by_block(num_rows: int, seed: int) -> None:
    fast, slow = HitDensityPolicy(num_rows=num_rows), SlowDensity(num_rows=num_rows)
    for policy in (fast, slow):
        Requests(policy, seed, one_by_one=policy is slow).run(200)
    assert_same_state(fast, slow)
    assert fast.revision > 10
    if num_rows > 1 << 10:  # a small table forgets blocks before they come back
        assert np.any(np.asarray(fast.history.earlier)), "some blocks came back"
        assert np.any(np.asarray(fast.history.forks)), "some chains branched off"


def test_a_chain_is_cut_where_the_policy_learns_and_halves_its_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(density, "_MOST_BETWEEN", 4)  # so often that some chains' last block of the sample is the one
    parts: list[tuple[int, int]] = []

    class Cut(HitDensityPolicy):
        def _insert_all_new(self, blocks: Sequence[CacheBlock], *rest: Any) -> int:
            parts.append((len(blocks), super()._insert_all_new(blocks, *rest)))
            return parts[-1][1]

    fast, slow = Cut(num_rows=1 << 11, sampled_blocks=50), SlowDensity(num_rows=1 << 11, sampled_blocks=50)
    both = [Requests(policy, 1, one_by_one=False) for policy in (fast, slow)]  # kept: a policy asks how many are held
    for each in both:
        each.run(200)
    assert_same_state(fast, slow)
    assert fast.sample_mask == 15, "600 blocks, of which at most 50 are of the sample"
    cut = [part for part in parts if part[1] < part[0]]
    assert len(cut) > 20 and len(parts) - len(cut) > 20


def test_time_that_went_back_and_a_first_size_are_learned_alike() -> None:
    fast, slow = HitDensityPolicy(num_rows=1 << 11), SlowDensity(num_rows=1 << 11)
    sizes: dict[HitDensityPolicy, list[int]] = {fast: [], slow: []}
    for policy in (fast, slow):
        policy.sample_mask = 255  # so most chains have no block of the sample
        requests = Requests(policy, 3, one_by_one=False)
        for family in range(80):
            requests.now = 100.0 - family
            requests.request([(family, at, 0) for at in range(block_classes._LEAST_CHAIN + 8)])
            sizes[policy].append(policy.block_tokens)
    assert sizes[fast] == sizes[slow]
    assert sizes[fast][0] == 0 and sizes[fast][-1] == 3
    assert_same_state(fast, slow)
    assert np.any(fast._lost)


def test_a_first_block_that_takes_its_parents_row_still_follows_a_used_prefix() -> None:
    for policy in (HitDensityPolicy(num_rows=16), SlowDensity(num_rows=16)):
        index = Index(root=ROOT, num_hot=32, num_warm=1, policy=policy, clock=lambda: 1.0)
        (parent,) = extended(index, "a")
        index.touch(parent)
        block_hash = b"z" * 8 + parent.block_hash[8:]  # another tag, the same row
        slots = index.hot.allocate(1)
        assert index.extend(parent.block_hash, [(block_hash, b"z" * 12)], slots)
        assert policy.history.forks[policy.history.row_of(block_hash)[0]] == 1


def extended(index: Index, names: str, parent: bytes = ROOT) -> list[Entry]:
    """Extend the index by blocks named by one letter each: hash and tokens are made of it."""
    slots = index.hot.allocate(len(names))
    entries = index.extend(parent, [(name.encode() * 16, name.encode() * 12) for name in names], slots)
    index.unpin_all(Tier.HOT, slots)
    return entries


def index_of_four() -> Index:
    return Index(root=ROOT, num_hot=16, num_warm=1, policy=make_policy("hit-density"), clock=lambda: 1.0)


def test_a_run_ends_before_a_hash_that_is_taken() -> None:
    index = index_of_four()
    assert len(extended(index, "abcd")) == 4
    assert [entry.block_hash[:1] for entry in extended(index, "xbc")] == [b"x"]
    assert extended(index, "a") == []
    assert len(index) == 5
    assert index.hot.free_count == 11, "slots of blocks that were not inserted are free again"
    index.check()


def test_nothing_has_the_hash_of_the_root_or_follows_an_unknown_block() -> None:
    index = index_of_four()
    assert [entry.block_hash[:1] for entry in extended(index, "arz")] == [b"a"]
    assert extended(index, "bc", b"?" * 16) == []
    index.check()


def test_a_run_may_branch_off_a_block_that_has_a_child() -> None:
    index = index_of_four()
    extended(index, "abc")
    assert len(extended(index, "xy", b"a" * 16)) == 2
    assert len(extended(index, "pq", b"a" * 16)) == 2
    parent = index.peek(b"a" * 16)
    assert parent and parent.hot_children == 3 and parent.is_prefix_block
    index.check()


def test_a_run_ends_before_a_hash_that_it_has_already() -> None:
    index = index_of_four()
    assert [entry.block_hash[:1] for entry in extended(index, "aba")] == [b"a", b"b"]
    assert index.hot.free_count == 14
    index.check()


def test_uses_in_one_call_are_learned_like_uses_one_by_one() -> None:
    fast, slow = HitDensityPolicy(sampled_blocks=4), SlowDensity(sampled_blocks=4)
    for policy in (fast, slow):
        policy.halve_sample = lambda: False  # type: ignore[method-assign]
        index = Index(root=ROOT, num_hot=64, num_warm=1, policy=policy, clock=itertools.count(1.0).__next__)
        entries = extended(index, "".join(map(chr, range(33, 97))))
        del policy.halve_sample  # so the sample is halved while these uses are learned, again and again
        for _ in range(20):
            index.touch_all(entries)
    assert_same_state(fast, slow)
    assert fast.sample_mask > 7


def test_a_policy_with_its_own_way_to_learn_of_a_use_is_told_of_each() -> None:
    seen: list[bytes] = []

    class Told(HitDensityPolicy):
        def update_on_access(self, block: CacheBlock) -> None:
            seen.append(block.block_hash[:1])

    index = Index(root=ROOT, num_hot=16, num_warm=1, policy=Told(), clock=lambda: 1.0)
    index.touch_all(extended(index, "abc"))
    assert seen == [b"a", b"b", b"c"]


@pytest.mark.parametrize("policy", ["hit-density", "lru"])
def test_a_selection_of_no_block_takes_none(policy: str) -> None:
    index = Index(root=ROOT, num_hot=16, num_warm=1, policy=make_policy(policy), clock=lambda: 1.0)
    extended(index, "abc")
    assert index.select_evictions(Tier.HOT, 0) == []
    assert not index._queues[Tier.HOT]._taken, "a block was taken out of the order"
    assert [entry.block_hash[:1] for entry in index.select_evictions(Tier.HOT, 2)] == [b"c", b"b"]


def test_a_block_used_four_billion_times_is_still_evicted() -> None:
    index = index_of_four()
    (entry,) = extended(index, "a")
    entry.access_count = (1 << 32) - 1
    for _ in range(3):
        index.touch(entry)
        index.check()
    assert index.evict(index.select_evictions(Tier.HOT, 1), Tier.HOT) == [entry]


def test_a_new_block_keeps_its_class_when_the_history_has_lost_its_row() -> None:
    for policy in (HitDensityPolicy(num_rows=16), SlowDensity(num_rows=16)):
        index = Index(root=ROOT, num_hot=512, num_warm=1, policy=policy, clock=itertools.count(1.0).__next__)
        (parent,) = extended(index, "a")
        index.touch(parent)
        child, grandchild = extended(index, "bc", parent.block_hash)
        classes = [policy.class_of(child), policy.class_of(grandchild)]
        assert classes == [5, 5], "they follow a first block that was used"
        extended(index, "".join(map(chr, range(128, 228))))
        assert policy.history.find(child.block_hash) is None or policy.history.find(grandchild.block_hash) is None
        assert [policy.class_of(child), policy.class_of(grandchild)] == classes
        index.touch(child)
        assert policy.class_of(child) >= 15, "a note is of no use any more"


def test_notes_of_another_policy_are_forgotten() -> None:
    index = index_of_four()
    entries = extended(index, "abcd")
    entries[0].pinned = entries[1].in_cold = True
    assert all(entry.flags >> NOTE_SHIFT for entry in entries)
    index.set_policy(make_policy("lru"))
    assert [entry.flags for entry in entries] == [PINNED, 2, 0, 0]


@pytest.mark.parametrize("count", [3, 40])
def test_a_class_that_is_too_large_for_a_note_is_read_from_the_history(count: int) -> None:
    class Large(HitDensityPolicy):
        def classify(self, block: CacheBlock, count: int, gap_s: float, fork: int) -> int:
            return MOST_NOTE - 1 + block.depth % 2

    policy = Large()
    index = Index(root=ROOT, num_hot=64, num_warm=1, policy=policy, clock=lambda: 1.0)
    entries = extended(index, "".join(map(chr, range(40, 40 + count))))
    assert [entry.flags >> NOTE_SHIFT for entry in entries] == [0 if entry.depth % 2 else 31 for entry in entries]
    assert [policy.class_of(entry) for entry in entries] == [30 + entry.depth % 2 for entry in entries]
    assert max(entry.flags for entry in entries) < 257, "CPython shares numbers up to 256"


def test_a_chain_of_equal_classes_ends_where_the_density_is_that_of_the_first_block() -> None:
    """Blocks of one class, time and density go by depth, which changes from block to block."""
    policy = HitDensityPolicy()
    policy.densities = [[1.0] * NUM_BUCKETS for _ in range(policy.num_classes)]
    index = Index(root=ROOT, num_hot=64, num_warm=1, policy=policy, clock=lambda: 1.0)
    index._time = lambda: 1.0  # type: ignore[method-assign]
    long, short = extended(index, "abcdefgh"), extended(index, "wxyz")
    assert len({policy.class_of(entry) for entry in (long[3], short[3])}) == 1
    chosen = index.select_evictions(Tier.HOT, 12)
    depths = [entry.depth for entry in chosen]
    assert depths == sorted(depths, reverse=True)


def test_a_chain_is_counted_like_block_by_block() -> None:
    lengths: list[int] = []
    for seed in range(300):
        chance = random.Random(seed)

        class Random(HitDensityPolicy):
            def class_of(self, block: CacheBlock) -> int:
                note = block.flags >> NOTE_SHIFT
                return note - 1 if note and block.access_count == 1 else 31 + block.depth % 3

        policy = Random(num_rows=16)
        density_of = [chance.choice([1.0, 2.0, 2.0, 3.0]) for _ in range(policy.num_classes)]
        policy.densities = [[each / (1 + bucket // 8) for bucket in range(NUM_BUCKETS)] for each in density_of]
        index = Index(root=ROOT, num_hot=64, num_warm=1, policy=LRUPolicy(), clock=lambda: 1.0)
        chain, others = extended(index, "abcdefghijkl")[::-1], extended(index, "xyz")
        for at, entry in enumerate((*chain, *others)):
            is_like_before = 0 < at < len(chain) and chance.random() < 0.8
            entry.flags = chain[at - 1].flags if is_like_before else chance.randrange(4) << NOTE_SHIFT
            entry.access_count = 1 if chance.random() < 0.9 else 2
            entry.last_access = chain[at - 1].last_access if is_like_before else chance.choice([1.0, 50.0, 900.0])
        policy.now, policy.revision = 1000.0, 1
        order = policy.new_order()
        for entry in others:
            order.push(entry, 1)
        assert order.pop()
        one_by_one = list(itertools.takewhile(order.goes_first, chain))
        lengths.append(order.count_first(chain))  # type: ignore[attr-defined]
        assert lengths[-1] == len(one_by_one), seed
    assert len(set(lengths)) > 8, "chains end anywhere"
