"""Which sequences read a prefix together, judged from block tables alone."""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from tierkv.engine.cascade import CascadeCost, SharedPrefix, plan_cascade
from tierkv.errors import ConfigError

SIZE = 256
FREE = CascadeCost(
    heads=1, kv_heads=1, head_dim=1, token_bytes=1, bytes_per_s=1.0, flops_per_s=1e9, overhead_s=0.0, tile_rows=1
)
"""A cost by which every shared block pays: what is read once costs what one sequence reads."""

LLAMA = CascadeCost.of_gpu(heads=32, kv_heads=8, head_dim=128, token_bytes=4096)


def plan(tables: list[list[int]], past: list[int] | None = None, cost: CascadeCost = FREE) -> list[SharedPrefix]:
    return list(plan_cascade(tables, past or [len(t) * SIZE for t in tables], block_size=SIZE, cost=cost))


def batch(count: int, shared_tokens: int, own_blocks: int = 1) -> list[list[int]]:
    """Return block tables of `count` sequences with one shared prefix."""
    prefix = list(range(shared_tokens // SIZE))
    return [[*prefix, *(10_000 + row * own_blocks + i for i in range(own_blocks))] for row in range(count)]


def test_a_prefix_that_all_share_is_one_group() -> None:
    assert plan([[1, 2, 3, 9], [1, 2, 3], [1, 2, 3, 4, 5]]) == [SharedPrefix((0, 1, 2), 3)]


def test_sequences_that_share_nothing_are_left_alone() -> None:
    assert plan([[1, 2], [3, 4], [5]]) == []
    assert plan([[1, 2]]) == []
    assert plan([]) == []


def test_equal_blocks_behind_a_different_one_are_not_a_prefix() -> None:
    assert plan([[1, 7, 8], [2, 7, 8]]) == []


def test_several_prefixes_in_one_batch_are_several_groups() -> None:
    tables = [[1, 2, 30], [5, 6, 7, 31], [1, 2, 32], [9], [5, 6, 7, 33]]
    assert plan(tables) == [SharedPrefix((0, 2), 2), SharedPrefix((1, 4), 3)]


def test_only_whole_blocks_before_the_new_token_are_shared() -> None:
    """The block that is being written is a sequence's own, though another may hold the same one."""
    tables = [[1, 2, 3], [1, 2, 3]]
    assert plan(tables, [2 * SIZE, 3 * SIZE - 1]) == [SharedPrefix((0, 1), 2)]
    assert plan(tables, [3 * SIZE, 3 * SIZE]) == [SharedPrefix((0, 1), 3)]
    assert plan(tables, [SIZE - 1, 3 * SIZE]) == []


def test_a_short_common_prefix_gives_way_to_longer_ones_of_fewer() -> None:
    left, right = [[0, *range(10, 30), 40 + i] for i in range(4)], [[0, *range(50, 70), 80 + i] for i in range(4)]
    assert plan(left + right) == [SharedPrefix((0, 1, 2, 3), 21), SharedPrefix((4, 5, 6, 7), 21)]


def test_a_long_common_prefix_is_not_given_up_for_a_little_more() -> None:
    tables = [[*range(20), 30, 40 + i] for i in range(3)] + [[*range(20), 50 + i] for i in range(3)]
    assert plan(tables) == [SharedPrefix((0, 1, 2, 3, 4, 5), 20)]


@pytest.mark.parametrize(
    ("count", "shared", "pays"),
    [
        (8, 1024, False),  # 19 microseconds either way
        (16, 1024, True),
        (64, 1024, True),
        (8, 8192, True),
        (64, 8192, True),
        (2, 256, False),
    ],
)
def test_the_rule_on_a_gpu_follows_what_was_measured(count: int, shared: int, pays: bool) -> None:
    assert bool(plan(batch(count, shared), cost=LLAMA)) is pays


def test_what_does_not_pay_alone_may_pay_together() -> None:
    """The launches are paid once a layer, for however many groups."""
    groups = [[[100 * g, 100 * g + 1, 5000 + 10 * g + i] for i in range(12)] for g in range(6)]
    assert plan(groups[0], cost=LLAMA) == []
    assert len(plan([table for group in groups for table in group], cost=LLAMA)) == 6


def test_packing_the_heads_of_a_kv_head_fills_tiles_of_small_batches() -> None:
    assert LLAMA.padded_queries(64) == 64 * 32
    assert LLAMA.padded_queries(8) == 64 * 8
    assert LLAMA.padded_queries(65) == 320 * 8


def brute_force(tables: list[list[int]], cost: CascadeCost) -> float:
    """Return the most that can be saved, by trying every set of sequences as the group of the first."""

    def best(rows: tuple[int, ...]) -> float:
        if len(rows) < 2:
            return 0.0
        first, rest = rows[0], rows[1:]
        found = best(rest)
        for count in range(1, len(rest) + 1):
            for others in combinations(rest, count):
                group = [tables[row] for row in (first, *others)]
                depth = next(
                    (i for i, column in enumerate(zip(*group, strict=False)) if len(set(column)) > 1),
                    min(map(len, group)),
                )
                left = tuple(row for row in rest if row not in others)
                found = max(found, cost.saving_s(1 + count, depth * SIZE) + best(left))
        return found

    return best(tuple(range(len(tables))))


@pytest.mark.parametrize("seed", range(40))
def test_no_other_grouping_saves_more(seed: int) -> None:
    choose = random.Random(seed)
    tables = [[depth * 10 + choose.randint(0, 1) for depth in range(choose.randint(0, 4))] for _ in range(6)]
    for row, table in enumerate(tables):  # a block follows one block only
        for depth in range(1, len(table)):
            table[depth] += 100 * table[depth - 1]
        table.append(-row)
    groups = plan(tables)
    saved = sum(FREE.saving_s(len(group.rows), group.num_blocks * SIZE) for group in groups)
    assert saved == pytest.approx(brute_force(tables, FREE))
    rows = [row for group in groups for row in group.rows]
    assert len(rows) == len(set(rows))
    for group in groups:
        heads = {tuple(tables[row][: group.num_blocks]) for row in group.rows}
        assert len(heads) == 1


@pytest.mark.parametrize("bad", [{"heads": 3}, {"token_bytes": 0}, {"bytes_per_s": 0.0}, {"overhead_s": -1.0}])
def test_costs_that_cannot_be_are_refused(bad: dict[str, float]) -> None:
    known = {"heads": 4, "kv_heads": 2, "head_dim": 8, "token_bytes": 64}
    speeds = {"bytes_per_s": 1.0, "flops_per_s": 1.0, "overhead_s": 0.0}
    with pytest.raises(ConfigError):
        CascadeCost(**{**known, **speeds, **bad})  # type: ignore[arg-type]
