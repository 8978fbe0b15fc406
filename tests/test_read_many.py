"""Several blocks are read in one snapshot, with few reads: each one whole, or a miss of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cold_blocks import LAYOUT, NAMESPACE, block_bytes, chain_of, open_store, record_of

from tierkv.errors import CorruptBlockError, ShapeError
from tierkv.storage import lmdb_file, lmdb_search, record_source
from tierkv.storage.codecs import RAW
from tierkv.storage.cold import ColdStore
from tierkv.storage.lmdb_search import find_leaf
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, EncodedRecord, TruncatedBlockError, decode_record, encode_record
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.values.block import BlockHash

INFO = BlockInfo.first(np.arange(16, dtype="<u4").tobytes(), namespace=NAMESPACE.digest)


def raw_chain(length: int) -> list[EncodedRecord]:
    return [
        encode_record(record.info, block_bytes(number), layout=LAYOUT, codec=RAW)
        for number, record in enumerate(chain_of(length))
    ]


def read_many(store: ColdStore, infos: list[BlockInfo]) -> list[np.ndarray | MissReason]:
    outs = [np.zeros(LAYOUT.block_bytes, dtype=np.uint8) for _ in infos]
    reasons = store.read_many_into(infos, outs, layout=LAYOUT)
    return [reason or out for reason, out in zip(reasons, outs, strict=True)]


def counted(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> list[int]:
    """Return a list that gets the offset of each read from now on."""
    offsets: list[int] = []
    real: Callable[..., object] = getattr(os, name)

    def read(fd: int, what: object, offset: int, *flags: int) -> object:
        offsets.append(offset)
        return real(fd, what, offset, *flags)

    monkeypatch.setattr(module.os, name, read)  # type: ignore[attr-defined]
    return offsets


def offset_of(store: ColdStore, block_hash: BlockHash) -> int:
    return int.from_bytes(find_leaf(store._env.data.fd, b"blocks", block_hash).held, "little") * 4096 + 16


@pytest.mark.parametrize("records", [chain_of(6), raw_chain(6)], ids=["coded", "raw"])
def test_each_block_is_whole_or_a_miss_of_its_own(records: list[EncodedRecord], tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put(records)
        os.pwrite(store._env.data.fd, b"\xff" * 64, offset_of(store, records[2].info.block_hash) + 500)
        infos = [record.info for record in records]
        infos[4] = INFO
        found = read_many(store, infos)
        assert found[2] is MissReason.CORRUPT and found[4] is MissReason.ABSENT
        for number in (0, 1, 3, 5):
            assert np.array_equal(found[number], block_bytes(number))
        assert read_many(store, []) == []
        stats = store.stats()
        assert stats.hits == 4 and stats.misses[MissReason.CORRUPT] == stats.misses[MissReason.ABSENT] == 1
        store.maintain()
        assert [store.contains(record.info.block_hash) for record in records] == [True] * 2 + [False] * 4


def test_many_blocks_are_found_by_few_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = raw_chain(40)
    with open_store(tmp_path) as store:
        store.put(records)
        infos = [record.info for record in records]
        pages = counted(monkeypatch, lmdb_search, "pread")
        payloads = counted(monkeypatch, record_source, "preadv")
        found = read_many(store, infos)
        assert all(np.array_equal(block, block_bytes(number)) for number, block in enumerate(found))
        assert len(payloads) == 40, "one read for each"
        assert len(pages) <= 8, "the meta pages, and each page of the tree once"
        pages.clear()
        read_many(store, infos)
        assert len(pages) == 1, "nothing was committed meanwhile"


def test_what_was_committed_between_two_reads_is_found(tmp_path: Path) -> None:
    first, second = record_of(1, seed=1), record_of(2, seed=2)
    with open_store(tmp_path) as store:
        store.put([first])
        assert read_many(store, [first.info, second.info])[1] is MissReason.ABSENT
        store.put([second])
        assert np.array_equal(read_many(store, [second.info])[0], block_bytes(2))
        store.delete(first.info.block_hash)
        found = read_many(store, [first.info, second.info])
        assert found[0] is MissReason.ABSENT and np.array_equal(found[1], block_bytes(2))


def test_a_search_forgets_pages_before_it_keeps_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb_search, "_MOST_PAGES", 1)
    records = raw_chain(40)
    with open_store(tmp_path) as store:
        store.put(records)
        found = read_many(store, [record.info for record in records])
        assert all(np.array_equal(block, block_bytes(number)) for number, block in enumerate(found))
        assert store._env.data._search is not None and len(store._env.data._search._pages) == 1


def test_a_file_that_is_cut_while_several_blocks_are_read_costs_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = raw_chain(6)
    with open_store(tmp_path) as store:
        store.put(records)
        preadv, reads = os.preadv, []

        def cut_later(fd: int, buffers: list[memoryview], offset: int) -> int:
            reads.append(offset)
            if len(reads) == 3:
                os.truncate(tmp_path / "cold" / "data.mdb", 8192)
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(record_source.os, "preadv", cut_later)
        found = read_many(store, [record.info for record in records])
        assert all(np.array_equal(found[number], block_bytes(number)) for number in range(2))
        assert found[2:] == [MissReason.TRUNCATED] * 4


def test_a_disk_that_fails_one_read_costs_one_miss_and_no_look_through_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = raw_chain(4)
    with open_store(tmp_path) as store:
        store.put(records)
        preadv, bad = os.preadv, offset_of(store, records[1].info.block_hash)

        def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
            if offset == bad:
                raise OSError(5, "the disk")
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(record_source.os, "preadv", fail)
        monkeypatch.setattr(ColdStore, "_decode_mapped", lambda *_, **__: pytest.fail("a map of it would be SIGBUS"))
        found = read_many(store, [record.info for record in records])
        assert found[1] is MissReason.IO_ERROR
        assert all(np.array_equal(found[number], block_bytes(number)) for number in (0, 2, 3))


def test_an_out_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put(raw_chain(1))
        with pytest.raises(ShapeError):
            store.read_many_into([raw_chain(1)[0].info], [bytearray(3)], layout=LAYOUT)


# -- a whole block that is stored raw ------------------------------------------------------------------


def raw_record(path: Path, change: Callable[[bytearray], object] = bytes, *, padding: int = 0) -> FileRecord:
    data = bytearray(encode_record(INFO, block_bytes(), layout=LAYOUT, codec=RAW).data.tobytes()) + bytes(padding)
    change(data)
    path.write_bytes(data)
    return FileRecord(os.open(path, os.O_RDONLY), offset=0, size=len(data), memory=ThreadMemory())


def decode(source: FileRecord, *, expected: BlockInfo = INFO) -> np.ndarray | MissReason:
    out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
    return decode_record(source, out, expected=expected, layout=LAYOUT) or out


@pytest.mark.parametrize("padding", [0, 1000])
def test_a_raw_block_is_read_by_one_read(padding: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = raw_record(tmp_path / "record", padding=padding)
    reads = counted(monkeypatch, record_source, "preadv")
    assert np.array_equal(decode(source), block_bytes()) and len(reads) == 1


def test_a_raw_block_with_a_flipped_bit_anywhere_is_corrupt(tmp_path: Path) -> None:
    size = raw_record(tmp_path / "record").size
    for at in [*range(260), *range(260, size, 97), size - 1]:

        def flip(data: bytearray, at: int = at) -> None:
            data[at] ^= 1 << at % 8

        with pytest.raises(CorruptBlockError):
            decode(raw_record(tmp_path / "record", flip))


def test_a_raw_block_of_another_identity_is_a_collision(tmp_path: Path) -> None:
    other = BlockInfo.first(np.arange(1, 17, dtype="<u4").tobytes(), namespace=NAMESPACE.digest)
    assert decode(raw_record(tmp_path / "record"), expected=other) is MissReason.COLLISION


def test_a_raw_block_that_is_cut_is_truncated(tmp_path: Path) -> None:
    source = raw_record(tmp_path / "record")
    for size in range(source.size - 1, 0, -311):
        os.truncate(tmp_path / "record", size)
        with pytest.raises(TruncatedBlockError):
            decode(source)


# -- fetched ahead -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_memory", "asked"), [({0, 1, 2, 3, 4}, 2), ({0, 4}, 2), ({0, 1, 2}, 5), (set(), 5), ({3, 4}, 5)]
)
def test_values_between_two_that_are_in_memory_are_not_asked_for(
    in_memory: set[int], asked: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = raw_chain(5)
    with open_store(tmp_path) as store:
        store.put(records)
        offsets = sorted(offset_of(store, record.info.block_hash) for record in records)
        seen: list[int] = []

        def fetch_ahead(record: FileRecord) -> bool:
            seen.append(offsets.index(record.offset))
            return seen[-1] not in in_memory

        monkeypatch.setattr(FileRecord, "fetch_ahead", fetch_ahead)
        store.read_ahead([record.info.block_hash for record in reversed(records)])
        assert seen == [0, 4, 1, 2, 3][:asked]


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="reads that do not wait are Linux' own")
def test_reads_ahead_have_a_descriptor_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        [record] = raw_chain(1)
        store.put([record])
        own = store._env.data.fd
        asked: list[int] = []

        def answer(fd: int, _memory: object, _place: int, _flags: int) -> int:
            asked.append(fd)
            return 0

        with monkeypatch.context() as patch:
            patch.setattr(FileRecord, "is_in_memory", lambda _: False)
            patch.setattr(record_source.os, "preadv", answer)
            store.read_ahead([record.info.block_hash])
        [ahead] = asked
        assert ahead != own, "else reads between two of them begin the system's read-ahead anew"
        assert os.path.sameopenfile(ahead, own)
    for fd in (ahead, own):
        with pytest.raises(OSError, match="descriptor"):
            os.fstat(fd)


def test_a_file_that_has_lost_its_path_is_read_ahead_by_the_descriptor_that_there_is(
    tmp_path: Path,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"new")
    (tmp_path / "old").write_bytes(b"old")
    fd = os.open(tmp_path / "old", os.O_RDONLY)
    try:
        assert lmdb_file._open_again(path, fd) == fd, "another file is at the path"
        path.unlink()
        assert lmdb_file._open_again(path, fd) == fd, "none is"
    finally:
        os.close(fd)


def test_reading_ahead_looks_for_the_newest_state_where_the_one_before_lacks_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = raw_chain(2)
    hashes = [record.info.block_hash for record in records]
    seen: list[int] = []
    looks = 0
    newest_meta = lmdb_file.newest_meta

    def look(fd: int) -> object:
        nonlocal looks
        looks += 1
        return newest_meta(fd)

    monkeypatch.setattr(FileRecord, "fetch_ahead", lambda record: bool(seen.append(record.offset)) or True)
    with open_store(tmp_path) as store:
        store.put(records[:1])
        store.read_ahead(hashes[:1])
        monkeypatch.setattr(lmdb_file, "newest_meta", look)
        store.read_ahead(hashes[:1])
        assert looks == 0
        store.put(records[1:])
        store.read_ahead(hashes)
        assert looks == 1
        assert sorted(seen[2:]) == sorted(offset_of(store, each) for each in hashes)
