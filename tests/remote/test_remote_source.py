"""The source: nothing that comes from a remote tier is believed, and what is good is kept on this machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from cold_blocks import LAYOUT, NAMESPACE, OTHER, block_bytes, chain_of, open_store, record_of
from test_remote_guard import FakeClient

from tierkv.errors import RemoteError
from tierkv.remote_tiers import local_copies
from tierkv.remote_tiers.guard import GuardedRemote
from tierkv.remote_tiers.local_copies import LocalCopies
from tierkv.remote_tiers.protocol import RemoteKey
from tierkv.remote_tiers.source import RemoteSource
from tierkv.remote_tiers.urls import RemoteUrl
from tierkv.storage.codecs import codec_by_name
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.values.block import BlockHash


class Block(NamedTuple):
    block_hash: BlockHash
    parent_hash: BlockHash
    token_bytes: bytes


CHAIN = chain_of(6)
BLOCKS = [Block(each.info.block_hash, each.info.parent, each.info.token_bytes) for each in CHAIN]


def key_of(record: EncodedRecord) -> RemoteKey:
    return RemoteKey(NAMESPACE.digest, record.info.block_hash)


class Remote:
    """A source over a fake client."""

    def __init__(self, url: str = "redis://host", copies: LocalCopies | None = None) -> None:
        self.client = FakeClient()
        self.guard = GuardedRemote(self.client, RemoteUrl.parse(url))
        self.guard.flush(timeout_s=10)
        self.now = 100.0
        self.source = RemoteSource([self.guard], NAMESPACE.describe(), copies=copies, clock=lambda: self.now)

    def put(self, records: list[EncodedRecord]) -> None:
        for record in records:
            self.source.write(record)
        assert self.guard.flush(timeout_s=10)

    def read(self, at: int) -> MissReason | None:
        out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
        reason = self.source.read_into(CHAIN[at].info, out, layout=LAYOUT)
        if reason is None:
            assert np.array_equal(out, block_bytes(at))
        return reason


@pytest.fixture
def remote() -> Iterator[Remote]:
    opened = Remote()
    yield opened
    opened.guard.close()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[ColdStore]:
    with open_store(tmp_path) as opened:
        opened.open_namespace(NAMESPACE)
        yield opened


def test_what_one_machine_writes_another_finds_and_reads(remote: Remote) -> None:
    remote.put(CHAIN[:4])
    other = RemoteSource([remote.guard], NAMESPACE.describe())
    assert other.lookup(CHAIN[0].info.block_hash) is None, "nothing is known before the remote tier was asked"
    assert other.find(BLOCKS) == 4
    found = other.lookup(CHAIN[3].info.block_hash)
    assert found is not None and found.parent == CHAIN[2].info.block_hash and found.num_tokens == 16
    assert other.lookup(CHAIN[4].info.block_hash) is None
    assert remote.source.find(BLOCKS) == 4
    assert [remote.read(at) for at in range(5)] == [None] * 4 + [MissReason.ABSENT]
    assert remote.guard.stats().counters["read_hits"] == 4


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


GOOD = CHAIN[0].data.tobytes()
LOSSY = encode_record(CHAIN[0].info, block_bytes(0), layout=LAYOUT, codec=codec_by_name("lossy-int8")).data.tobytes()
FOREIGN = record_of(0, namespace=OTHER).data.tobytes()
LIES = {
    "zeros of the right length": bytes(len(GOOD)),
    "nothing": b"",
    "five bytes": b"short",
    "cut": GOOD[:-1],
    "half": GOOD[: len(GOOD) // 2],
    "a flipped bit of the payload": flipped(GOOD, len(GOOD) - 5),
    "a flipped bit of the header": flipped(GOOD, 40),
    "a flipped bit of the checksum": flipped(GOOD, 9),
    "a newer version": flipped(GOOD, 4),
    "another block of the prompt": CHAIN[1].data.tobytes(),
    "another model's block": FOREIGN,
    "a lossy record": LOSSY,
    "too long": GOOD + bytes(4 << 20),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_value_that_is_not_the_record_is_a_miss_and_is_replaced(remote: Remote, lie: str) -> None:
    remote.client.values[key_of(CHAIN[0])] = LIES[lie]
    assert remote.source.find(BLOCKS) == 1
    reason = remote.read(0)
    assert reason is not None
    assert remote.guard.stats().counters[f"miss_{reason.value}"] == 1
    assert remote.source.find(BLOCKS) == 0, "it is not asked for again"
    remote.put(CHAIN[:1])
    remote.now += 2
    assert remote.client.values[key_of(CHAIN[0])] == GOOD
    assert remote.source.find(BLOCKS) == 1 and remote.read(0) is None


def test_a_block_that_is_evicted_after_the_lookup_is_a_miss(remote: Remote) -> None:
    remote.put(CHAIN[:2])
    assert remote.source.find(BLOCKS) == 2
    del remote.client.values[key_of(CHAIN[1])]
    assert remote.read(1) is MissReason.ABSENT
    assert remote.source.lookup(CHAIN[1].info.block_hash) is None


def test_what_follows_a_gap_is_forgotten(remote: Remote) -> None:
    remote.put(CHAIN[:3])
    assert remote.source.find(BLOCKS) == 3
    del remote.client.values[key_of(CHAIN[1])]
    assert remote.read(1) is MissReason.ABSENT
    remote.now += 2
    assert remote.source.find(BLOCKS) == 1
    assert remote.source.lookup(CHAIN[2].info.block_hash) is None


def test_what_a_remote_had_is_believed_for_some_seconds_only(remote: Remote) -> None:
    now = [100.0]
    source = RemoteSource([remote.guard], NAMESPACE.describe(), clock=lambda: now[0])
    remote.put(CHAIN[:1])
    assert source.find(BLOCKS) == 1 and source.lookup(CHAIN[0].info.block_hash)
    now[0] += 11
    assert source.lookup(CHAIN[0].info.block_hash) is None
    assert source.find(BLOCKS) == 1 and source.lookup(CHAIN[0].info.block_hash)


def test_a_missing_block_is_not_asked_for_at_each_step_of_an_engine(remote: Remote) -> None:
    remote.put(CHAIN[:2])
    asked = remote.client.num_calls
    for _ in range(5):
        assert remote.source.find(BLOCKS) == 2
    assert remote.client.num_calls == asked + 1
    remote.put(CHAIN[2:3])
    remote.now += 1.1
    assert remote.source.find(BLOCKS) == 3


def test_a_use_publishes_what_the_store_has_once_in_a_while(store: ColdStore) -> None:
    store.put(CHAIN[:4])
    remote, now = Remote(), [100.0]
    source = RemoteSource([remote.guard], NAMESPACE.describe(), read_record=store.read_record, clock=lambda: now[0])
    chain = [each.info.block_hash for each in CHAIN]
    for _ in range(3):
        source.touch(chain)
        assert remote.guard.flush(timeout_s=10)
    assert len(remote.client.touched) == 6
    assert set(remote.client.values) == {key_of(each) for each in CHAIN[:4]}
    now[0] += 31
    source.touch(chain)
    assert remote.guard.flush(timeout_s=10) and len(remote.client.touched) == 12
    remote.guard.close()


def test_a_partial_block_stays_local(remote: Remote) -> None:
    info = BlockInfo.first(CHAIN[0].info.token_bytes[:20], namespace=NAMESPACE.digest)
    remote.put([encode_record(info, block_bytes(0), layout=LAYOUT)])
    assert not remote.client.values


def test_a_block_that_a_later_lookup_misses_is_forgotten(remote: Remote) -> None:
    remote.put(CHAIN[:3])
    assert remote.source.find(BLOCKS) == 3
    del remote.client.values[key_of(CHAIN[1])]
    assert remote.source.find(BLOCKS) == 3, "believed for some seconds"
    remote.now += 11
    assert remote.source.find(BLOCKS) == 1
    assert remote.source.lookup(CHAIN[2].info.block_hash) is None


def test_nothing_is_known_of_a_remote_that_is_down(remote: Remote) -> None:
    remote.put(CHAIN[:3])
    assert remote.source.find(BLOCKS) == 3 and remote.source.may_answer(1)
    remote.client.failure = RemoteError("gone")
    for _ in range(3):
        remote.now += 2
        remote.source.find(BLOCKS[3:])
    assert remote.source.lookup(CHAIN[0].info.block_hash) is None
    assert not remote.source.may_answer(100)


def test_an_engine_with_slow_answers_is_not_asked_for_few_blocks() -> None:
    remote = Remote("s3://bucket?min_blocks=3")
    remote.put(CHAIN)
    assert not remote.source.may_answer(2) and remote.source.find(BLOCKS[:2]) == 0
    assert remote.source.may_answer(3) and remote.source.find(BLOCKS[:3]) == 3
    remote.guard.close()


def test_the_second_remote_is_asked_for_what_the_first_lacks() -> None:
    first, second = Remote(), Remote()
    first.put(CHAIN[:2])
    second.put(CHAIN[:5])
    both = RemoteSource([first.guard, second.guard], NAMESPACE.describe())
    assert both.find(BLOCKS) == 5
    out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
    assert [both.read_into(each.info, out, layout=LAYOUT) for each in CHAIN[:5]] == [None] * 5
    assert first.guard.stats().counters["read_hits"] == 2 and second.guard.stats().counters["read_hits"] == 3
    both.write(CHAIN[5])
    both.touch([CHAIN[0].info.block_hash])
    for each in (first, second):
        assert each.guard.flush(timeout_s=10)
        assert each.client.touched == [key_of(CHAIN[0])]
        each.guard.close()
    assert key_of(CHAIN[5]) in second.client.values
    assert first.guard.stats().counters["dropped_write_no_parent"] == 1


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 0, 5, 1, 4, 2]])
def test_what_was_read_is_kept_in_the_store_in_any_order_of_the_reads(store: ColdStore, order: list[int]) -> None:
    copies = LocalCopies(store)
    remote = Remote(copies=copies)
    remote.put(CHAIN)
    assert remote.source.find(BLOCKS) == 6
    assert [remote.read(at) for at in order] == [None] * 6
    assert copies.flush(stall_s=10)
    out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
    assert [store.read_into(each.info, out, layout=LAYOUT) for each in CHAIN] == [None] * 6
    assert remote.guard.stats().counters["kept_stored"] == 6
    assert copies.close(stall_s=10)
    remote.guard.close()


def test_a_copy_whose_parent_never_comes_is_counted_at_the_end(store: ColdStore) -> None:
    copies, counters = LocalCopies(store), Counter[str]()
    copies.keep(CHAIN[3].data, position=3, count=lambda name: counters.update([name]))
    assert copies.flush(stall_s=10)
    assert store.lookup(CHAIN[3].info.block_hash) is None
    assert copies.close(stall_s=10)
    assert counters == {"kept_no_parent": 1}
    assert copies.close(stall_s=10) and counters == {"kept_no_parent": 1}


def test_copies_that_wait_for_a_parent_take_bounded_memory(store: ColdStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_copies, "_PARENTLESS_BYTES", CHAIN[3].data.size + CHAIN[4].data.size)
    copies, counters = LocalCopies(store), Counter[str]()

    def keep(at: int) -> None:
        copies.keep(CHAIN[at].data, position=at, count=lambda name: counters.update([name]))

    for at in (1, 2, 3, 4):
        keep(at)
        assert copies.flush(stall_s=10)
    assert counters["kept_no_parent"] == 2
    assert store.put(CHAIN[:3])
    keep(5)
    assert copies.flush(stall_s=10) and counters["kept_stored"] == 3
    assert copies.close(stall_s=10)
