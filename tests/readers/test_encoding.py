"""Blocks that reader processes encode: the records that a thread writes, and none from a process that fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

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


def never() -> bool:
    return False


def always() -> bool:
    return True


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
            with encoder.encoding(blocks, is_awaited=lambda: is_awaited) as records:
                assert_right(records, layout=layout, codec=chosen)
        assert pool.stats().encoded == 2 * NUM_SLOTS if not is_awaited else 0 < pool.stats().encoded <= 2 * NUM_SLOTS
        assert pool.stats().failed == 0


def test_partial_blocks_and_those_that_a_codec_cannot_shrink() -> None:
    noise = np.random.default_rng(0).integers(0, 256, LAYOUT.block_bytes, dtype=np.uint8)
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        warm.slots[0], warm.slots[1] = noise, block_of(1)
        wanted = [(info_of(0), warm.slots[0]), (info_of(1, num_tokens=200), warm.slots[1])]
        with encoder.encoding(wanted, is_awaited=never) as records:
            assert [each.codec for each in records] == ["raw", "exponent16"]
            for record, (info, block) in zip(records, wanted, strict=True):
                expected = encode_record(info, block, layout=LAYOUT, codec=EXPONENT16)
                assert record.data.tobytes() == expected.data.tobytes()
        assert pool.stats().encoded == 2


def test_small_blocks_raw_ones_and_memory_elsewhere_are_left_to_the_thread() -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder, open_encoder(pool, codec_by_name("raw")) as raw:
        blocks = fill(warm)
        elsewhere = [(info, block.copy()) for info, block in blocks]
        with encoder.encoding(elsewhere, is_awaited=never) as records:
            assert_right(records)
        with raw.encoding(blocks, is_awaited=never) as records:
            assert_right(records, codec=codec_by_name("raw"))
        with encoder.encoding([(info_of(0, num_tokens=8), warm.slots[0])], is_awaited=never) as records:
            assert len(records) == 1
        assert pool._num_requests == 0


def test_without_processes_threads_encode() -> None:
    with open_encoder(None) as encoder:
        for is_awaited in (never, always):
            blocks = [(info_of(number), block_of(number)) for number in range(3)]
            with encoder.encoding(blocks, is_awaited=is_awaited) as records:
                assert_right(records)


def test_records_that_are_kept_stay_as_they_are() -> None:
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        with encoder.encoding(blocks, is_awaited=never, is_kept=True) as kept:
            pass
        with encoder.encoding(blocks[::-1], is_awaited=never):
            assert_right(kept)
        assert pool.stats().encoded == 2 * NUM_SLOTS


def test_memory_is_used_again_and_only_so_much_is_kept() -> None:
    before = descriptors()
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        places: list[int] = []
        for _ in range(3):
            with encoder.encoding(blocks, is_awaited=never) as records:
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


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), MemoryError(), RuntimeError("no thread")])
def test_no_memory_for_a_record_is_left_to_the_thread(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)

        def fail(*_: object, **__: object) -> None:
            raise error

        before = descriptors()
        monkeypatch.setattr("tierkv.storage.warm.mmap.mmap", fail)
        for _ in range(3):
            with encoder.encoding(blocks, is_awaited=never) as records:
                assert_right(records)
        monkeypatch.undo()
        assert pool.stats().encoded == 0
        assert {each for each in descriptors() if "memfd" in each} == {each for each in before if "memfd" in each}


def test_a_thread_that_cannot_be_started_costs_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of an interpreter, when an engine writes its last blocks."""
    warm = WarmPool(LAYOUT.block_bytes, NUM_SLOTS)
    pool = ReaderPool.of_slab(warm, num_processes=2, num_in_process=2)
    assert pool

    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with open_encoder(pool) as encoder:
        monkeypatch.setattr(threading.Thread, "start", fail)
        pool.start()
        with encoder.encoding(fill(warm), is_awaited=never) as records:
            assert_right(records)
            del records
        place = encoder._memory.take(1 << 20)
        assert place, "memory needs no thread"
        encoder._memory.put_back(place)
        pool.wait_until_ready(never)
        pool.close()
        monkeypatch.undo()
    warm.close()
    assert pool.stats().processes == 0


LAST_BLOCKS = """
import atexit, sys
from pathlib import Path
import numpy as np
from reading import LAYOUT, NAMESPACE, block_of, eventually
from tierkv import BlockStore, BlockStoreConfig, Buffers

config = BlockStoreConfig(
    cold_path=Path(sys.argv[1]), warm_bytes=32 * LAYOUT.block_bytes, num_reader_processes=2, min_free_bytes=0
)
store = BlockStore(config, namespace=NAMESPACE)
keys = store.keys((np.arange(24 * LAYOUT.block_size) % 1000).tolist())

def end():
    if "late" in sys.argv:
        save()
    if "flush" in sys.argv:
        store.flush()
    store.close()

def save():
    store.save(keys, Buffers([block_of(number) for number in range(24)]))

atexit.register(end)
if "late" not in sys.argv:
    readers = store._tiers.memory.readers
    readers.start()
    eventually(lambda: readers.stats().ready == 2)
    save()
"""


