"""The table to a block's children: the one with the longest common run is found as a walk over all would find it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.storage.cold_children import LEVEL_TOKENS, ChildrenTable, ChildRow
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.values.block import common_run, hash_block

PARENT, OTHER = bytes(16), b"\xff" * 16
token_lists = st.lists(
    st.one_of(
        st.lists(st.integers(0, 2), min_size=1, max_size=6),
        st.integers(1, 3 * LEVEL_TOKENS).flatmap(lambda n: st.just([7] * n)),  # long common runs
        st.tuples(st.integers(10, 40), st.lists(st.integers(0, 2), max_size=4)).map(lambda t: [7] * t[0] + t[1]),
        st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40),
    ),
    max_size=12,
)


def as_bytes(tokens: list[int]) -> bytes:
    return np.array(tokens, dtype="<u4").tobytes()


class Tree:
    """ChildrenTable with the blocks' tokens beside them."""

    def __init__(self, table: ChildrenTable) -> None:
        self.table = table
        self.tokens: dict[bytes, bytes] = {}

    def insert(self, tokens: list[int]) -> bytes:
        child = hash_block(PARENT, as_bytes(tokens))
        self.tokens[child] = as_bytes(tokens)
        self.table.insert(PARENT, as_bytes(tokens), child, self.tokens.get)
        return child

    def remove(self, child: bytes, *, tokens_known: bool) -> None:
        tokens = self.tokens.pop(child)
        if tokens_known:
            assert self.table.remove_known(PARENT, tokens, child)
        else:
            self.table.remove(PARENT, child)

    def longest(self, query: list[int]) -> int:
        found = self.table.find_longest_run(PARENT, as_bytes(query), self.tokens.get)
        if found is None:
            return 0
        child, tokens, run = found
        assert tokens == self.tokens[child]
        assert run == common_run(tokens, as_bytes(query))
        return run


@contextmanager
def tree() -> Iterator[Tree]:
    with (
        tempfile.TemporaryDirectory() as directory,
        closing(LmdbEnv(Path(directory), map_bytes=1 << 24, names=(b"children",))) as env,
        env.write() as txn,
    ):
        yield Tree(ChildrenTable(txn, env.handles[0]))


@settings(max_examples=150, deadline=None)
@given(stored=token_lists, queries=token_lists, removed=st.lists(st.tuples(st.integers(0, 11), st.booleans())))
def test_the_longest_run_is_that_of_a_walk_over_all_children(stored, queries, removed) -> None:
    with tree() as children:
        hashes = list(dict.fromkeys(children.insert(tokens) for tokens in stored))
        children.table.insert(OTHER, as_bytes([7]), bytes(16), lambda _: None)
        for number, tokens_known in removed:
            if number < len(hashes) and hashes[number] in children.tokens:
                children.remove(hashes[number], tokens_known=tokens_known)
        for query in [*queries, *stored]:
            if query:
                best = max((common_run(t, as_bytes(query)) for t in children.tokens.values()), default=0)
                assert children.longest(query) == best
        assert sorted(children.table.iter_children(PARENT)) == sorted(children.tokens)


@settings(max_examples=60, deadline=None)
@given(stored=token_lists)
def test_removing_every_child_leaves_no_link(stored) -> None:
    with tree() as children:
        for child in dict.fromkeys([children.insert(tokens) for tokens in stored]):
            children.remove(child, tokens_known=len(children.tokens) % 2 == 0)
        with children.table.txn.cursor(db=children.table.database) as cursor:
            assert not cursor.first()


def test_children_that_share_many_tokens_are_told_apart() -> None:
    with tree() as children:
        for number in range(300):
            children.insert([9] * 144 + [number])
        assert children.longest([9] * 144 + [77, 5]) == 145
        assert children.longest([9] * 144 + [301]) == 144
        assert children.longest([9] * 20) == 20


def test_a_search_reads_the_tokens_of_one_child_however_many_there_are() -> None:
    with tree() as children:
        for number in range(300):
            children.insert([9] * 40 + [number])
        reads: list[bytes] = []

        def read_tokens(child: bytes) -> bytes | None:
            reads.append(child)
            return children.tokens.get(child)

        assert children.table.find_longest_run(PARENT, as_bytes([9] * 40 + [3]), read_tokens)
        assert len(reads) == 1


@pytest.mark.parametrize("tokens", [[], [1], [0] * 16, [2**32 - 1] * 16])
def test_a_key_says_what_was_put_into_it(tokens: list[int]) -> None:
    link = ChildRow(PARENT, as_bytes(tokens), 3, OTHER)
    assert ChildRow.unpack(link.key) == link
    assert len(link.key) == 98
