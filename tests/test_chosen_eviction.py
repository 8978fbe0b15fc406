"""Which blocks an eviction on demand takes, and what becomes of those that are in use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from tierkv.index.chosen_eviction import CONTINUED, IN_USE, PINNED, Choice, ChosenEviction, chosen_entries
from tierkv.index.index import Entry, Index
from tierkv.policies import LRUPolicy
from tierkv.values.block import Tier, as_token_array, hash_block

ROOT = b"r" * 16
STEP = 8  # two tokens a block


class Tree:
    """An index of both tiers whose clock is set by hand; blocks are named by their tokens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.index = Index(root=ROOT, num_hot=16, num_warm=16, policy=LRUPolicy(), clock=lambda: self.now)
        self.chosen = ChosenEviction(self.index, (Tier.HOT, Tier.WARM), self.evict_entries)
        self.entries: dict[str, Entry] = {}

    def add(self, name: str, *, tiers: Sequence[Tier] = (Tier.HOT,), at: float = 0.0) -> Entry:
        """Add the last block of a prompt, one letter a token; the blocks before it are there."""
        start = (len(name) - 1) // 2 * 2
        parent = self.entries[name[:start]].block_hash if start else ROOT
        tokens = packed(name[start:])
        self.now = at
        entry = self.index.insert(hash_block(parent, tokens), parent, tokens)
        assert entry
        for tier in tiers:
            (slot,) = self.index.pool(tier).allocate(1)
            self.index.attach(entry, tier, slot)
            self.index.unpin(tier, slot)
        self.entries[name] = entry
        return entry

    def evict_entries(self, entries: Sequence[Entry], tier: Tier) -> Collection[Entry]:
        return self.index.evict(entries, tier)

    def evict(self, **conditions: object) -> tuple[dict[Tier, int], dict[str, int]]:
        found = self.chosen.evict(self.index.root_entry, Choice(**conditions), STEP)  # type: ignore[arg-type]
        self.index.check()
        return dict(found.blocks), dict(found.stayed)

    @property
    def left(self) -> set[str]:
        return {name for name, e in self.entries.items() if e.block_id is not None or e.warm_slot is not None}


def packed(name: str) -> bytes:
    return as_token_array([ord(letter) for letter in name]).tobytes()


def make_tree() -> Tree:
    tree = Tree()
    for name in ("ab", "abcd", "abcdef", "abcdeg", "abxy", "zz"):
        tree.add(name)
    return tree


def test_all_that_begins_with_a_prompt_goes_and_what_leads_there_if_nothing_else_continues_it() -> None:
    tree = make_tree()
    assert tree.evict(tokens=packed("abcd")) == ({Tier.HOT: 3}, {CONTINUED: 1})
    assert tree.left == {"ab", "abxy", "zz"}
    assert tree.evict(tokens=packed("abxy")) == ({Tier.HOT: 2}, {})
    assert tree.left == {"zz"}


def test_a_prompt_may_end_within_a_block() -> None:
    tree = make_tree()
    assert tree.evict(tokens=packed("abcde")) == ({Tier.HOT: 3}, {CONTINUED: 1})
    assert tree.left == {"ab", "abxy", "zz"}


def test_what_is_known_of_a_prompt_goes_also_if_its_end_is_not() -> None:
    tree = make_tree()
    assert tree.evict(tokens=packed("zzqq")) == ({Tier.HOT: 1}, {})
    assert tree.evict(tokens=packed("qq")) == ({}, {})
    assert tree.left == {"ab", "abcd", "abcdef", "abcdeg", "abxy"}


def test_everything_goes_from_both_tiers() -> None:
    tree = Tree()
    tree.add("ab", tiers=(Tier.HOT, Tier.WARM))
    tree.add("abcd", tiers=(Tier.WARM,))
    assert tree.evict() == ({Tier.HOT: 1, Tier.WARM: 2}, {})
    assert not tree.left and len(tree.index) == 0


def test_a_parent_stays_as_long_as_a_younger_child_does() -> None:
    tree = Tree()
    tree.add("ab", at=1)
    tree.add("abcd", at=5)
    tree.add("zz", at=2)
    assert tree.evict(unused_since=4.0) == ({Tier.HOT: 1}, {CONTINUED: 1})
    assert tree.left == {"ab", "abcd"} and not tree.chosen.marked


