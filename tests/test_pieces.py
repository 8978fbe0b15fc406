"""Pieces of attention: they cover what must be seen, once, and fit the budget."""

from __future__ import annotations

import pytest

from tierkv.engine.pieces import AttentionShape, iter_pieces, plan_pieces
from tierkv.errors import CapacityError


def shape(queries: int, keys: int, batch: int = 1) -> AttentionShape:
    return AttentionShape(
        batch=batch, query_tokens=queries, key_tokens=keys, heads=8, kv_heads=2, head_dim=64, item_bytes=2
    )


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 5000), (33, 40), (700, 700), (1024, 9000)])
@pytest.mark.parametrize("budget", [200_000, 300_000, 1_000_000, 10_000_000])
def test_pieces_cover_what_each_query_sees_exactly_once(
    is_streamed: bool, queries: int, keys: int, budget: int
) -> None:
    asked = shape(queries, keys, batch=2)
    sizes = plan_pieces(asked, budget_bytes=budget, is_streamed=is_streamed)
    seen = {(item, query): 0 for item in range(2) for query in range(queries)}
    for piece in iter_pieces(asked, sizes):
        assert 0 < piece.last_query - piece.first_query <= sizes.query_tokens
        assert 0 < piece.last_key - piece.first_key <= sizes.key_tokens
        for query in range(piece.first_query, piece.last_query):
            assert seen[piece.item, query] == piece.first_key or piece.first_key > query + keys - queries
            seen[piece.item, query] = piece.last_key
        assert piece.is_first == (piece.first_key == 0)
        assert piece.is_last == (piece.last_key == keys - queries + piece.last_query)
    for (_, query), last_key in seen.items():
        assert last_key > query + keys - queries


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("budget", range(150_000, 4_000_000, 77_777))
def test_pieces_fit_their_budget(is_streamed: bool, budget: int) -> None:
    asked = shape(1000, 4000)
    sizes = plan_pieces(asked, budget_bytes=budget, is_streamed=is_streamed)
    assert sizes.work_bytes <= budget
    if not sizes.is_whole:
        kv = (2 if is_streamed else 1) * sizes.key_tokens * asked.key_bytes
        assert kv + sizes.query_tokens * asked.query_bytes <= budget


def test_a_budget_for_everything_makes_one_piece() -> None:
    asked = shape(100, 200, batch=3)
    enough = asked.kv_bytes + 4 * 3 * 100 * 8
    assert plan_pieces(asked, budget_bytes=enough, is_streamed=True).is_whole
    assert not plan_pieces(asked, budget_bytes=enough - 1, is_streamed=True).is_whole
    assert plan_pieces(asked, budget_bytes=None, is_streamed=False).is_whole


def test_a_budget_below_the_smallest_piece_is_refused_and_says_what_would_do() -> None:
    asked = shape(100, 200)
    with pytest.raises(CapacityError, match="at least") as refused:
        plan_pieces(asked, budget_bytes=1000, is_streamed=True)
    assert refused.value.hint is not None
    least = int(refused.value.hint.split()[2])
    plan_pieces(asked, budget_bytes=least, is_streamed=True)
    with pytest.raises(CapacityError):
        plan_pieces(asked, budget_bytes=least - 1, is_streamed=True)


def test_more_budget_means_fewer_bytes_over_the_link() -> None:
    asked = shape(4096, 4096)

    def moved(budget: int) -> int:
        sizes = plan_pieces(asked, budget_bytes=budget, is_streamed=True)
        return sum(piece.last_key - piece.first_key for piece in iter_pieces(asked, sizes))

    amounts = [moved(budget) for budget in (200_000, 800_000, 2_000_000, 5_000_000, 20_000_000)]
    assert amounts == sorted(amounts, reverse=True)
    assert amounts[-1] == 4096