@pytest.mark.parametrize("how", [("flush",), (), ("late", "flush"), ("late",)], ids="-".join)
def test_what_is_saved_before_an_interpreter_ends_is_on_disk(how: tuple[str, ...], tmp_path: Path) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", LAST_BLOCKS, str(tmp_path / "cold"), *how],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    config = BlockStoreConfig(cold_path=tmp_path / "cold", warm_bytes=8 * LAYOUT.block_bytes, num_reader_processes=0)
    with BlockStore(config, namespace=NAMESPACE) as store:
        assert store.contains(store.keys((np.arange(24 * LAYOUT.block_size) % 1000).tolist())) == 24, done.stderr


def test_a_process_that_is_killed_costs_no_record() -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        for lost in (1, 2):
            os.kill(pool.pids()[-1], signal.SIGKILL)
            with encoder.encoding(blocks, is_awaited=never) as records:
                assert_right(records)
            assert pool.stats().failed == lost


def test_a_process_that_hangs_has_ended_before_its_memory_is_free() -> None:
    """Stopped before it writes, it would write over the next record there once it goes on."""
    with open_pool(processes=1, answer_s=0.3) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        with encoder.encoding(blocks[:1], is_awaited=never) as records:
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
        with encoder.encoding(blocks[:1], is_awaited=never) as records:
            assert_right(records)
        assert (pool.stats().failed, pool.stats().encoded) == (1, 0)


def test_a_block_that_a_process_refuses_is_encoded_here_and_the_process_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        real = pool_module.EncodeRequest
        monkeypatch.setattr(pool_module, "EncodeRequest", lambda **fields: real(**fields | {"codec": "none"}))
        with encoder.encoding(blocks[:1], is_awaited=never) as records:
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
        pool.num_encoding = 2
        with open_encoder(pool) as encoder:
            blocks = fill(warm)
            for refused[0] in (False, True):
                with encoder.encoding(blocks, is_awaited=never) as records:
                    assert_right(records)
    assert most == {"there": 2, "here": 1}


def test_what_is_awaited_waits_for_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes take what they can, all threads the rest: two at a time at least."""
    both, may_go_on = threading.Barrier(2, timeout=20), threading.Event()
    real, hung = encode_record, []

    def here(*arguments: object, **options: object) -> EncodedRecord:
        both.wait()
        record = real(*arguments, **options)  # type: ignore[arg-type]
        may_go_on.set()
        return record

    def there(*_: object, **__: object) -> None:
        hung.append(may_go_on.wait(20))

    monkeypatch.setattr(encoder_module, "encode_record", here)
    monkeypatch.setattr(ReaderPool, "encode", there)
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        with encoder.encoding(blocks, is_awaited=always) as records:
            assert len(records) == NUM_SLOTS
    assert all(hung)


def test_a_wait_that_begins_later_frees_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush that comes while a job is encoded is not held up by what the job began with."""
    asked: list[bool] = []
    real = encode_record

    def here(*arguments: object, **options: object) -> EncodedRecord:
        asked.append(encoder._here.locked())
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(encoder_module, "encode_record", here)
    monkeypatch.setattr(ReaderPool, "encode", lambda *_, **__: None)
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks, count = fill(warm), iter(range(100))
        with encoder.encoding(blocks, is_awaited=lambda: next(count) >= NUM_SLOTS * 2):
            pass
        assert all(asked)
        asked.clear()
        with encoder.encoding(blocks, is_awaited=lambda: next(count) >= 0):
            pass
    assert not any(asked) and len(asked) == NUM_SLOTS


def test_an_error_in_the_pool_costs_no_record_and_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("something unforeseen")

    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        monkeypatch.setattr(ReaderPool, "encode", fail)
        for _ in range(2):
            with encoder.encoding(blocks, is_awaited=never) as records:
                assert_right(records)


def test_processes_that_hang_hold_up_a_job_once() -> None:
    with open_pool(processes=2, answer_s=0.5) as (pool, warm):
        pool.num_encoding = 1
        with open_encoder(pool) as encoder:
            blocks = fill(warm)
            for pid in pool.pids():
                os.kill(pid, signal.SIGSTOP)
            with encoder.encoding(blocks, is_awaited=never) as records:
                assert_right(records)
        assert pool.stats().failed == 1


def test_a_block_whose_tokens_do_not_fit_a_message_is_encoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = BlockLayout.uniform(num_layers=1, block_size=20_000, kv_heads=1, head_dim=32, dtype="bfloat16")
    taken: list[int] = []
    monkeypatch.setattr(RecordMemory, "take", lambda self, num_bytes: taken.append(num_bytes))
    with open_pool(processes=1, layout=layout) as (pool, warm), open_encoder(pool, layout=layout) as encoder:
        blocks = fill(warm, layout)
        with encoder.encoding(blocks, is_awaited=never) as records:
            assert_right(records, layout=layout)
        assert (pool.stats().ready, pool.stats().failed, taken) == (1, 0, [])


