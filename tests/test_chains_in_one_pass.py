"""What is done to a chain in one pass does the same as block by block."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import numpy as np
import pytest

from tierkv.index.eviction import ScoreOrder
from tierkv.index.eviction_policy import CacheBlock, EvictionPolicy
from tierkv.index.index import Entry, Index
from tierkv.policies import HitDensityPolicy, LRUPolicy, make_policy
from tierkv.policies.block_classes import NUM_BUCKETS
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

    def new_order(self) -> OneByOne:  # type: ignore[override]
        return OneByOne(super().new_order())


class SlowLRU(LRUPolicy):
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


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "policies", [(HitDensityPolicy, SlowDensity), (LRUPolicy, SlowLRU)], ids=["hit-density", "lru"]
)
def test_the_same_blocks_are_evicted(policies: tuple[type[EvictionPolicy], type[EvictionPolicy]], seed: int) -> None:
    options = {"half_life": 1 << 14} if policies[0] is HitDensityPolicy else {}
    fast = Requests(policies[0](**options), seed, one_by_one=False)
    slow = Requests(policies[1](**options), seed, one_by_one=True)
    for each in (fast, slow):
        policy = each.index.policy
        if isinstance(policy, HitDensityPolicy):
            policy._learn = lambda: None  # type: ignore[method-assign]  # else one pass learns some blocks later
            policy.densities = [
                [(1 + kind * 37 % 41) / (1 + bucket) for bucket in range(NUM_BUCKETS)]
                for kind in range(policy.num_classes)
            ]
        each.run(150)
        each.index.check()
    assert sum(map(len, fast.evicted)) > 2000
    assert fast.evicted == slow.evicted


def test_a_history_that_takes_a_chain_in_is_the_same_as_block_by_block() -> None:
    fast, slow = HitDensityPolicy(num_rows=1 << 13), SlowDensity(num_rows=1 << 13)
    for policy in (fast, slow):
        policy._learn = lambda: None  # type: ignore[method-assign]
        requests = Requests(policy, 1, one_by_one=policy is slow)
        requests.run(200)
    for name in ("tags", "times", "gaps", "earlier", "totals", "forks", "classes"):
        assert list(getattr(fast.history, name)) == list(getattr(slow.history, name)), name
    assert np.any(np.asarray(fast.history.earlier)), "some blocks came back"
    assert np.any(np.asarray(fast.history.forks)), "some chains branched off"
    assert fast._used == slow._used and fast._lost == slow._lost


def test_two_blocks_of_a_chain_may_have_one_row_of_the_history() -> None:
    fast, slow = HitDensityPolicy(num_rows=16), SlowDensity(num_rows=16)
    for policy in (fast, slow):
        policy._learn = lambda: None  # type: ignore[method-assign]
        Requests(policy, 2, one_by_one=False).run(20)
    assert list(fast.history.tags) == list(slow.history.tags)
    assert fast._lost == slow._lost


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
