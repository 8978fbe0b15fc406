"""A rank that dies at any step of an agreement: the others have one decision, in bounded time, or a clear error."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from torch import distributed

from tierkv.errors import RankError
from tierkv.ranks.group import Vote
from tierkv.ranks.torch_ranks import TorchRanks

NUM_ROUNDS = 3
TIMEOUT_S = 0.05
TOPIC = b"prompt"


class Killed(BaseException):
    """Ends a rank in the middle of whatever it does."""


class DyingStore:
    """A store whose user dies at a call. num_calls: made so far."""

    def __init__(self, store: Any, *, dies_at: int | None) -> None:
        self._store = store
        self._dies_at = dies_at
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)

        def call(*args: Any) -> Any:
            if self.num_calls == self._dies_at:
                raise Killed(name)
            self.num_calls += 1
            return method(*args)

        return call


def rounds_of(store: Any, rank: int, size: int, timeout_s: float) -> list[list[Vote] | None]:
    """Vote in every round, as one rank; return what each decided, as far as this rank came."""
    ranks = TorchRanks(store, rank=rank, size=size, timeout_s=timeout_s)
    decided: list[list[Vote] | None] = []
    try:
        for number in range(NUM_ROUNDS):
            decided.append(ranks.agree((10 * number + rank, rank), topic=TOPIC))
    except Killed:
        pass
    return decided


def run(size: int, dies_at: int | None) -> tuple[list[list[list[Vote] | None]], DyingStore, float]:
    """Let one rank die at a call to the store. Return what each rank decided, that rank's store, and the seconds."""
    shared = distributed.HashStore()
    dying = DyingStore(shared, dies_at=dies_at)
    started = time.monotonic()
    timeout_s = 60 if dies_at is None else TIMEOUT_S
    with ThreadPoolExecutor(size) as threads:
        futures = [
            threads.submit(rounds_of, dying if rank == size - 1 else shared, rank, size, timeout_s)
            for rank in range(size)
        ]
        decided = [future.result(60) for future in futures]
    return decided, dying, time.monotonic() - started


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_ranks_that_are_left_decide_the_same_in_bounded_time(size: int) -> None:
    whole, store, _ = run(size, None)
    votes = [[(10 * number + rank, rank) for rank in range(size)] for number in range(NUM_ROUNDS)]
    assert whole == [votes] * size
    assert store.num_calls >= 4 * NUM_ROUNDS
    for dies_at in range(store.num_calls):
        decided, _, took_s = run(size, dies_at)
        left, dead = decided[:-1], decided[-1]
        assert left == left[:1] * (size - 1), "they go on with unlike numbers"
        assert left[0][: len(dead)] == dead, "the dead rank had another decision"
        assert all(each in (None, want) for each, want in zip(left[0], votes, strict=True))
        assert dies_at or left[0] == [None] * NUM_ROUNDS
        assert took_s < NUM_ROUNDS * TIMEOUT_S + 10


RANK = """
import sys
from tierkv.errors import RankError
from tierkv.ranks.torch_ranks import TorchRanks
from torch import distributed
rank, size, port = map(int, sys.argv[1:])
store = distributed.TCPStore("127.0.0.1", port, is_master=rank == 0, wait_for_workers=False)
ranks = TorchRanks(store, rank=rank, size=size, timeout_s=3)
assert ranks.agree((1,), topic=b"a") == [(1,)] * size
print("ready", flush=True)
sys.stdin.readline()
try:
    print(ranks.agree((2,), topic=b"b"), flush=True)
    print(ranks.receive(timeout_s=3) if rank else None, flush=True)
except RankError as exc:
    print("RankError", exc, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_a_decision_or_a_clear_error_in_bounded_time(killed: int) -> None:
    probe = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = probe.port
    del probe
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), "2", str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None and rank.stdout.readline() == "ready\n"
        ranks[killed].kill()
        ranks[killed].wait()
        started = time.monotonic()
        said, _ = ranks[1 - killed].communicate("go\n", timeout=60)
        assert time.monotonic() - started < 30
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert said.startswith("RankError" if killed == 0 else "None\n"), said


def test_a_first_rank_whose_messages_nobody_reads_says_so() -> None:
    ranks = TorchRanks(distributed.HashStore(), rank=0, size=2, timeout_s=0.05)
    for _ in range(128):
        ranks.send(b"news")
    with pytest.raises(RankError, match="does not read"):
        ranks.send(b"news")


def test_messages_come_in_order_and_leave_the_store() -> None:
    store = distributed.HashStore()
    first, other = (TorchRanks(store, rank=rank, size=2, timeout_s=5) for rank in range(2))
    for number in range(300):
        first.send(b"%d" % number)
        assert other.receive(timeout_s=5) == b"%d" % number
    assert other.receive(timeout_s=0.01) is None
    assert store.num_keys() < 140
