"""A record is read, checked and decoded piece by piece: damage at any stage of that is noticed before its end."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cold_blocks import LAYOUT as STORE_LAYOUT
from cold_blocks import NAMESPACE, QUOTA, block_bytes, chain_of, open_store, read, record_of

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage import record as record_module
from tierkv.storage import record_source
from tierkv.storage.codecs import CODECS, codec_by_name
from tierkv.storage.coded import CodedBlock
from tierkv.storage.lmdb_search import find_leaf
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, TruncatedBlockError, decode_record, encode_record, read_header
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.values.layout import BlockLayout

LAYOUT = BlockLayout.uniform(num_layers=3, block_size=16, kv_heads=2, head_dim=32, dtype="bfloat16")
INFO = BlockInfo.first(np.arange(16, dtype="<u4").tobytes(), namespace=bytes(16))
codecs = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@pytest.fixture(autouse=True)
def a_run_is_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "PIECE_BYTES", 1)
    monkeypatch.setattr(record_module, "_HEAD_BYTES", 200)


def block_of(seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(LAYOUT.block_bytes // 2).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8)


def encoded(codec: str = "exponent16") -> np.ndarray:
    return encode_record(INFO, block_of(), layout=LAYOUT, codec=codec_by_name(codec)).data


def in_file(path: Path, data: bytes, *, before: int = 0) -> FileRecord:
    """Return a record that begins `before` bytes behind the file's begin, with nothing behind it."""
    path.write_bytes(bytes(before) + data)
    return FileRecord(os.open(path, os.O_RDWR), offset=before, size=len(data), memory=ThreadMemory())


def decode(
    source: FileRecord | bytes | np.ndarray,
    *,
    expected: BlockInfo = INFO,
    lossy_codec: str = "",
    coded: CodedBlock | None = None,
):
    out = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
    reason = decode_record(source, out, expected=expected, layout=LAYOUT, lossy_codec=lossy_codec, coded=coded)
    return out if reason is None else reason


def before_read(monkeypatch: pytest.MonkeyPatch, number: int, work: Callable[[], object]) -> list[int]:
    """Do something right before a read of that number; return a list that counts the reads."""
    count = [0]
    preadv = os.preadv

    def read_later(fd: int, buffers: list[memoryview], offset: int) -> int:
        count[0] += 1
        if count[0] == number:
            work()
        return preadv(fd, buffers, offset)

    monkeypatch.setattr(record_source.os, "preadv", read_later)
    return count


@codecs
@pytest.mark.parametrize("before", [0, 16, 4097])
def test_pieces_of_a_file_give_what_the_whole_gives(codec, before: int, tmp_path, monkeypatch) -> None:
    data = encode_record(INFO, block_of(), layout=LAYOUT, codec=codec).data
    lossy_codec = codec.name if codec.is_lossy else ""
    pieces = decode(in_file(tmp_path / "record", data.tobytes(), before=before), lossy_codec=lossy_codec)
    monkeypatch.setattr(record_module, "PIECE_BYTES", 1 << 20)
    assert np.array_equal(pieces, decode(data, lossy_codec=lossy_codec))
    assert codec.is_lossy or np.array_equal(pieces, block_of())


def test_short_reads_are_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = in_file(tmp_path / "record", encoded().tobytes(), before=16)
    preadv = os.preadv
    monkeypatch.setattr(record_source.os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:100]], offset))
    assert np.array_equal(decode(source), block_of())


@pytest.mark.parametrize("coded", [None, CodedBlock()], ids=["decoded", "left coded"])
def test_a_file_cut_anywhere_is_truncated(coded: CodedBlock | None, tmp_path: Path) -> None:
    data = encoded().tobytes()
    header = read_header(data)
    source = in_file(tmp_path / "record", data)
    borders = (np.cumsum(header.frame_sizes) + header.payload_offset).tolist()[:-1]
    for size in [*range(len(data) - 1, 0, -97), *borders]:
        os.truncate(tmp_path / "record", 0)
        (tmp_path / "record").write_bytes(data[:size])
        with pytest.raises(TruncatedBlockError):
            decode(source, coded=coded)
    assert coded is None or not coded.frame_sizes


