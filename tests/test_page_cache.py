"""Whether part of a file is in memory: asked without bringing it there."""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path

import numpy as np
import pytest
from cold_blocks import chain_of, damage_record, open_store

from tierkv.storage import lmdb_file, record_source
from tierkv.storage.cold import ColdStore
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record
from tierkv.storage.record_source import FileRecord, PageCacheMap, ThreadMemory, is_in_memory
from tierkv.values.layout import BlockLayout
from tierkv.values.namespace import Namespace

HOLE_BYTES = 4 << 20


def test_what_was_written_is_in_memory_and_a_hole_is_not(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        os.pwrite(fd, bytes(1 << 16), HOLE_BYTES)
        assert is_in_memory(fd, HOLE_BYTES + 100)
        for _ in range(2):  # asking brings nothing
            assert not is_in_memory(fd, HOLE_BYTES // 2 + 100)
        assert is_in_memory(fd, 1 << 40), "nothing is fetched for what is not there"
    finally:
        os.close(fd)


def test_a_kept_mapping_answers_as_a_fresh_one_does_and_follows_the_file(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    kept = PageCacheMap(fd)
    try:
        assert kept.is_in_memory(100), "an empty file cannot be mapped"
        os.pwrite(fd, bytes(1 << 16), HOLE_BYTES)
        for _ in range(2):  # asking brings nothing
            assert kept.is_in_memory(HOLE_BYTES + 100) and not kept.is_in_memory(HOLE_BYTES // 2 + 100)
        assert kept.is_in_memory(1 << 40), "nothing is fetched for what is not there"
        os.ftruncate(fd, 3 * HOLE_BYTES)  # a hole beyond the mapping
        assert not kept.is_in_memory(2 * HOLE_BYTES)
        os.ftruncate(fd, 4096)
        assert kept.is_in_memory(2 * HOLE_BYTES), "nothing is fetched from beyond the new end"
        kept.close()
        kept.close()
    finally:
        os.close(fd)


def test_a_file_is_mapped_once_for_many_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    fd, mapped, real = os.open(tmp_path / "file", os.O_RDWR), 0, mmap.mmap

    def count(*args: int, **options: int) -> mmap.mmap:
        nonlocal mapped
        mapped += 1
        return real(*args, **options)

    monkeypatch.setattr(record_source.mmap, "mmap", count)
    try:
        kept = PageCacheMap(fd)
        assert all(kept.is_in_memory(offset) for offset in range(0, 1 << 16, 4096))
        assert mapped == 1
        os.ftruncate(fd, HOLE_BYTES)
        assert not any(kept.is_in_memory(offset) for offset in range(1 << 17, HOLE_BYTES, 1 << 17))
        assert mapped == 2, "a file that has grown is mapped anew, once"
    finally:
        os.close(fd)


def test_a_file_that_cannot_be_mapped_whole_is_asked_page_by_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(1 << 16))
    fd, real = os.open(tmp_path / "file", os.O_RDWR), mmap.mmap

    def refuse(fd: int, length: int, **options: int) -> mmap.mmap:
        if not length:
            raise OSError("no address space left")
        return real(fd, length, **options)

    monkeypatch.setattr(record_source.mmap, "mmap", refuse)
    try:
        os.ftruncate(fd, HOLE_BYTES)
        kept = PageCacheMap(fd)
        assert kept.is_in_memory(100) and not kept.is_in_memory(HOLE_BYTES // 2)
    finally:
        os.close(fd)


def test_the_page_cache_is_asked_without_a_read_of_the_trees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = chain_of(2)
    with open_store(tmp_path) as store:
        store.put([first])
        assert store.is_in_memory(first.info.block_hash)
        store.notes.touch([first.info.block_hash])
        store.maintain()  # commits a newer state
        with monkeypatch.context() as patch:
            patch.setattr(lmdb_file, "newest_meta", lambda _: pytest.fail("a request waits for the disk"))
            assert store.is_in_memory(first.info.block_hash)
        store.put([second])
        asked: list[int] = []
        monkeypatch.setattr(PageCacheMap, "is_in_memory", lambda _, offset: bool(asked.append(offset)))
        assert not store.is_in_memory(second.info.block_hash), "the newest state has it"
        assert len(asked) == 1


def test_a_compacted_store_keeps_no_mapping_of_the_old_file(tmp_path: Path) -> None:
    [record] = chain_of(1)
    with open_store(tmp_path) as store:
        store.put([record])
        assert store.is_in_memory(record.info.block_hash)
        old = store._env.data
        store.compact()
        assert old.fd == -1
        assert store.is_in_memory(record.info.block_hash)
        mapped = Path("/proc/self/maps").read_text()
        assert "data.mdb (deleted)" not in mapped, "its room on the disk would stay taken"


def test_blocks_leave_the_page_cache_also_when_their_heads_were_read(tmp_path: Path) -> None:
    record = large_record()
    with open_store(tmp_path) as store:
        store.put([record])
        store.flush()
        block_hash = record.info.block_hash
        assert store.is_in_memory(block_hash)
        for _ in range(2):
            forget(store, block_hash)
            assert store.read_info(block_hash) == record.info
        forget(store, block_hash)


def test_the_system_is_asked_to_forget_whole_folios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps a folio of which a part is named only, and a read brings some of up to 2 MiB."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, __: asked.append((start, start + size)))
    with (tmp_path / "file").open("w+b") as file:
        FileRecord(file.fileno(), offset=(5 << 20) + 4096, size=3 << 20, memory=ThreadMemory()).forget_pages()
    assert asked == [(4 << 20, 10 << 20)]


def forget(store: ColdStore, block_hash: bytes) -> None:
    deadline = time.monotonic() + 10
    while store.is_in_memory(block_hash):
        if time.monotonic() > deadline:
            pytest.fail("it stays in the page cache")
        store.forget_pages([block_hash])
        time.sleep(0.01)


def large_record() -> EncodedRecord:
    """Return a record of 4 MiB that no codec shrinks, so large that it lies in pages of its own."""
    layout = BlockLayout.uniform(num_layers=2, block_size=16, kv_heads=16, head_dim=2048, dtype="bfloat16")
    namespace = Namespace(weights="w", layout=layout)
    info = BlockInfo.first(np.arange(16, dtype="<u4").tobytes(), namespace=namespace.digest)
    data = np.random.default_rng(0).integers(0, 256, layout.block_bytes, dtype=np.uint8)
    return encode_record(info, data, layout=layout)


def test_the_head_of_no_record_tells_no_block(tmp_path: Path) -> None:
    [record] = chain_of(1)
    block_hash = record.info.block_hash
    with open_store(tmp_path) as store:
        store.put([record])
        assert store.read_info(block_hash) == record.info
        assert store.read_info(bytes(16)) is None
        damage_record(store, block_hash, offset=0)
        assert store.read_info(block_hash) is None
        damage_record(store, block_hash, offset=0, cut=10)
        assert store.read_info(block_hash) is None
