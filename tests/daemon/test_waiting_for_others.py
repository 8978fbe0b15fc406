"""Whatever is hot here, there, and computed by others: a request asks a bounded number of times, and waits for no one
who computes nothing that it lacks.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from core_model import BLOCK_SIZE, SLOT_BYTES, Client, DictStore, Stored, as_bytes

import tierkv.transfer.daemon_blocks
from tierkv.daemon.core import Core
from tierkv.daemon.messages import EndClaim, Found, Match, Release, Wait, Waited
from tierkv.daemon.values import Claim
from tierkv.transfer.daemon_blocks import DaemonBlocks
from tierkv.values.block import hash_block

NUM_BLOCKS = 3
TOKENS = as_bytes(list(range(NUM_BLOCKS * BLOCK_SIZE)))
WAIT_S = 5.0
SUBSETS = [set(each) for size in range(NUM_BLOCKS + 1) for each in itertools.combinations(range(NUM_BLOCKS), size)]


class FakeConnection:
    """Asks the daemon's own core, without a socket. A wait for what is computed takes its whole time.

    publishes: what becomes of the blocks that another client computes once somebody has waited for one of them.
    """

    is_retired = False

    def __init__(self, has: set[int], computes: set[int], *, publishes: bool = False) -> None:
        self.now = 0.0
        self.num_sent = 0
        self.num_long_waits = 0
        self.publishes = publishes
        self.store = DictStore()
        self.core = Core(64 * SLOT_BYTES, clock=lambda: self.now, store=self.store, extent_bytes=SLOT_BYTES)
        self.me = Client(self.core, {}, b"n" * 16, hash_block)
        self.other = Client(self.core, {}, b"n" * 16, hash_block)
        self.hashes = self.me.chain(TOKENS)
        for at in has:
            self.put(at)
        self.promise(computes)

    def put(self, at: int) -> None:
        parent = self.hashes[at - 1] if at else b"n" * 16
        step = BLOCK_SIZE * 4
        self.store.blocks[self.hashes[at]] = Stored(parent, TOKENS[at * step : (at + 1) * step], b"", (b"", b""))

    def promise(self, computes: set[int]) -> None:
        if computes:
            claim = Claim(1000, self.other.connection, {self.hashes[at] for at in computes}, 1e9)
            connection = self.other.connection
            connection.require_tenant().claims.update(dict.fromkeys(claim.hashes, claim))
            connection.claims[claim.number] = claim
            connection.num_claimed += len(claim.hashes)
            self.core.claims.num_blocks += len(claim.hashes)

    def match(self, asked: Match) -> Found:
        found: Found = self.call(asked, Found)
        return found

    def call(self, message: Any, expected: type, *, timeout_s: float | None = None) -> Any:
        self.num_sent += 1
        if isinstance(message, Match):
            return self.core.match(self.me.connection, message)
        assert isinstance(message, Wait)
        if not self.core.claims.is_computing(self.me.connection, message.block_hash):
            return Waited(is_over=False)
        self.num_long_waits += 1
        if self.publishes:
            for claim in list(self.other.connection.claims.values()):
                for at, block_hash in enumerate(self.hashes):
                    if block_hash in claim.hashes:
                        self.put(at)
                self.core.claims.end(self.other.connection, claim.number)
            self.now += 0.5
            return Waited(is_over=False)
        self.now += message.timeout_ms / 1e3
        return Waited(is_over=True)

    def post(self, message: Any) -> None:
        self.num_sent += 1
        if isinstance(message, EndClaim):
            self.core.claims.end(self.me.connection, message.claim)
        else:
            assert isinstance(message, Release)
            self.core.release(self.me.connection, message)


def ask(connection: FakeConnection, num_hot: int, monkeypatch: pytest.MonkeyPatch) -> tuple[DaemonBlocks, Found]:
    monkeypatch.setattr(tierkv.transfer.daemon_blocks.time, "monotonic", lambda: connection.now)
    blocks = DaemonBlocks(
        None,  # type: ignore[arg-type]
        lambda: None,
        block_size=BLOCK_SIZE,
        hash_function=hash_block,
        wait_s=WAIT_S,
        timeout_s=1.0,
        min_partial_tokens=1,
    )
    message = Match(hashes=b"".join(connection.hashes), tokens=TOKENS, start=num_hot, lease=True, wants_claim=True)
    answer = blocks.match(connection, message, connection.hashes)  # type: ignore[arg-type]
    monkeypatch.undo()
    return blocks, answer


@pytest.mark.parametrize("num_hot", range(NUM_BLOCKS + 1))
@pytest.mark.parametrize("publishes", [False, True])
def test_every_combination_ends_with_few_messages_in_time(
    num_hot: int, publishes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has, computes in itertools.product(SUBSETS, SUBSETS):
        connection = FakeConnection(has, computes, publishes=publishes)
        _, answer = ask(connection, num_hot, monkeypatch)
        case = f"{num_hot} hot here, {has} there, {computes} computed by another"
        assert connection.now <= WAIT_S + 0.5, case
        assert connection.num_sent <= 3 * (tierkv.transfer.daemon_blocks._MOST_VAIN_WAITS + NUM_BLOCKS + 1), case
        num_found = num_hot + len(answer.slots) // 4
        if num_found == NUM_BLOCKS:
            assert answer.claim == 0, case
            assert not connection.me.connection.claims, f"{case}: others would wait for blocks that are never computed"
        is_awaited = num_found < NUM_BLOCKS and num_found in computes
        if not publishes and not is_awaited:
            assert connection.num_long_waits == 0, f"{case}: waited for a block that no process computes"
        connection.core.check()


def test_who_lacks_only_what_another_computes_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = FakeConnection(set(), {0, 1, 2}, publishes=True)
    blocks, answer = ask(connection, 0, monkeypatch)
    assert len(answer.slots) == 4 * NUM_BLOCKS
    assert blocks.num_waits == 1


def test_who_waits_goes_on_waiting_for_another_who_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one who computes dies, and a third client has the promise before this one asks again: twice."""
    connection = FakeConnection(set(), {0, 1, 2})
    deaths = [1, 2]
    own = connection.call

    def call(message: Any, expected: type, *, timeout_s: float | None = None) -> Any:
        if isinstance(message, Wait) and deaths:
            deaths.pop()
            for claim in list(connection.other.connection.claims):
                connection.core.claims.end(connection.other.connection, claim)
            connection.promise({0, 1, 2})
            return Waited(is_over=False)
        connection.publishes = True
        return own(message, expected, timeout_s=timeout_s)

    monkeypatch.setattr(connection, "call", call)
    blocks, answer = ask(connection, 0, monkeypatch)
    assert len(answer.slots) == 4 * NUM_BLOCKS
    assert blocks.num_waits == 3