@pytest.mark.parametrize("number", range(2, 9))
def test_a_file_that_is_cut_while_it_is_read_is_truncated(number: int, tmp_path, monkeypatch) -> None:
    source = in_file(tmp_path / "record", encoded().tobytes())
    count = before_read(monkeypatch, number, lambda: os.truncate(tmp_path / "record", 0))
    with pytest.raises(TruncatedBlockError):
        decode(source)
    assert count == [number]


@pytest.mark.parametrize("number", range(2, 9))
def test_a_record_that_gives_way_to_another_while_it_is_read_is_noticed(number: int, tmp_path, monkeypatch) -> None:
    other = encode_record(INFO, block_of(1), layout=LAYOUT).data.tobytes()
    source = in_file(tmp_path / "record", encoded().tobytes())
    before_read(monkeypatch, number, lambda: (tmp_path / "record").write_bytes(other))
    with pytest.raises(CorruptBlockError):
        decode(source)


@codecs
def test_a_changed_byte_of_any_piece_is_noticed_and_nothing_but_an_error_of_ours_comes_of_it(codec) -> None:
    data = encode_record(INFO, block_of(), layout=LAYOUT, codec=codec).data
    dice = np.random.default_rng(7)
    for _ in range(300):
        damaged = data.copy()
        damaged[dice.integers(16, data.size)] ^= np.uint8(dice.integers(1, 256))
        with pytest.raises(StoreError):
            decode(damaged)


def test_a_damaged_last_piece_leaves_nothing_for_the_gpu() -> None:
    damaged = encoded()
    damaged[-1] ^= 1
    coded = CodedBlock()
    with pytest.raises(CorruptBlockError):
        decode(damaged, coded=coded)
    assert coded == CodedBlock()


def test_a_block_left_coded_is_its_payload(tmp_path: Path) -> None:
    data = encoded()
    coded = CodedBlock()
    out = decode(in_file(tmp_path / "record", data.tobytes(), before=16), coded=coded)
    header = read_header(data)
    assert coded.frame_sizes == header.frame_sizes
    assert np.array_equal(out[: coded.payload_bytes], data[header.payload_offset :])


def test_another_block_differs_from_a_damaged_block_by_its_last_byte() -> None:
    data = encoded()
    other = replace(INFO, content_digest=bytes(16))
    assert decode(data, expected=other) is MissReason.COLLISION
    data[-1] ^= 1
    with pytest.raises(CorruptBlockError):
        decode(data, expected=other)


def test_frames_that_are_longer_than_their_run_are_refused_before_they_are_read(tmp_path, monkeypatch) -> None:
    data = encoded("raw").tobytes()
    header = read_header(data)
    sizes = list(header.frame_sizes)
    sizes[0], sizes[1] = sizes[0] + sizes[1], 0
    table = 128 + len(header.info.token_bytes)
    lie = data[:table] + np.array(sizes, dtype="<u4").tobytes() + data[table + 4 * len(sizes) :]
    count = before_read(monkeypatch, 0, lambda: None)
    with pytest.raises(CorruptBlockError, match="longer than the run"):
        decode(in_file(tmp_path / "record", lie))
    assert count[0] <= 3, "as the raw block that it is as long as, then its head"


# -- in a store, and in a state file -------------------------------------------------------------------


def test_a_block_cut_between_two_pieces_is_a_miss_and_no_crash(tmp_path: Path, monkeypatch) -> None:
    record = record_of(1, seed=1)
    with open_store(tmp_path) as store:
        store.put([record, *chain_of(3, first=10)])
        data = tmp_path / "cold" / "data.mdb"
        count = before_read(monkeypatch, 4, lambda: os.truncate(data, 8192))
        assert read(store, record.info) is MissReason.TRUNCATED
        assert count == [4]


