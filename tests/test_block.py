from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierkv.errors import ConfigError
from tierkv.values.block import (
    as_token_array,
    as_token_bytes,
    chain_content_digest,
    common_run,
    hash_block,
    iter_chain,
)

ROOT = b"r" * 16
tokens = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def as_bytes(ids: list[int]) -> bytes:
    return as_token_array(ids).tobytes()


def test_the_hash_of_a_block_is_the_same_on_every_machine() -> None:
    assert hash_block(ROOT, as_bytes([1, 2, 3])).hex() == "56a3d0f5a5661ff4eb3c40fcda71c9bf"


def test_equal_tokens_after_different_parents_have_different_hashes() -> None:
    assert hash_block(ROOT, as_bytes([1])) != hash_block(b"s" * 16, as_bytes([1]))


def test_the_seal_of_a_block_is_the_same_on_every_machine() -> None:
    assert chain_content_digest(ROOT, as_bytes([1, 2, 3])) == hashlib.sha256(ROOT + as_bytes([1, 2, 3])).digest()[:16]


def test_token_ids_forged_to_have_a_given_hash_have_another_seal() -> None:
    given_ids = np.random.default_rng(1).integers(1000, 150_000, 256).astype("<u4")
    forged = given_ids.copy()
    changes = {12: 41664, 28: 19503, 44: 75217, 76: 130883, 92: 101385, 108: 54380, 124: 125950}
    changes |= {140: 134364, 156: 142608, 172: 115977, 188: 95565, 204: 132628}
    forged[list(changes)] = list(changes.values())
    left, right = given_ids.tobytes(), forged.tobytes()
    assert hash_block(ROOT, left) == hash_block(ROOT, right), "the numbers are those of a real forgery"
    assert chain_content_digest(ROOT, left) != chain_content_digest(ROOT, right)


@given(tokens, st.integers(1, 7))
def test_a_chain_has_one_hash_for_each_whole_block(ids: list[int], block_size: int) -> None:
    chain = list(iter_chain(ROOT, as_bytes(ids), block_size))
    assert len(chain) == len(ids) // block_size
    assert b"".join(block for _, block in chain) == as_bytes(ids[: len(chain) * block_size])


@given(tokens, tokens)
def test_the_common_run_is_the_longest_common_prefix(left: list[int], right: list[int]) -> None:
    want = 0
    while want < min(len(left), len(right)) and left[want] == right[want]:
        want += 1
    assert common_run(as_bytes(left), as_bytes(right)) == want


@given(tokens, tokens, tokens)
def test_prompts_with_a_common_prefix_share_at_least_that(prefix: list[int], a: list[int], b: list[int]) -> None:
    assert common_run(as_bytes(prefix + a), as_bytes(prefix + b)) >= len(prefix)


@pytest.mark.parametrize("bad", [[-1], [2**32], [1.5], ["a"], [[1, 2], [3, 4]], [[1, 2], [3]]])
def test_anything_but_a_flat_sequence_of_uint32_is_refused(bad: list[object]) -> None:
    with pytest.raises(ConfigError):
        as_token_array(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_token_ids_are_the_same_from_a_list_a_tuple_and_an_array(kind: type) -> None:
    ids = [0, 1, 2**31, 2**32 - 1]
    assert as_token_array(kind(ids)).tolist() == ids


def test_booleans_are_no_token_ids() -> None:
    with pytest.raises(ConfigError):
        as_token_array([True, False])


def test_an_array_of_the_right_kind_is_not_copied() -> None:
    ids = np.arange(4, dtype="<u4")
    assert as_token_array(ids) is ids


@given(tokens)
def test_token_bytes_are_those_of_the_array(ids: list[int]) -> None:
    assert as_token_bytes(ids) == as_token_array(ids).tobytes()
    assert as_token_bytes(ids[:1]) == as_token_array(ids[:1]).tobytes()


@pytest.mark.parametrize("bad", [[True], [-1], [1 << 32], [1.0], [None], [np.True_]])
def test_a_single_token_is_checked_like_many(bad: list[object]) -> None:
    with pytest.raises(ConfigError):
        as_token_bytes(bad)  # type: ignore[arg-type]
    assert as_token_bytes([(1 << 32) - 1]) == b"\xff" * 4


def test_a_part_of_a_chain_continues_from_the_hash_before_it() -> None:
    tokens = as_token_array(list(range(11))).tobytes()
    whole = list(iter_chain(b"r" * 16, tokens, 2))
    part = iter_chain(whole[1][0], tokens, 2, start=16, end=36)  # up to the ninth token
    assert list(part) == whole[2:4]


def test_an_array_of_the_right_type_must_be_flat_and_becomes_contiguous() -> None:
    ids = np.arange(20, dtype="<u4")
    assert as_token_array(ids[::2]).flags.c_contiguous and as_token_array(ids[::2]).tolist() == list(range(0, 20, 2))
    for bad in (ids.reshape(4, 5), ids[0].reshape(())):
        with pytest.raises(ConfigError, match="flat"):
            as_token_array(bad)
    assert as_token_array(np.arange(3, dtype=">u4")).tolist() == [0, 1, 2]
