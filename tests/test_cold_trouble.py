"""Trouble that is not the disk's: rows of namespaces damaged, clocks set back, directories gone, odd paths."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cold_blocks import NAMESPACE, OTHER, QUOTA, FakeClock, block_bytes, chain_of, open_store, read, record_of

from tierkv.errors import StoreError
from tierkv.storage import cold_writer
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_rows import NAMESPACE_PREFIX
from tierkv.storage.lmdb_search import find_leaf
from tierkv.storage.outcomes import MissReason, PutOutcome


def damage_row(store: ColdStore) -> None:
    with store._env.write() as txn:
        key = NAMESPACE_PREFIX + NAMESPACE.digest
        row = bytearray(txn.get(key, db=store._databases.meta))
        row[5] ^= 1
        txn.put(key, bytes(row), db=store._databases.meta)


def totals(store: ColdStore) -> dict[bytes, tuple[int, int, int, int]]:
    return {
        each.digest: (each.blocks, each.raw_bytes, each.stored_bytes, each.value_bytes) for each in store.namespaces()
    }


def test_the_damaged_row_of_a_namespace_is_counted_anew_and_no_block_is_lost(tmp_path: Path) -> None:
    chain = chain_of(3)
    with open_store(tmp_path) as store:
        store.open_namespace(NAMESPACE)
        store.put([*chain, record_of(1, namespace=OTHER)])
        before = totals(store)
        damage_row(store)
        assert totals(store) == before and store.stats().blocks == 4
        with pytest.raises(StoreError, match="damaged"):
            store.check()
        assert store.verify(repair=True).removed == 0
        store.check()
        assert totals(store) == before
        assert np.array_equal(read(store, chain[2].info), block_bytes(2))
        damage_row(store)
    with open_store(tmp_path) as store:
        store.open_namespace(NAMESPACE)
        assert totals(store) == before
        assert {each.digest: each.description.get("name") for each in store.namespaces()}[NAMESPACE.digest] == "model"
        assert store.put([record_of(9)]) == [PutOutcome.STORED]
        store.check()


def test_a_quota_smaller_than_one_block_keeps_nothing_and_raises_nothing(tmp_path: Path) -> None:
    with open_store(tmp_path, quota_bytes=100) as store:
        assert store.put(chain_of(2)) == [PutOutcome.FULL] * 2
        assert store.stats().live_bytes == 0
        store.check()


def test_a_clock_that_is_set_back_does_not_keep_a_store_from_taking_blocks(tmp_path: Path, monkeypatch) -> None:
    clock = FakeClock()
    with open_store(tmp_path, clock) as store:
        with monkeypatch.context() as patch:
            patch.setattr(cold_writer.ColdWriter, "_insert", fail)
            assert store.put([record_of(1)]) == [PutOutcome.IO_ERROR]
        assert store.put([record_of(1)]) == [PutOutcome.IO_ERROR]  # for some seconds nothing is tried
        clock.now -= 500.0
        assert store.put([record_of(1)]) == [PutOutcome.STORED]
        store.notes.touch([record_of(1).info.block_hash])
        clock.now -= 100.0
        assert store.put([record_of(2)]) == [PutOutcome.STORED]
        assert store.evict(older_than_s=50.0).blocks == 0
        store.check()


def test_a_block_whose_page_number_points_behind_every_file_is_a_miss(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        record = record_of(1)
        store.put([record])
        block_hash, fd = record.info.block_hash, store._env.data.fd
        number = find_leaf(fd, b"blocks", block_hash).held
        at = os.pread(fd, 1 << 24, 0).index(block_hash + number) + len(block_hash)
        os.pwrite(fd, b"\x40", at + len(number) - 1)
        store.read_ahead([block_hash])
        assert store.is_in_memory(block_hash), "nothing is fetched for what is not there"
        assert read(store, record.info) is MissReason.CORRUPT


def fail(*_: object) -> None:
    raise StoreError("the disk is gone")


def test_a_directory_that_goes_while_the_store_is_open_costs_writes_and_no_reads(tmp_path: Path) -> None:
    chain = chain_of(2)
    with open_store(tmp_path) as store:
        store.put(chain)
        shutil.rmtree(tmp_path / "cold")
        assert store.put([record_of(7)]) == [PutOutcome.IO_ERROR]
        assert np.array_equal(read(store, chain[1].info), block_bytes(1))
        assert store.stats().blocks == 2
        with pytest.raises(StoreError):
            store.flush()
        with pytest.raises(StoreError):
            store.compact()


@pytest.mark.parametrize("name", ["with spaces", "ünï-códe 你好", "a'quote\"d%s{}", "-dash"])
def test_any_name_may_be_that_of_a_stores_directory(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    with open_store(path) as store:
        store.put(chain_of(2))
        store.compact()
    with open_store(path) as store:
        assert store.damaged is None and store.stats().blocks == 2
        store.check()


def test_a_store_is_not_opened_twice_by_way_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "cold").symlink_to(tmp_path / "real")
    with open_store(tmp_path) as store:
        store.put(chain_of(2))
        with pytest.raises(StoreError, match="already open"):
            ColdStore(tmp_path / "real", quota_bytes=QUOTA)
        assert store.put([record_of(9)]) == [PutOutcome.STORED]
        store.check()


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "users.lock", "write.lock"])
def test_a_directory_in_the_place_of_a_file_is_an_error_of_ours(tmp_path: Path, name: str) -> None:
    (tmp_path / "cold" / name).mkdir(parents=True)
    with pytest.raises(StoreError):
        open_store(tmp_path)
