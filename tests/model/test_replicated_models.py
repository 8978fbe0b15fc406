"""DeepSeek models over real ranks: what every rank computes as a whole is stored once, and serves all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_worker import prompt_of
from test_tensor_parallel import COLD, Ranks, cached

LENGTH = len(prompt_of("cpu"))
RECORDS = 5  # three whole blocks, the last one with what was generated, and the partial one of the prompt


def ranks_of(directory: Path, size: int) -> Ranks:
    ranks = Ranks(directory, "cpu")
    ranks.size = size
    return ranks


def values(seen: list[Any], name: str) -> list[Any]:
    return [one[name].item() for one in seen]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "family"),
    [(2, "deepseek_v2 with q_lora and yarn"), (4, "deepseek_v2"), (2, "deepseek_v3"), (4, "deepseek_v3 with yarn")],
)
def test_the_latent_is_stored_once_and_every_rank_restarts_from_it(tmp_path: Path, size: int, family: str) -> None:
    ranks = ranks_of(tmp_path, size)
    (first,) = ranks.run(f"generate:{family}")
    again, damaged, fixed = _damaged_after_a_restart(ranks, family)
    for seen in (first, again, damaged, fixed):
        assert values(seen, "is_latent") == [True] * size
        assert len(set(values(seen, "namespace"))) == 1
        ranks.assert_answers(family, seen)
    assert [int(one["cached"].sum()) for one in first] == [0] * size
    assert values(first, "written_bytes")[0] > 0
    assert values(first, "written_bytes")[1:] == [0] * (size - 1)
    assert len(set(values(first, "records"))) == 1
    assert cached(again, COLD) == cached(fixed, COLD) == [LENGTH - 1] * size
    assert values(again, "records") == values(first, "records")
    assert [int(one["cached"].sum()) for one in damaged] == [16] * size
    assert all("corrupt=1" in one["reasons"] for one in damaged)


def _damaged_after_a_restart(ranks: Ranks, family: str) -> tuple[list[Any], list[Any], list[Any]]:
    again, _, damaged, fixed = ranks.run(
        f"generate:{family}", f"damage_one:{family}", f"generate:{family}", f"generate:{family}"
    )
    return again, damaged, fixed


@pytest.mark.slow
def test_k_and_v_are_stored_once_only_if_every_rank_holds_all_heads(tmp_path: Path) -> None:
    ranks = ranks_of(tmp_path, 2)
    whole, again, split = ranks.run(
        "generate_expanded:deepseek_v3", "generate_expanded:deepseek_v3", "generate_expanded:deepseek_v2"
    )
    assert values(whole, "is_latent") == values(split, "is_latent") == [False, False]
    assert values(whole, "kv_heads") == [4, 4]
    assert values(split, "kv_heads") == [2, 2]
    assert len(set(values(whole, "namespace"))) == 1
    assert len(set(values(split, "namespace"))) == 2
    assert [each > 0 for each in values(whole, "written_bytes")] == [True, False]
    assert [each > 0 for each in values(split, "written_bytes")] == [True, True]
    assert cached(again, COLD) == [LENGTH - 1] * 2
    ranks.assert_answers("deepseek_v3", again)
    ranks.assert_answers("deepseek_v2", split)
