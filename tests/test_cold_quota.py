"""Whose quota a store has, what it takes to change it, and what must stay free on its volume."""

from __future__ import annotations

import subprocess
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from child_process import ENVIRONMENT, command
from cold_blocks import LAYOUT, QUOTA, FakeClock, block_bytes, open_store, read, record_of

from tierkv.errors import CapacityError, ConfigError, StoreError
from tierkv.storage import free_space
from tierkv.storage.cold_rows import QUOTA_KEY, map_bytes_of, padded_bytes
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord, encode_record

SIZE = padded_bytes(record_of(0).stored_bytes)
Usage = namedtuple("Usage", "total used free")

OTHER_PROCESS = """
import sys
from pathlib import Path
from cold_blocks import open_store, record_of
path, quota_bytes, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
with open_store(path) as store:
    store.set_quota(quota_bytes)
    for number in range(1000, 1000 + count):
        store.put([record_of(number, seed=number)])
"""


def set_elsewhere(path: Path, quota_bytes: int, count: int) -> None:
    """Let another process set the quota, and put so many blocks."""
    script = path / "other_process.py"
    script.write_text(OTHER_PROCESS)

    subprocess.run(command(script, path, quota_bytes, count), env=ENVIRONMENT, check=True, timeout=60)


def test_opening_a_store_with_another_quota_evicts_nothing_and_is_logged(tmp_path: Path, caplog) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(number) for number in range(20)])
    with open_store(tmp_path, quota_bytes=2 * SIZE) as store:
        assert store.quota_bytes == QUOTA
        assert store.put([record_of(99)]) == [PutOutcome.STORED]
        assert store.stats().blocks == 21 and store.stats().quota_bytes == QUOTA
    assert "has a quota of 8.0 MiB, which stays" in caplog.text


@pytest.mark.parametrize("asked", [None, QUOTA])
def test_opening_a_store_without_a_quota_or_with_its_own_logs_nothing(
    tmp_path: Path, caplog, asked: int | None
) -> None:
    open_store(tmp_path).close()
    for read_only in (False, True):
        with open_store(tmp_path, quota_bytes=asked, read_only=read_only) as store:
            assert store.quota_bytes == QUOTA
    assert not caplog.records


def test_a_quota_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        open_store(tmp_path, quota_bytes=0)
    with open_store(tmp_path) as store, pytest.raises(ConfigError):
        store.set_quota(-1)


def test_a_store_of_before_quotas_were_stored_gets_one_that_evicts_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(number) for number in range(20)])
        with store._env.write() as txn:
            txn.delete(QUOTA_KEY, db=store._databases.meta)
    with open_store(tmp_path, quota_bytes=2 * SIZE, read_only=True) as store:
        assert store.stats().blocks == 20
    with open_store(tmp_path, quota_bytes=2 * SIZE) as store:
        assert store.quota_bytes == 20 * SIZE
        store.put([record_of(99)])
        assert store.stats().blocks == 20