def test_a_block_that_is_removed_while_it_is_read_still_comes_whole(tmp_path: Path, monkeypatch) -> None:
    record = record_of(1, seed=1)
    others = [record_of(number, seed=number) for number in range(100, 160)]
    with open_store(tmp_path, quota_bytes=QUOTA) as store:
        store.put([record])
        fd = store._env.data.fd
        leaf = find_leaf(fd, b"blocks", record.info.block_hash)
        offset = int.from_bytes(leaf.held, "little") * 4096

        def remove_and_write() -> None:
            store.delete(record.info.block_hash)
            for other in others:  # each a transaction of its own: pages are used again from the second one after
                store.put([other])

        def in_another_thread() -> None:
            thread = threading.Thread(target=remove_and_write)
            thread.start()
            thread.join()

        before_read(monkeypatch, 3, in_another_thread)
        stored = os.pread(fd, leaf.size, offset)
        assert np.array_equal(read(store, record.info), block_bytes(1))
        assert os.pread(fd, leaf.size, offset) == stored
        assert read(store, record.info) is MissReason.ABSENT
        for other in others:
            store.delete(other.info.block_hash)
        remove_and_write()
        assert os.pread(fd, leaf.size, offset) != stored, "what the read transaction kept off did not happen at all"


def test_a_state_file_cut_between_two_pieces_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = record_of(1, seed=1)
    path = tmp_path / "state"
    write_state_file(
        path, namespace=NAMESPACE.digest, description=NAMESPACE.describe(), records=[record.data.tobytes()]
    )
    with StateFile(path) as state:
        out = np.zeros(STORE_LAYOUT.block_bytes, dtype=np.uint8)
        assert state.read_into(record.info, out, layout=STORE_LAYOUT) is None
        assert np.array_equal(out, block_bytes(1))
        before_read(monkeypatch, 3, lambda: os.truncate(path, 4096))
        assert state.read_into(record.info, out, layout=STORE_LAYOUT) is MissReason.TRUNCATED


# -- fetched ahead -------------------------------------------------------------------------------------


def fetches(
    source: FileRecord, monkeypatch: pytest.MonkeyPatch, answers: list[int | OSError], *, is_cached: bool = False
) -> tuple[list[int], int]:
    """Return where a fetch reads and how many advices it gives, where the reads are answered so."""
    places: list[int] = []
    advices: list[int] = []

    def answer(_fd: int, _memory: object, place: int, _flags: int) -> int:
        places.append(place)
        result = answers[len(places) - 1]
        if isinstance(result, OSError):
            raise result
        return result

    with monkeypatch.context() as patch:
        patch.setattr(record_source.os, "preadv", answer)
        patch.setattr(record_source.os, "posix_fadvise", lambda *a: advices.append(a[3]))
        patch.setattr(FileRecord, "is_in_memory", lambda _: is_cached)
        assert source.fetch_ahead() is bool(advices or len(places) > 1)
    return places, len(advices)


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="reads that do not wait are Linux' own")
def test_a_record_is_fetched_unless_it_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = in_file(tmp_path / "record", bytes(5 << 20))
    first = 4096 * (source.offset // 4096)
    steps = [at << 10 for at in (0, 16, 32, 48, *range(64, (source.offset + source.size - first + 1023) >> 10, 64))]
    wanted = [first + step for step in steps]
    assert fetches(source, monkeypatch, [BlockingIOError()] * 99) == (wanted, 0), "each step, and nothing behind it"
    assert fetches(source, monkeypatch, [16, BlockingIOError()] * 50) == (wanted, 0), "read or not"
    answers: list[int | OSError] = [BlockingIOError(), 100, 0]
    assert fetches(source, monkeypatch, answers) == (wanted[:3], 0), "not beyond the end of the file"
    assert fetches(source, monkeypatch, [OSError(errno.EOPNOTSUPP, "")]) == (wanted[:1], 1)
    assert fetches(source, monkeypatch, [], is_cached=True) == ([], 0)
    middle = [source.offset + source.size // 2]
    assert fetches(source, monkeypatch, [1], is_cached=True) == (middle, 0), "after one that was in memory"
    assert fetches(source, monkeypatch, [BlockingIOError()] * 99) == (middle + wanted, 0), "and this one is not"
    with pytest.raises(OSError, match="disk"):
        fetches(source, monkeypatch, [OSError(errno.EIO, "disk")])
    monkeypatch.delattr(os, "RWF_NOWAIT")
    assert fetches(source, monkeypatch, []) == ([], 1), "a system without such reads"
    assert np.array_equal(decode(in_file(tmp_path / "record", encoded().tobytes())), block_of())
