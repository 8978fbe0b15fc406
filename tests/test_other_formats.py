"""Blocks that another version of tierkv wrote are misses with a reason of their own, and nothing removes them."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from cold_blocks import LAYOUT, NAMESPACE, block_bytes, chain_of, open_store, read, record_of

from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.state_file import StateFile, write_state_file

VERSION_AT, FLAGS_AT, CODEC_AT, CODEC_VERSION_AT = 4, 6, 72, 74
PAGE_BYTES = 4096
LEAF_PAGE = 2
OTHERS = [(VERSION_AT, 3), (FLAGS_AT, 1), (CODEC_AT, 999), (CODEC_VERSION_AT, 9)]


def of_another_format(record: bytes, offset: int, value: int, *, is_whole: bool = True) -> bytes:
    """Return a record as a version that writes `value` there would have written it; or one with a flipped bit there."""
    size = int.from_bytes(record[96:104], "little")
    changed = bytearray(record)
    struct.pack_into("<H", changed, offset, value)
    if is_whole:
        seed = int.from_bytes(changed[:8], "little")
        struct.pack_into("<Q", changed, 8, xxhash.xxh3_64_intdigest(bytes(changed[16:size]), seed=seed))
    return bytes(changed)


def store_another_format(
    store: ColdStore, block_hash: bytes, offset: int, value: int, *, is_whole: bool = True
) -> None:
    with store._writer.batch() as batch:
        record = bytes(batch.txn.get(block_hash, db=batch.databases.blocks))
        batch.txn.put(
            block_hash, of_another_format(record, offset, value, is_whole=is_whole), db=batch.databases.blocks
        )
        if offset == CODEC_AT:
            entry = batch.entry(block_hash)
            batch.write_entry(block_hash, replace(entry, codec=f"unknown codec {value}"))


@pytest.mark.parametrize(("offset", "value"), OTHERS)
def test_a_block_of_another_version_is_a_miss_that_stays(tmp_path: Path, offset: int, value: int) -> None:
    chain = chain_of(3)
    middle = chain[1].info
    with open_store(tmp_path) as store:
        store.put(chain)
        store_another_format(store, middle.block_hash, offset, value)
        before = store.children(middle.parent)
        for _ in range(2):
            assert read(store, middle) is MissReason.FORMAT
            store.maintain()
        assert store.put([chain[1]]) == [PutOutcome.FORMAT]
        assert store.put([record_of(50, middle)]) == [PutOutcome.NO_PARENT]
        store.set_pinned([middle.block_hash], True)
        store.notes.touch([middle.block_hash])
        store.flush()
        entry = store.lookup(middle.block_hash)
        assert entry is not None and entry.pinned and entry.access_count == 1
        assert store.stats().damaged_blocks == 0
        assert store.children(middle.parent) == before
        store.check()
    with open_store(tmp_path) as store:
        assert store.damaged is None
        assert read(store, middle) is MissReason.FORMAT
        assert np.array_equal(read(store, chain[0].info), block_bytes(0))


@pytest.mark.parametrize(("offset", "value"), OTHERS)
def test_verify_reports_blocks_of_another_version_and_a_repair_leaves_them(tmp_path, offset: int, value: int) -> None:
    chain, other = chain_of(3), record_of(77)
    with open_store(tmp_path) as store:
        store.put([*chain, other])
        store_another_format(store, chain[1].info.block_hash, offset, value)
        store_another_format(store, other.info.block_hash, CODEC_AT, 999, is_whole=False)  # damage, to be repaired
        report = store.verify(repair=True)
        assert list(report.other_formats) == [chain[1].info.block_hash]
        assert list(report.damaged) == [other.info.block_hash]
        assert report.removed == 1
        store.check()
        report = store.verify()
        assert report.is_sound and list(report.other_formats) == [chain[1].info.block_hash]
        assert store.stats().blocks == 3


@pytest.mark.parametrize(("offset", "value"), OTHERS)
def test_a_flipped_bit_in_a_version_is_damage(tmp_path: Path, offset: int, value: int) -> None:
    record = record_of(1)
    with open_store(tmp_path) as store:
        store.put([record])
        store_another_format(store, record.info.block_hash, offset, value, is_whole=False)
        assert read(store, record.info) is MissReason.CORRUPT
        store.maintain()
        assert store.lookup(record.info.block_hash) is None
        assert store.put([record]) == [PutOutcome.STORED]


def test_a_damaged_file_is_kept_with_the_blocks_of_another_version_in_it(tmp_path: Path) -> None:
    chain = chain_of(3)
    with open_store(tmp_path) as store:
        store.put(chain)
        store_another_format(store, chain[1].info.block_hash, CODEC_AT, 999)
        store.compact()  # the block as it was before lies in a free page
    data = tmp_path / "cold" / "data.mdb"
    pages = bytearray(data.read_bytes())
    for start in range(0, len(pages), PAGE_BYTES):
        if pages[start + 10] == LEAF_PAGE:
            pages[start] ^= 1  # its number
    data.write_bytes(pages)
    with open_store(tmp_path) as store:
        assert store.damaged is not None
        assert [store.contains(record.info.block_hash) for record in chain] == [True, False, False]
        assert of_another_format(chain[1].data.tobytes(), CODEC_AT, 999) in store.damaged.read_bytes()
        store.check()


def test_blocks_of_another_version_make_room_as_all_others_do(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        chain = chain_of(2)
        store.put(chain)
        store_another_format(store, chain[1].info.block_hash, CODEC_AT, 999)
        assert store.evict(to_bytes=0).blocks == 2
        store.check()


def test_a_block_of_another_version_in_a_state_file_is_a_miss_of_that_kind(tmp_path: Path) -> None:
    record = record_of(1)
    write_state_file(
        tmp_path / "state",
        namespace=NAMESPACE.digest,
        description=NAMESPACE.describe(),
        records=[record.data.tobytes()],
    )
    data = (tmp_path / "state").read_bytes()
    at = data.find(record.data.tobytes())
    changed = of_another_format(record.data.tobytes(), CODEC_AT, 999)
    (tmp_path / "state").write_bytes(data[:at] + changed + data[at + len(changed) :])
    with StateFile(tmp_path / "state") as state:
        out = np.empty(LAYOUT.block_bytes, dtype=np.uint8)
        assert state.read_into(record.info, out, layout=LAYOUT) is MissReason.FORMAT