def test_a_pinned_block_stays_with_what_it_continues() -> None:
    tree = make_tree()
    tree.index.set_pinned(tree.entries["abcd"], True)
    assert tree.evict() == ({Tier.HOT: 4}, {PINNED: 1, CONTINUED: 1})
    assert tree.left == {"ab", "abcd"} and not tree.chosen.marked


def test_only_listed_hashes_go() -> None:
    tree = make_tree()
    hashes = {tree.entries[name].block_hash for name in ("zz", "abcdef", "ab")}
    assert tree.evict(hashes=hashes) == ({Tier.HOT: 2}, {CONTINUED: 1})


def test_what_is_in_use_is_marked_and_goes_with_its_last_user_and_what_was_computed_behind_it_too() -> None:
    tree = make_tree()
    used = tree.entries["abcd"]
    tree.index.pin(used, Tier.HOT)
    blocks, stayed = tree.evict(tokens=packed("ab"))
    assert blocks == {Tier.HOT: 3} and stayed == {IN_USE: 2}
    assert set(tree.chosen.marked) == {tree.entries["ab"], used}
    tree.add("abcdnn")
    assert tree.chosen.retry() == Counter({Tier.HOT: 1}) and tree.left == {"ab", "abcd", "zz"}
    assert used.block_id is not None
    tree.index.unpin(Tier.HOT, used.block_id)
    assert tree.chosen.retry() == Counter({Tier.HOT: 2})
    assert tree.left == {"zz"} and not tree.chosen.marked


def test_a_prompts_own_blocks_go_with_the_last_user_of_what_follows() -> None:
    tree = make_tree()
    used = tree.entries["abxy"]
    tree.index.pin(used, Tier.HOT)
    tree.evict(tokens=packed("abcd"))
    assert tree.evict(tokens=packed("abxy"))[1] == {IN_USE: 2}
    assert set(tree.chosen.marked) == {used, tree.entries["ab"]}
    assert used.block_id is not None
    tree.index.unpin(Tier.HOT, used.block_id)
    tree.chosen.retry()
    assert tree.left == {"zz"}


def test_what_is_computed_anew_is_spared() -> None:
    tree = make_tree()
    used = tree.entries["zz"]
    tree.index.pin(used, Tier.HOT)
    tree.evict(tokens=packed("zz"))
    tree.chosen.spare(used)
    assert used.block_id is not None
    tree.index.unpin(Tier.HOT, used.block_id)
    assert not tree.chosen.retry() and "zz" in tree.left


def test_a_block_on_its_way_goes_when_it_has_arrived() -> None:
    tree = Tree()
    tree.now = 0.0
    tokens = packed("ab")
    entry = tree.index.insert(hash_block(ROOT, tokens), ROOT, tokens)
    assert entry
    entry.awaited = True
    assert tree.evict() == ({}, {IN_USE: 1})
    (slot,) = tree.index.hot.allocate(1)
    tree.index.attach(entry, Tier.HOT, slot)
    entry.awaited = False
    assert not tree.chosen.retry(), "who waits for it has a reference"
    tree.index.unpin(Tier.HOT, slot)
    assert tree.chosen.retry() == Counter({Tier.HOT: 1})


def test_a_marked_block_that_went_otherwise_is_forgotten() -> None:
    tree = make_tree()
    used = tree.entries["zz"]
    tree.index.pin(used, Tier.HOT)
    tree.evict(tokens=packed("zz"))
    assert used.block_id is not None
    tree.index.unpin(Tier.HOT, used.block_id)
    tree.index.evict([used], Tier.HOT)
    assert not tree.chosen.retry() and not tree.chosen.marked


def test_the_chosen_come_children_first() -> None:
    tree = make_tree()
    wanted, path = chosen_entries(tree.index.root_entry, Choice(tokens=packed("abc")), STEP)
    assert [entry.depth for entry in wanted] == [2, 2, 1] and path == [tree.entries["ab"]]
