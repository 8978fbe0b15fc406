"""Blocks that reader processes encode: the records that a thread writes, and none from a process that fails."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from reading import LAYOUT, NAMESPACE, NUM_SLOTS, block_of, descriptors, eventually, is_alive, open_pool

from tierkv import BlockStore, BlockStoreConfig, Buffers
from tierkv.background.work_queue import PriorityThreadPool
from tierkv.block_store.own_tiers import OwnTiers
from tierkv.readers import pool as pool_module
from tierkv.readers import record_encoder as encoder_module
from tierkv.readers.pool import ReaderPool
from tierkv.readers.reader import Reader
from tierkv.readers.record_encoder import RecordEncoder
from tierkv.readers.record_memory import RecordMemory
from tierkv.storage.codec import Bytes
from tierkv.storage.codecs import EXPONENT16, Codec, codec_by_name
from tierkv.storage.record import BlockInfo, EncodedRecord, encode_record, record_room
from tierkv.storage.warm import Slab, WarmPool
from tierkv.values.layout import BlockLayout

FLOATS = BlockLayout.uniform(num_layers=2, block_size=256, kv_heads=8, head_dim=128, dtype="float32")


def info_of(number: int, layout: BlockLayout = LAYOUT, num_tokens: int | None = None) -> BlockInfo:
    return BlockInfo.first(np.full(num_tokens or layout.block_size, number, dtype="<u4").tobytes(), namespace=bytes(16))


def fill(warm: WarmPool, layout: BlockLayout = LAYOUT) -> list[tuple[BlockInfo, Bytes]]:
    """Put a block into every slot; return them all as an encoder takes them."""
    for number in range(NUM_SLOTS):
        warm.slots[number] = block_of(number, layout)
    return [(info_of(number, layout), warm.slots[number]) for number in range(NUM_SLOTS)]


def assert_right(records: Sequence[EncodedRecord], *, layout: BlockLayout = LAYOUT, codec: Codec = EXPONENT16) -> None:
    """Compare records with those that this thread writes."""
    for number, record in enumerate(records):
        expected = encode_record(info_of(number, layout), block_of(number, layout), layout=layout, codec=codec)
        assert (record.info, record.codec, record.raw_bytes) == (expected.info, expected.codec, expected.raw_bytes)
        assert record.data.tobytes() == expected.data.tobytes()


@contextmanager
def open_encoder(
    pool: ReaderPool | None, codec: Codec = EXPONENT16, layout: BlockLayout = LAYOUT
) -> Iterator[RecordEncoder]:
    threads = PriorityThreadPool(4, name="encode")
    encoder = RecordEncoder(layout, codec, readers=pool, threads=threads)
    try:
        yield encoder
    finally:
        encoder.close()
        threads.shutdown()


@pytest.mark.parametrize("is_awaited", [False, True])
@pytest.mark.parametrize(
    ("codec", "layout"), [("exponent16", LAYOUT), ("zstd", LAYOUT), ("exponent32", FLOATS), ("lossy-int8", LAYOUT)]
)
def test_a_process_writes_the_record_that_a_thread_writes(codec: str, layout: BlockLayout, is_awaited: bool) -> None:
    chosen = codec_by_name(codec)
    with open_pool(layout=layout) as (pool, warm), open_encoder(pool, chosen, layout) as encoder:
        blocks = fill(warm, layout)
        for _ in range(2):  # in new memory, and in memory that was used
            with encoder.encoding(blocks, is_awaited=is_awaited) as records:
                assert_right(records, layout=layout, codec=chosen)
        assert pool.stats().encoded == 2 * NUM_SLOTS if not is_awaited else 0 < pool.stats().encoded <= 2 * NUM_SLOTS
        assert pool.stats().failed == 0


def test_partial_blocks_and_those_that_a_codec_cannot_shrink() -> None:
    noise = np.random.default_rng(0).integers(0, 256, LAYOUT.block_bytes, dtype=np.uint8)
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        warm.slots[0], warm.slots[1] = noise, block_of(1)
        wanted = [(info_of(0), warm.slots[0]), (info_of(1, num_tokens=200), warm.slots[1])]
        with encoder.encoding(wanted, is_awaited=False) as records:
            assert [each.codec for each in records] == ["raw", "exponent16"]
            for record, (info, block) in zip(records, wanted, strict=True):
                expected = encode_record(info, block, layout=LAYOUT, codec=EXPONENT16)
                assert record.data.tobytes() == expected.data.tobytes()
        assert pool.stats().encoded == 2


def test_small_blocks_raw_ones_and_memory_elsewhere_are_left_to_the_thread() -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder, open_encoder(pool, codec_by_name("raw")) as raw:
        blocks = fill(warm)
        elsewhere = [(info, block.copy()) for info, block in blocks]
        with encoder.encoding(elsewhere, is_awaited=False) as records:
            assert_right(records)
        with raw.encoding(blocks, is_awaited=False) as records:
            assert_right(records, codec=codec_by_name("raw"))
        with encoder.encoding([(info_of(0, num_tokens=8), warm.slots[0])], is_awaited=False) as records:
            assert len(records) == 1
        assert pool._num_requests == 0


def test_without_processes_threads_encode() -> None:
    with open_encoder(None) as encoder:
        for is_awaited in (False, True):
            blocks = [(info_of(number), block_of(number)) for number in range(3)]
            with encoder.encoding(blocks, is_awaited=is_awaited) as records:
                assert_right(records)


def test_records_that_are_kept_stay_as_they_are() -> None:
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        with encoder.encoding(blocks, is_awaited=False, is_kept=True) as kept:
            pass
        with encoder.encoding(blocks[::-1], is_awaited=False):
            assert_right(kept)
        assert pool.stats().encoded == 2 * NUM_SLOTS


def test_memory_is_used_again_and_only_so_much_is_kept() -> None:
    before = descriptors()
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        places: list[int] = []
        for _ in range(3):
            with encoder.encoding(blocks, is_awaited=False) as records:
                places.append(len({each.buffer.ctypes.data for each in records}))
                del records
            assert len(encoder._memory._free) == 1
        assert places == [NUM_SLOTS] * 3
        del blocks  # views keep their memory
    assert descriptors() == before


def test_memory_that_is_put_back_after_the_end_is_freed() -> None:
    before = descriptors()
    memory = RecordMemory(most_kept=2)
    first, second = memory.take(1 << 20), memory.take(1 << 20)
    assert first and second and first is not second
    memory.put_back(first)
    assert memory.take(2 << 20) is not first, "it is too small"
    assert memory.take(1 << 19) is first
    memory.close()
    memory.put_back(first)
    memory.put_back(second)
    assert first.fd is None and second.fd is None and not memory._free
    assert len(descriptors() - before) == 1, "the place that was not put back"


def test_no_memory_for_a_record_is_left_to_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Slab, "__init__", fail)
        with encoder.encoding(blocks, is_awaited=False) as records:
            assert_right(records)
        assert pool.stats().ready == 2 and pool.stats().encoded == 0


def test_a_process_that_is_killed_costs_no_record() -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        for lost in (1, 2):
            os.kill(pool.pids()[-1], signal.SIGKILL)
            with encoder.encoding(blocks, is_awaited=False) as records:
                assert_right(records)
            assert pool.stats().failed == lost


def test_a_process_that_hangs_has_ended_before_its_memory_is_free() -> None:
    """Stopped before it writes, it would write over the next record there once it goes on."""
    with open_pool(processes=1, answer_s=0.3) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        with encoder.encoding(blocks[:1], is_awaited=False) as records:
            assert_right(records)
        is_gone = not is_alive(pid)
        place = encoder._memory.take(record_room(LAYOUT, EXPONENT16, LAYOUT.block_size))
        assert place
        place.bytes[:] = 0x5A
        if not is_gone:  # show what it does
            os.kill(pid, signal.SIGCONT)
            time.sleep(1)
        assert (place.bytes == 0x5A).all()
        assert is_gone and pool.stats().failed == 1
        encoder._memory.put_back(place)


@pytest.mark.parametrize(
    "answer",
    [b"", b"\xc1", b"\x93\x07\xaaexponent16\x05", b"\x93\x01\xaaexponent16\xce\x7f\xff\xff\xff"],
    ids=["empty", "no message", "another request", "longer than its memory"],
)
def test_a_wrong_answer_ends_the_process_and_is_no_record(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        monkeypatch.setattr(Reader, "ask", lambda self, request, fd, *, timeout_s: answer)
        with encoder.encoding(blocks[:1], is_awaited=False) as records:
            assert_right(records)
        assert (pool.stats().failed, pool.stats().encoded) == (1, 0)


def test_a_block_that_a_process_refuses_is_encoded_here_and_the_process_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        real = pool_module.EncodeRequest
        monkeypatch.setattr(pool_module, "EncodeRequest", lambda **fields: real(**fields | {"codec": "none"}))
        with encoder.encoding(blocks[:1], is_awaited=False) as records:
            assert_right(records)
        assert (pool.stats().failed, pool.stats().encoded, pool.stats().ready) == (0, 0, 1)


def test_a_quarter_of_the_processes_encodes_beside_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one thread of this process, for what they do not take."""
    lock, now, most = threading.Lock(), {"there": 0, "here": 0}, {"there": 0, "here": 0}

    @contextmanager
    def counted(where: str) -> Iterator[None]:
        with lock:
            now[where] += 1
            most[where] = max(most[where], now[where])
        time.sleep(0.01)
        try:
            yield
        finally:
            with lock:
                now[where] -= 1

    real_here, real_there, refused = encode_record, ReaderPool.encode, [False]

    def here(*arguments: object, **options: object) -> EncodedRecord:
        with counted("here"):
            return real_here(*arguments, **options)  # type: ignore[arg-type]

    def there(*arguments: object, **options: object) -> EncodedRecord | None:
        with counted("there"):
            return None if refused[0] else real_there(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder_module, "encode_record", here)
    monkeypatch.setattr(ReaderPool, "encode", there)
    with open_pool(processes=1) as (pool, warm):
        pool.num_processes = 8
        with open_encoder(pool) as encoder:
            blocks = fill(warm)
            for refused[0] in (False, True):
                with encoder.encoding(blocks, is_awaited=False) as records:
                    assert_right(records)
    assert most == {"there": 2, "here": 1}