def test_a_damaged_quota_is_replaced_by_the_one_that_is_asked_for(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store._env.write() as txn:
        txn.put(QUOTA_KEY, b"odd", db=store._databases.meta)
    with open_store(tmp_path, quota_bytes=QUOTA // 2) as store:
        assert store.quota_bytes == QUOTA // 2


def test_a_smaller_quota_names_what_it_would_evict_and_evicts_only_on_request(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(number) for number in range(10)])
        with pytest.raises(CapacityError, match="would evict 6 blocks"):
            store.set_quota(4 * SIZE)
        assert store.stats().blocks == 10 and store.quota_bytes == QUOTA
        assert store.set_quota(20 * SIZE).blocks == 0
        assert store.set_quota(4 * SIZE, evict=True).blocks == 6
        assert store.stats().blocks == 4
        store.put([record_of(99)])
        assert store.stats().live_bytes <= 4 * SIZE
        store.check()
    with open_store(tmp_path, quota_bytes=None) as store:
        assert store.quota_bytes == 4 * SIZE


def test_pinned_blocks_outlive_a_smaller_quota(tmp_path: Path) -> None:
    records = [record_of(number) for number in range(4)]
    with open_store(tmp_path) as store:
        store.put(records)
        store.set_pinned([record.info.block_hash for record in records[:3]], True)
        assert store.set_quota(SIZE, evict=True).blocks == 1
        assert store.stats().blocks == 3


def test_a_larger_quota_that_another_process_sets_holds_here_at_once(tmp_path: Path) -> None:
    """The file outgrows the map of this process, which has mapped it for the smaller quota."""
    quota = 4 * SIZE
    with open_store(tmp_path, quota_bytes=quota) as store:
        store._env.set_map(2 << 20)  # of a small map the end is soon reached
        store.put([record_of(number, seed=number) for number in range(3)])
        set_elsewhere(tmp_path, 2000 * SIZE, 800)
        assert (tmp_path / "cold" / "data.mdb").stat().st_size > 4 << 20
        assert store.lookup(record_of(1000).info.block_hash) is not None
        assert np.array_equal(read(store, record_of(1799, seed=1799).info), block_bytes(1799))
        assert store.stats().blocks == 803 and store.stats().quota_bytes == 2000 * SIZE
        assert store.put([record_of(number) for number in range(5000, 5020)]) == [PutOutcome.STORED] * 20
        assert store.quota_bytes == 2000 * SIZE and store.stats().evicted_blocks == 0
        assert store._env._map_bytes == map_bytes_of(2000 * SIZE)
        store.check()
        assert store.verify().is_sound


def test_the_map_does_not_go_while_another_thread_reads(tmp_path: Path) -> None:
    with open_store(tmp_path, write_wait_s=0.05) as store:
        store._env._write_wait_s = 0.05
        store.put([record_of(1)])
        with (
            pytest.MonkeyPatch.context() as patch,
            store._env.read() as txn,
        ):
            patch.setattr("tierkv.storage.lmdb_env._CLOSE_WAIT_S", 0.0)
            value = txn.get(record_of(1).info.block_hash, db=store._databases.blocks)
            with pytest.raises(StoreError, match="does not end"):
                store._env.grow_map(1 << 30)
            assert bytes(value[:4]) == b"TKVB"
        store._env.grow_map(1 << 30)
        store.check()


def test_what_is_salvaged_of_a_damaged_store_has_its_quota(tmp_path: Path) -> None:
    with open_store(tmp_path, quota_bytes=QUOTA // 2) as store:
        store.put([record_of(number) for number in range(3)])
    path = tmp_path / "cold" / "data.mdb"
    path.write_bytes(bytes(8192) + path.read_bytes()[8192:])
    with open_store(tmp_path, quota_bytes=None) as store:
        assert store.damaged is not None and store.stats().blocks == 3
        assert store.quota_bytes == QUOTA // 2
        store.check()


@pytest.mark.parametrize(
    ("total", "free", "is_room"),
    [
        (512 << 20, 500 << 20, True),
        (512 << 20, 25 << 20, False),
        (1 << 40, 1025 << 20, True),
        (1 << 40, 1000 << 20, False),
    ],
)
def test_a_20th_of_a_small_volume_stays_free_and_a_gibibyte_of_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, total: int, free: int, is_room: bool
) -> None:
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda path: Usage(total, total - free, free))
    with open_store(tmp_path, min_free_bytes=None) as store:
        assert store.put([record_of(1)]) == [PutOutcome.STORED if is_room else PutOutcome.FULL]
        assert ("must stay free" in caplog.text) != is_room
        if not is_room:
            with pytest.raises(CapacityError, match="lower min_free_bytes"):
                store.require_room(SIZE // 2)


def test_a_store_that_has_blocks_to_evict_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    with open_store(tmp_path, clock) as store:
        store.put([record_of(1)])
    monkeypatch.setattr(free_space.shutil, "disk_usage", lambda path: Usage(1 << 40, 1 << 40, 0))
    with open_store(tmp_path, clock, min_free_bytes=None) as store:
        store.require_room(SIZE // 2)
        assert store.put([record_of(2)]) == [PutOutcome.STORED]
        assert store.stats().blocks == 1


def test_a_quota_too_small_for_one_block_is_refused_before_a_put(tmp_path: Path) -> None:
    with open_store(tmp_path, quota_bytes=100) as store, pytest.raises(CapacityError, match="too small for one block"):
        store.require_room(5000)


class Volume:
    """The free space of a volume that has one store and nothing else. total: its bytes."""

    def __init__(self, path: Path, total: int) -> None:
        self._file, self._total = path / "cold" / "data.mdb", total
        self.least_free = total

    def usage(self, path: Path) -> Usage:
        used = self._file.stat().st_size if self._file.exists() else 0
        self.least_free = min(self.least_free, self._total - used)
        return Usage(self._total, used, self._total - used)


def partly_zero(record: EncodedRecord, share: float) -> EncodedRecord:
    """Return a smaller record of the same block."""
    block = block_bytes(7)
    block[: int(share * block.size)] = 0
    return encode_record(record.info, block, layout=LAYOUT, cost_s=0.25)


@pytest.mark.parametrize("count", [1, 7, 64])
@pytest.mark.parametrize("is_varied", [False, True])
def test_what_must_stay_free_stays_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, is_varied: bool
) -> None:
    """The pages of evicted blocks are used for those that come: the file does not grow beyond its room."""
    volume = Volume(tmp_path, 4 << 20)
    monkeypatch.setattr(free_space.shutil, "disk_usage", volume.usage)
    must_be_free = 1 << 20
    with open_store(tmp_path, quota_bytes=1 << 30, min_free_bytes=must_be_free) as store:
        for first in range(0, 640, count):
            records = [record_of(number, seed=number) for number in range(first, first + count)]
            if is_varied:
                records = [partly_zero(record, number % 5 / 5) for number, record in enumerate(records, first)]
            assert set(store.put(records)) == {PutOutcome.STORED}
            volume.usage(tmp_path)
        stats = store.stats()
        assert stats.live_bytes > 0.7 * ((4 << 20) - must_be_free), "it is filled up to what must stay free"
        store.check()
    assert volume.least_free >= must_be_free
