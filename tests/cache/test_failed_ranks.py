"""A rank that fails while it lives, or dies inside a request: the others end in bounded time, and say why."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rank_crew import Crew, ids
from torch import distributed

from tierkv.errors import CapacityError, RankError
from tierkv.ranks.group import OneRank, Vote
from tierkv.ranks.monitor import RankMonitor, open_monitor
from tierkv.ranks.torch_ranks import TorchRanks
from tierkv.requests.sequence import Sequence

PROMPT = ids(16)


def two_ranks(**options: Any) -> list[TorchRanks]:
    store = distributed.HashStore()
    ranks = [TorchRanks(store, rank=rank, size=2, timeout_s=60, **options) for rank in range(2)]
    for each in ranks:
        each.begin_session()
    return ranks


@contextmanager
def monitor_of(ranks: TorchRanks, peer: TorchRanks, **options: Any) -> Iterator[tuple[RankMonitor, threading.Event]]:
    ended = threading.Event()
    chosen = {"silent_s": 60.0, "grace_s": 0.2, "poll_s": 0.02, "end": ended.set} | options
    monitor = RankMonitor(ranks, **chosen)
    peer.begin_session()  # both open a model
    try:
        yield monitor, ended
    finally:
        monitor.close()
        assert not monitor._thread.is_alive()


@pytest.mark.parametrize(
    "wait",
    [
        lambda ranks: ranks.agree((1,), topic=b"x"),
        lambda ranks: ranks.gather(b"x"),
        lambda ranks: ranks.receive(timeout_s=60),
    ],
    ids=["agree", "gather", "receive"],
)
def test_a_rank_that_waits_hears_of_the_failure_long_before_its_time_is_over(wait: Callable[[TorchRanks], Any]) -> None:
    first, other = two_ranks()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(wait, other)
        first.fail("ValueError: the model broke")
        started = time.monotonic()
        with pytest.raises(RankError, match="another rank has failed: rank 0: ValueError: the model broke"):
            waiting.result(30)
        assert time.monotonic() - started < 20


def test_the_rank_that_failed_is_not_told_of_itself_and_the_first_failure_is_named() -> None:
    first, other = two_ranks()
    first.fail("broke")
    other.fail("its connection was closed")
    assert first.failure(silent_s=60) is None
    assert other.failure(silent_s=60) == "rank 0: broke"


def test_a_model_that_is_opened_anew_knows_nothing_of_earlier_failures() -> None:
    first, other = two_ranks()
    first.fail("broke")
    for each in (first, other):
        each.begin_session()
    assert other.failure(silent_s=60) is None


def test_a_rank_that_gives_no_sign_of_life_has_gone_and_one_that_does_has_not() -> None:
    first, other = two_ranks()
    assert first.failure(silent_s=0.1) is None
    assert other.failure(silent_s=0.1) is None
    deadline = time.monotonic() + 0.3
    while time.monotonic() < deadline:
        first.failure(silent_s=60)
        assert other.failure(silent_s=10) is None
    time.sleep(0.2)
    assert "rank 0 has given no sign of life" in str(other.failure(silent_s=0.1))


def test_a_store_that_is_gone_is_a_failure() -> None:
    class Gone(distributed.Store):
        def set(self, key: str, value: str) -> None:
            raise distributed.DistNetworkError("connection reset by peer")

    ranks = TorchRanks(Gone(), rank=1, size=2)
    assert "has gone (connection reset by peer)" in str(ranks.failure(silent_s=60))
    ranks.fail("no other rank is left")  # raises nothing


def test_a_step_that_raises_is_told_to_the_others_and_raises_its_own_error() -> None:
    first, other = two_ranks()
    with (
        monitor_of(other, first) as (monitor, _),
        pytest.raises(ValueError, match="broke"),
        monitor.step(),
        monitor.step(),
    ):
        raise ValueError("broke")
    assert first.failure(silent_s=60) == "rank 1: ValueError: broke"


def test_an_error_that_another_ranks_failure_caused_names_that_rank() -> None:
    first, other = two_ranks()
    with monitor_of(other, first) as (monitor, _):
        first.fail("MemoryError: none left")
        with pytest.raises(RankError, match="rank 0: MemoryError: none left") as raised, monitor.step():
            raise RuntimeError("Connection closed by peer")
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert first.failure(silent_s=60) is None  # this rank did not fail by itself


def test_a_step_that_waits_for_a_failed_rank_ends_with_the_process_and_its_readers_hear_of_it_first() -> None:
    first, other = two_ranks()
    heard: list[RankError] = []
    with monitor_of(other, first) as (monitor, ended):
        monitor.on_failure = heard.append
        with monitor.step():
            assert not ended.wait(0.3), "nothing has failed yet"
            first.fail("broke")
            assert ended.wait(20)
        assert "rank 0: broke" in str(heard[0])


def test_a_step_that_ends_in_time_does_not_end_the_process_nor_does_a_rank_between_steps() -> None:
    first, other = two_ranks()
    with monitor_of(other, first, grace_s=0.5) as (monitor, ended):
        first.fail("broke")
        time.sleep(0.2)  # no step: the thread of the caller will find out
        with monitor.step():
            time.sleep(0.1)
        assert not ended.wait(1.0)


def test_one_rank_and_other_groups_are_not_watched() -> None:
    with open_monitor(OneRank()) as monitor:
        assert monitor is None
    with open_monitor(two_ranks()[0]) as monitor:
        assert monitor is not None


class Killed(BaseException):
    """Ends a rank in the middle of a request."""


def crew_of(path: Path, count: int, *, timeout_s: float) -> Crew:
    return Crew(path, "cpu", hot=(16,) * count, warm=8, timeout_s=timeout_s)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_rank_that_dies_at_any_agreement_of_a_request_leaves_the_others_right_or_refused(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, agree = tmp_path / "store", TorchRanks.agree
    num_votes, dies_at = 0, -1

    def counted(ranks: TorchRanks, vote: Vote, *, topic: bytes) -> list[Vote] | None:
        nonlocal num_votes
        if ranks.rank == count - 1:
            if num_votes == dies_at:
                raise Killed
            num_votes += 1
        return agree(ranks, vote, topic=topic)

    crew = crew_of(path, count, timeout_s=60)
    crew.compute(PROMPT)
    crew.close()
    monkeypatch.setattr(TorchRanks, "agree", counted)
    crew = crew_of(path, count, timeout_s=60)
    whole = crew.each(outcome)
    assert [each.num_cached_tokens for each in whole] == [16] * count
    release_some(crew, whole)
    crew.close()
    assert num_votes >= 2, "cold blocks take two agreements"
    for dies_at in range(num_votes):  # noqa: B007 - `counted` reads it
        num_votes = 0
        crew = crew_of(path, count, timeout_s=0.3)
        started = time.monotonic()
        *left, last = crew.each(outcome)
        assert time.monotonic() - started < 60
        assert isinstance(last, Killed)
        found = [each for each in left if isinstance(each, Sequence)]
        for engine, each in zip(crew.engines, left, strict=False):
            if isinstance(each, Sequence):
                engine.check(each)  # every byte of what it says is cached
        assert len({each.num_cached_tokens for each in found}) <= 1, "the ranks go on with unlike numbers"
        assert not found or found[0].num_cached_tokens == 0, "a rank that did not vote has nothing"
        release_some(crew, left)
        crew.close()


def outcome(engine: Any) -> Any:
    """Return the sequence of the prompt, or what was raised in its place."""
    try:
        return engine.cache.acquire([*PROMPT, 99])
    except (RankError, CapacityError, Killed) as exc:
        return exc


def release_some(crew: Crew, found: list[Any]) -> None:
    for cache, each in zip(crew.caches, found, strict=False):
        if isinstance(each, Sequence):
            cache.release(each)