def test_memory_is_taken_for_a_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(RecordMemory, "take", lambda self, num_bytes: taken.append(num_bytes))
    with open_pool(processes=1) as (pool, warm), open_encoder(pool) as encoder:
        blocks = fill(warm)
        reader = pool._take()
        with encoder.encoding(blocks, is_awaited=never) as records:
            assert_right(records)
        assert reader and not taken
        pool._put_back(reader)


def test_to_write_starts_a_quarter_of_the_processes_and_to_read_the_rest() -> None:
    warm = WarmPool(LAYOUT.block_bytes, NUM_SLOTS)
    pool = ReaderPool.of_slab(warm, num_processes=4, num_in_process=2)
    assert pool
    with open_encoder(pool) as encoder:
        for _ in range(2):
            with encoder.encoding(fill(warm), is_awaited=never) as records:
                assert_right(records)
                del records
            eventually(lambda: pool.stats().ready == 1)
        assert pool.stats().processes == 1
        pool.start()
        pool.start(2)
        eventually(lambda: pool.stats().ready == 4)
        pool.close()
    warm.close()


def test_closing_the_pool_while_blocks_are_encoded_costs_no_record() -> None:
    with open_pool() as (pool, warm), open_encoder(pool) as encoder, ThreadPoolExecutor(1) as threads:
        blocks = fill(warm)
        pids = pool.pids()
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)

        def encode() -> None:
            with encoder.encoding(blocks, is_awaited=never) as records:
                assert_right(records)

        encoded = threads.submit(encode)
        eventually(lambda: bool(pool._busy))
        pool.close()
        encoded.result()
        assert not any(map(is_alive, pids)) and pool.stats().failed == 0


@pytest.mark.parametrize("has_remote", [False, True])
def test_records_lie_in_their_memory_until_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_remote: bool
) -> None:
    """And for longer where remote tiers get them."""
    real = RecordMemory.put_back

    def put_back(self: RecordMemory, place: Slab) -> None:
        place.bytes[:] = 0xEE
        real(self, place)

    monkeypatch.setattr(RecordMemory, "put_back", put_back)
    blocks = [block_of(number) for number in range(16)]
    config = BlockStoreConfig(
        cold_path=tmp_path / "cold",
        warm_bytes=32 * LAYOUT.block_bytes,
        num_reader_processes=1,
        min_free_bytes=0,
        remote=f"dir://{tmp_path / 'remote'}" if has_remote else None,
    )
    with BlockStore(config, namespace=NAMESPACE) as store:
        keys = store.keys((np.arange(16 * LAYOUT.block_size) % 1000).tolist())
        tiers: Any = store._tiers
        readers, memory = tiers.memory.readers, tiers._saver._encoder._memory
        readers.start()
        eventually(lambda: readers.stats().ready == 1)
        written: list[tuple[EncodedRecord, bytes]] = []
        if has_remote:
            monkeypatch.setattr(
                tiers._saver._remote, "write", lambda record: written.append((record, bytes(record.data)))
            )
        store.save(keys, Buffers(blocks))
        eventually(lambda: readers.stats().encoded == 16)
        store.flush()
        assert len(written) == (16 if has_remote else 0)
        assert all(record.data.tobytes() == then for record, then in written)
        written.clear()
    assert memory._is_closed and not memory._free
    with BlockStore(replace(config, remote=None), namespace=NAMESPACE) as store:
        out = [bytearray(LAYOUT.block_bytes) for _ in keys]
        load = store.load(store.reserve(keys), Buffers(out))
        load.synchronize()
        assert load.num_loaded == 16 and [bytes(each) for each in out] == [each.tobytes() for each in blocks]


def test_a_block_store_has_processes_encode_what_is_saved(tmp_path: Path) -> None:
    namespace = NAMESPACE
    tokens = np.arange(6 * LAYOUT.block_size) % 1000
    blocks = [block_of(number) for number in range(6)]
    config = BlockStoreConfig(
        cold_path=tmp_path / "cold", warm_bytes=8 * LAYOUT.block_bytes, num_reader_processes=2, min_free_bytes=0
    )
    with BlockStore(config, namespace=namespace) as store:
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
    with BlockStore(config, namespace=namespace) as store:
        keys = store.keys(tokens.tolist())
        assert store.contains(keys) == 6
        out = [bytearray(LAYOUT.block_bytes) for _ in keys]
        load = store.load(store.reserve(keys), Buffers(out))
        load.synchronize()
        assert load.num_loaded == 6
        assert [bytes(each) for each in out] == [each.tobytes() for each in blocks]