def test_closing_the_pool_while_blocks_are_encoded_costs_no_record() -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder, ThreadPoolExecutor(1) as threads:
        blocks = fill(warm)
        pids = pool.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

        def encode() -> None:
            with encoder.encoding(blocks, is_awaited=False) as records:
                assert_right(records)

        encoded = threads.submit(encode)
        eventually(lambda: bool(pool._busy))
        pool.close()
        encoded.result()
        assert not any(map(is_alive, pids)) and pool.stats().failed == 0


def test_a_block_store_has_processes_encode_what_is_saved(tmp_path: Path) -> None:
    namespace = NAMESPACE
    tokens = np.arange(6 * LAYOUT.block_size) % 1000
    blocks = [block_of(number) for number in range(6)]
    config = BlockStoreConfig(
        cold_path=tmp_path / "cold", warm_bytes=8 * LAYOUT.block_bytes, num_reader_processes=2, min_free_bytes=0
    )
    with BlockStore(namespace=namespace, config=config) as store:
        keys = store.keys(tokens.tolist())
        assert isinstance(store._tiers, OwnTiers) and store._tiers.memory and store._tiers.memory.readers
        readers = store._tiers.memory.readers
        readers.start()
        eventually(lambda: readers.stats().ready == 2)
        store.save(keys[:3], Buffers(blocks[:3]))
        eventually(lambda: readers.stats().encoded == 3)
        for pid in readers.pids():
            os.kill(pid, signal.SIGKILL)
        store.save(keys, Buffers(blocks[3:]), start=3)
        store.flush()
    with BlockStore(namespace=namespace, config=config) as store:
        keys = store.keys(tokens.tolist())
        assert store.contains(keys) == 6
        out = [bytearray(LAYOUT.block_bytes) for _ in keys]
        load = store.load(store.reserve(keys), Buffers(out))
        load.synchronize()
        assert load.num_loaded == 6
        assert [bytes(each) for each in out] == [each.tobytes() for each in blocks]
