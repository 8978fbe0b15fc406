"""Ranks that vote through a store: one decision for all, also for ranks that vote late or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from torch import distributed

from tierkv.errors import ConfigError, RankError
from tierkv.ranks.group import Agreement, OneRank, RankGroup, agree_min
from tierkv.ranks.torch_ranks import TorchRanks

T = TypeVar("T")
SIZE = 3


def stores_in_memory(_: Path) -> list[Any]:
    return [distributed.HashStore()] * SIZE


def stores_in_a_file(path: Path) -> list[Any]:
    return [distributed.FileStore(str(path / "votes"), SIZE) for _ in range(SIZE)]


def stores_over_tcp(_: Path) -> list[Any]:
    server = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    clients = [distributed.TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(SIZE - 1)]
    return [server, *clients]


@pytest.fixture(params=[stores_in_memory, stores_in_a_file, stores_over_tcp])
def stores(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    opened: list[Any] = request.param(tmp_path)
    return opened


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(SIZE) as pool:
        yield pool


def ranks_of(stores: list[Any], **options: Any) -> list[TorchRanks]:
    return [TorchRanks(store, rank=rank, size=len(stores), **options) for rank, store in enumerate(stores)]


def together(threads: ThreadPoolExecutor, ranks: list[TorchRanks], call: Callable[[TorchRanks], T]) -> list[T]:
    return [future.result(60) for future in [threads.submit(call, rank) for rank in ranks]]


def test_the_lowest_vote_is_every_ranks_decision(stores: list[Any], threads: ThreadPoolExecutor) -> None:
    ranks = ranks_of(stores)
    got = together(threads, ranks, lambda rank: agree_min(rank, 10 + rank.rank, topic=b"prompt"))
    assert got == [Agreement(10, False)] * SIZE
    same = together(threads, ranks, lambda rank: agree_min(rank, 7, topic=b"prompt"))
    assert same == [Agreement(7, True)] * SIZE


def test_each_round_is_a_decision_of_its_own(stores: list[Any], threads: ThreadPoolExecutor) -> None:
    ranks = ranks_of(stores)
    rounds = together(
        threads, ranks, lambda rank: [agree_min(rank, i + rank.rank, topic=b"x").lowest for i in range(-2, 40)]
    )
    assert rounds == [list(range(-2, 40))] * SIZE


def test_a_rank_that_does_not_vote_in_time_means_nothing_and_reads_so_when_it_comes(stores: list[Any]) -> None:
    ranks = ranks_of(stores, timeout_s=0.05)
    first = [agree_min(rank, 500, topic=b"prompt") for rank in ranks[:2]]
    late = agree_min(ranks[2], 500, topic=b"prompt")
    assert [*first, late] == [Agreement(0, False)] * SIZE


def test_after_a_time_out_the_ranks_agree_again(stores: list[Any], threads: ThreadPoolExecutor) -> None:
    ranks = ranks_of(stores, timeout_s=0.05)
    for rank in ranks:
        assert agree_min(rank, 5, topic=b"first").lowest == 0
    for rank in ranks:
        rank._timeout = timedelta(seconds=60)
    got = together(threads, ranks, lambda rank: agree_min(rank, 9, topic=b"second"))
    assert got == [Agreement(9, True)] * SIZE


def test_votes_on_different_things_are_an_error_on_every_rank(stores: list[Any], threads: ThreadPoolExecutor) -> None:
    def vote(rank: TorchRanks) -> str:
        with pytest.raises(RankError, match="lost step"):
            agree_min(rank, 5, topic=b"A" if rank.rank else b"B")
        return "refused"

    assert together(threads, ranks_of(stores), vote) == ["refused"] * SIZE


def test_every_rank_gathers_every_payload_in_order(stores: list[Any], threads: ThreadPoolExecutor) -> None:
    ranks = ranks_of(stores)
    for number in range(2):
        got = together(threads, ranks, lambda rank, n=number: rank.gather(b"%d of %d" % (rank.rank, n)))
        assert got == [[b"%d of %d" % (rank, number) for rank in range(SIZE)]] * SIZE


def test_a_rank_that_is_missing_when_payloads_are_gathered_is_an_error(stores: list[Any]) -> None:
    with pytest.raises(RankError, match="rank 0 of 3"):
        ranks_of(stores, gather_timeout_s=0.05)[0].gather(b"mine")


def test_decided_rounds_leave_the_store(threads: ThreadPoolExecutor) -> None:
    store = distributed.HashStore()
    together(threads, ranks_of([store] * SIZE), lambda rank: [agree_min(rank, 1, topic=b"x") for _ in range(50)])
    assert store.num_keys() <= 2 * (SIZE + 1)


def test_a_store_that_is_gone_is_an_error_since_the_others_may_have_decided() -> None:
    class Gone(distributed.Store):
        def set(self, key: str, value: str) -> None:
            raise distributed.DistNetworkError("connection reset by peer")

    with pytest.raises(RankError, match="cannot know"):
        agree_min(TorchRanks(Gone(), rank=0, size=2), 3, topic=b"x")


@pytest.mark.parametrize(
    "bad", [{"rank": 2}, {"rank": -1}, {"timeout_s": 0.0}, {"gather_timeout_s": -1.0}], ids=lambda bad: next(iter(bad))
)
def test_options_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TorchRanks(distributed.HashStore(), **{"rank": 0, "size": 2, **bad})


def test_ranks_of_a_process_group_need_one() -> None:
    with pytest.raises(ConfigError, match="init_process_group"):
        TorchRanks.of_process_group()


def test_one_rank_agrees_with_itself() -> None:
    alone: RankGroup = OneRank()
    assert agree_min(alone, 5, topic=b"anything") == Agreement(5, True)
    assert alone.gather(b"mine") == [b"mine"]
