"""Python's garbage collection does not visit the index, and yet nothing of the index stays behind."""

from __future__ import annotations

import gc
import sys
from itertools import count
from pathlib import Path

import pytest
from pattern_engine import PatternEngine, open_tiny

from tierkv.index.entry_table import EntryTable
from tierkv.index.index import Entry, Index
from tierkv.policies import make_policy
from tierkv.values.block import Tier, chain_content_digest, hash_block

ROOT = b"r" * 16


def filled(*, chains: int, length: int, policy: str = "hit-density") -> Index:
    """Return an index with chains of hot blocks, none in use; every second block of them has a sibling."""
    num_blocks = chains * (length + length // 2)
    index = Index(root=ROOT, num_hot=num_blocks, num_warm=1, policy=make_policy(policy), clock=count(1.0).__next__)
    for chain in range(chains):
        parent = ROOT
        for depth in range(length):
            hashes = [hash_block(parent, b"%06d%02d" % (chain, kind)) for kind in range(1 + depth % 2)]
            block_ids = index.hot.allocate(len(hashes))
            for kind, (block_hash, block_id) in enumerate(zip(hashes, block_ids, strict=True)):
                assert index.extend(parent, [(block_hash, b"%06d%02d" % (chain, kind))], [block_id])
            index.unpin_all(Tier.HOT, block_ids)
            parent = hashes[0]
    return index


@pytest.mark.parametrize("policy", ["hit-density", "lru"])
def test_a_full_garbage_collection_visits_none_of_the_blocks(policy: str) -> None:
    gc.collect()
    before = len(gc.get_objects())
    index = filled(chains=200, length=20, policy=policy)
    gc.collect()
    tracked = [each for each in gc.get_objects() if type(each) in (list, dict) and len(each) >= 1000]
    assert len(gc.get_objects()) - before < 1000, "objects were added with the blocks"
    visited = {id(each) for each in gc.get_referrers(next(iter(index)))}
    assert not visited.intersection(map(id, tracked)), "a container that grows with the blocks is visited"
    assert len(index) == 6000


def test_an_index_that_is_dropped_leaves_nothing_behind() -> None:
    index = filled(chains=3, length=40)
    entry = max(index, key=lambda each: each.depth)
    tokens, parent_tokens = entry.token_bytes, entry.parent.token_bytes
    del entry
    before = sys.getrefcount(tokens), sys.getrefcount(parent_tokens)
    del index
    gc.collect()
    assert (sys.getrefcount(tokens), sys.getrefcount(parent_tokens)) == (before[0] - 1, before[1] - 1)


def test_an_evicted_block_is_freed_without_a_garbage_collection() -> None:
    index = filled(chains=1, length=4)
    gc.collect()
    gc.disable()
    try:
        entry = max(index, key=lambda each: each.depth)
        tokens = entry.token_bytes
        before = sys.getrefcount(tokens)
        del entry
        index.evict(index.select_evictions(Tier.HOT, 6), Tier.HOT)
        index.select_evictions(Tier.HOT, 1)
        assert not len(index)
        assert sys.getrefcount(tokens) == before - 1
    finally:
        gc.enable()


def test_a_kept_digest_is_not_that_of_a_later_block_with_the_same_hash() -> None:
    index = Index(root=ROOT, num_hot=64, num_warm=1, policy=make_policy("lru"), clock=lambda: 1.0)
    first = _chain(index, b"a")
    first_digest = _digest(first[-1])
    assert index.content_digest_of(first[15]) == _digest(first[15])
    for entry in reversed(first):
        index.forget(entry)
    second = _chain(index, b"b")  # the same hashes, other tokens
    assert index.content_digest_of(second[15]) == _digest(second[15])
    index.content_digest_of(second[0])  # so that the newest digest is of no help
    assert index.content_digest_of(first[-1]) == first_digest
    index.check()


def _chain(index: Index, tokens: bytes) -> list[Entry]:
    block_ids = index.hot.allocate(20)
    named = [(b"%016d" % number, tokens * 8) for number in range(20)]
    entries = index.extend(ROOT, named, block_ids)
    index.unpin_all(Tier.HOT, block_ids)
    return entries


def _digest(entry: Entry) -> bytes:
    if entry.parent is entry:
        return ROOT
    return chain_content_digest(_digest(entry.parent), entry.token_bytes)


def test_many_blocks_take_the_places_of_those_that_left_first() -> None:
    table = EntryTable(numbers=list(range(4)))
    entries = [Entry(b"%016d" % number, None, b"", 1.0) for number in range(9)]
    table.add_all(entries[:3])
    table.remove_all(entries[:2])
    table.add_all(entries[3:])
    assert sorted(table.numbers_by_hash.values()) == list(range(7)), "two from before, and those behind the shared ones"
    assert list(table) == entries[2:]
    assert not any(gc.is_tracked(entry) for entry in entries)
    assert table.has_any([b"?", entries[8].block_hash]) and not table.has_any([entries[0].block_hash])


def test_blocks_that_wait_to_be_written_are_not_visited(tmp_path: Path) -> None:
    with open_tiny(tmp_path) as cache:
        engine, tiers = PatternEngine(cache), cache._tiers
        cache.release(engine.start(list(range(13))))
        cache.flush()
        with tiers.changed:
            written = tiers.memory.mover.mark()
            entries = sorted(tiers.index, key=lambda entry: entry.depth)
            jobs = tiers.jobs_of(entries, written)
            assert jobs[1] == tiers.job_of(entries[1], written)
        assert len(jobs) == 3 and not any(map(gc.is_tracked, jobs))
        assert [job.parent for job in jobs] == [None, *entries[:2]]
        assert tiers.memory.mover.mark() is written, "an object for each write would be visited"


def test_the_places_in_the_table_of_blocks_that_left_are_used_again() -> None:
    table = EntryTable()
    entries = [Entry(b"%016d" % number, None, b"", 1.0) for number in range(5)]
    for entry in entries[:3]:
        table.add(entry)
    table.remove_all(entries[:2])
    for entry in entries[3:]:
        table.add(entry)
    assert sorted(table.numbers_by_hash.values()) == [0, 1, 2]
    assert list(table) == entries[2:]
