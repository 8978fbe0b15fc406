"""Reader processes: the same blocks and the same misses as without them, and no process outlives its use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from reading import (
    LAYOUT,
    NAMESPACE,
    NUM_SLOTS,
    block_of,
    chain,
    descriptors,
    eventually,
    is_alive,
    open_large,
    open_pool,
)

from tierkv.readers import pool as pool_module
from tierkv.readers import process
from tierkv.readers.choice import choose_num_readers
from tierkv.readers.messages import ReadAnswer
from tierkv.readers.pool import ReaderPool
from tierkv.readers.reader import Reader
from tierkv.storage.coded import CodedBlock
from tierkv.storage.cold import ColdStore
from tierkv.storage.lmdb_search import find_leaf
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo, EncodedRecord, decode_record, encode_record
from tierkv.storage.record_source import FileRecord, ThreadMemory
from tierkv.storage.warm import WarmPool
from tierkv.values.layout import BlockLayout, LayerLayout
from tierkv.values.namespace import Namespace

MISFIT = LayerLayout(kv_heads=3, k_dim=320, v_dim=96)
LAYOUTS = [
    ("exponent16", LAYOUT),
    ("zstd", LAYOUT),
    ("exponent16", BlockLayout.uniform(num_layers=1, block_size=1024, kv_heads=8, head_dim=128, dtype="float16")),
    ("exponent32", BlockLayout.uniform(num_layers=2, block_size=256, kv_heads=8, head_dim=128, dtype="float32")),
    ("exponent16", BlockLayout(block_size=512, dtype="bfloat16", layers=(MISFIT, LayerLayout.of_latent(576), MISFIT))),
]


def read(
    store: ColdStore, info: BlockInfo, warm: WarmPool, pool: ReaderPool, *, slot: int = 0, layout: BlockLayout = LAYOUT
) -> MissReason | None:
    warm.slots[slot] = 0xA5
    return store.read_into(info, warm.slots[slot], layout=layout, decoders=pool)


def offset_in_file(store: ColdStore, record: EncodedRecord) -> int:
    return int.from_bytes(find_leaf(store._env.data.fd, b"blocks", record.info.block_hash).held, "little") * 4096 + 16


@pytest.mark.parametrize(("codec", "layout"), LAYOUTS, ids=[f"{c}-{la.dtype}-{la.num_layers}" for c, la in LAYOUTS])
def test_a_process_writes_the_bytes_that_a_thread_writes(codec: str, layout: BlockLayout, tmp_path: Path) -> None:
    namespace = Namespace(weights="w", layout=layout)
    records = chain(3, layout=layout, namespace=namespace, codec=codec)
    assert {each.codec for each in records} == {codec}
    with open_large(tmp_path) as store, open_pool(layout=layout) as (pool, warm):
        store.open_namespace(namespace)
        store.put(records)
        for number, record in enumerate(records):
            assert read(store, record.info, warm, pool, slot=number, layout=layout) is None
            expected = np.zeros(layout.block_bytes, dtype=np.uint8)
            assert decode_record(record.data, expected, expected=record.info, layout=layout) is None
            assert np.array_equal(warm.slots[number], expected)
        assert pool.stats().blocks == len(records)
        assert store.stats().hits == len(records)


def test_a_lossy_block_is_decoded_as_its_namespace_says(tmp_path: Path) -> None:
    lossy = Namespace(weights="w", layout=LAYOUT, lossy_codec="lossy-int8")
    (record,) = chain(1, namespace=lossy, codec="lossy-int8")
    (misplaced,) = chain(1, codec="lossy-int8")
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.open_namespace(lossy)
        store.open_namespace(NAMESPACE)
        store.put([record, misplaced])
        expected = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
        decode_record(record.data, expected, expected=record.info, layout=LAYOUT, lossy_codec="lossy-int8")
        assert read(store, record.info, warm, pool) is None
        assert np.array_equal(warm.slots[0], expected)
        assert pool.stats().blocks == 1
        assert read(store, misplaced.info, warm, pool) is MissReason.CORRUPT
        assert pool.stats().blocks == 1


def test_a_group_is_one_request_and_each_block_is_whole_or_a_miss_of_its_own(tmp_path: Path) -> None:
    records = chain(4)
    with open_large(tmp_path) as store, open_pool(processes=1) as (pool, warm):
        store.put(records)
        os.pwrite(store._env.data.fd, b"\xff" * 64, offset_in_file(store, records[2]) + (1 << 20))
        infos = [each.info for each in records]
        reasons = store.read_many_into(infos, list(warm.slots), layout=LAYOUT, decoders=pool)
        assert reasons == [None, None, MissReason.CORRUPT, None]
        for number in (0, 1, 3):
            assert np.array_equal(warm.slots[number], block_of(number))
        assert (pool.stats().blocks, pool._num_requests) == (3, 1)


def test_blocks_of_two_layouts_come_from_one_process(tmp_path: Path) -> None:
    """As in a daemon, whose clients have different models."""
    other = BlockLayout.uniform(num_layers=2, block_size=256, kv_heads=8, head_dim=128, dtype="bfloat16")
    namespace = Namespace(weights="w", layout=other)
    large, small = chain(2), chain(2, layout=other, namespace=namespace)
    with open_large(tmp_path) as store, open_pool(processes=1) as (pool, warm):
        store.put([*large, *small])
        places = warm.slots[1][: other.block_bytes], warm.slots[2][-other.block_bytes :]
        for number in range(2):
            assert read(store, large[number].info, warm, pool) is None
            assert store.read_into(small[number].info, places[number], layout=other, decoders=pool) is None
            assert np.array_equal(warm.slots[0], block_of(number))
            assert np.array_equal(places[number], block_of(number, other))
        assert pool.stats().blocks == 4


def test_a_process_that_has_written_much_maps_the_memory_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = chain(3)
    monkeypatch.setattr(process, "_MOST_MAPPED_BYTES", LAYOUT.block_bytes)
    warm = WarmPool(LAYOUT.block_bytes, NUM_SLOTS)
    assert warm.fd is not None
    places = process.Places(warm.fd, warm.slab_bytes)
    maps = {places._map}
    (tmp_path / "data").write_bytes(b"".join(bytes(each.data) for each in records))
    begin = 0
    with (tmp_path / "data").open("rb") as data:
        for number, record in enumerate(records):
            found = FileRecord(data.fileno(), offset=begin, size=record.stored_bytes, memory=ThreadMemory())
            at = number * warm.stride_bytes
            for wanted in (number, number - 1, number):
                out = places.view(at, LAYOUT.block_bytes)
                reason = decode_record(found, out, expected=records[wanted].info, layout=LAYOUT)
                assert (reason is None) == (wanted == number)
                del out  # a view would keep its map
            maps.add(places._map)
            begin += record.stored_bytes
    for number in range(3):
        assert np.array_equal(warm.slots[number], block_of(number))
    assert len(maps) > 2 and sum(each.closed for each in maps) == len(maps) - 1
    warm.close()


def test_another_block_of_the_same_hash_is_a_miss(tmp_path: Path) -> None:
    record = chain(1)[0]
    info = record.info
    other = BlockInfo(
        block_hash=info.block_hash,
        parent=info.parent,
        namespace=info.namespace,
        content_digest=bytes(16),
        token_bytes=info.token_bytes,
    )
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put([record])
        assert read(store, other, warm, pool) is MissReason.COLLISION
        assert read(store, info, warm, pool) is None


def test_a_file_that_is_cut_under_a_process_is_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = chain(2)
    answers: list[bytes] = []
    real = Reader.ask

    def ask(self: Reader, request: bytes, data_fd: int, *, timeout_s: float) -> bytes:
        os.truncate(data_fd, last + (1 << 20))
        answers.append(real(self, request, data_fd, timeout_s=timeout_s))
        return answers[-1]

    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put(records)
        assert read(store, records[0].info, warm, pool) is None
        last = max(offset_in_file(store, each) for each in records)
        cut = max(records, key=lambda each: offset_in_file(store, each))
        monkeypatch.setattr(Reader, "ask", ask)
        assert read(store, cut.info, warm, pool) is MissReason.TRUNCATED
        assert [each.is_right for each in msgspec.msgpack.decode(answers[0], type=ReadAnswer).outcomes] == [False]
        assert pool.stats().failed == 0


def test_a_file_that_cannot_be_read_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process gets a descriptor that is not open for reading."""
    record = chain(1)[0]
    real = Reader.ask

    def ask(self: Reader, request: bytes, data_fd: int, *, timeout_s: float) -> bytes:
        fd = os.open(tmp_path / "empty", os.O_WRONLY | os.O_CREAT)
        try:
            return real(self, request, fd, timeout_s=timeout_s)
        finally:
            os.close(fd)

    monkeypatch.setattr(Reader, "ask", ask)
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put([record])
        assert read(store, record.info, warm, pool) is MissReason.IO_ERROR


def test_raw_records_and_memory_elsewhere_are_left_to_the_thread(tmp_path: Path) -> None:
    records = chain(1, codec="raw")
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put(records)
        assert read(store, records[0].info, warm, pool) is None
        assert np.array_equal(warm.slots[0], block_of(0))
        store.delete(records[0].info.block_hash)
        store.put(chain(1))
        elsewhere = np.zeros(LAYOUT.block_bytes, dtype=np.uint8)
        assert store.read_into(records[0].info, elsewhere, layout=LAYOUT, decoders=pool) is None
        assert np.array_equal(elsewhere, block_of(0))
        assert pool._num_requests == 0


def test_partial_blocks_and_frames_for_a_gpu_are_left_to_the_thread(tmp_path: Path) -> None:
    whole = chain(1)[0]
    info = BlockInfo.first(whole.info.token_bytes[:-4], namespace=NAMESPACE.digest)
    partial = encode_record(info, block_of(0), layout=LAYOUT)
    assert partial.stored_bytes > 1 << 20
    coded = CodedBlock()
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put([whole, partial])
        assert read(store, info, warm, pool) is None
        assert store.read_into(whole.info, warm.slots[0], layout=LAYOUT, coded=coded, decoders=pool) is None
        assert coded.frame_sizes
        assert pool._num_requests == 0


def test_places_outside_of_the_shared_memory_are_left_to_the_thread(tmp_path: Path) -> None:
    """A process that wrote by such a place would write into another block, or end."""
    record = chain(1)[0]
    with open_large(tmp_path) as store, open_pool() as (pool, _):
        store.put([record])
        above = WarmPool(LAYOUT.block_bytes, 1)
        for other in (above.slots[0], np.zeros(LAYOUT.block_bytes, dtype=np.uint8)):
            for address in (int(other.ctypes.data) - 1, int(other.ctypes.data) + 1):
                pool._address, pool._memory_bytes = address, LAYOUT.block_bytes
                assert store.read_into(record.info, other, layout=LAYOUT, decoders=pool) is None
                assert np.array_equal(other, block_of(0))
        assert pool._num_requests == 0
        above.close()


def test_a_process_that_is_killed_costs_no_block(tmp_path: Path) -> None:
    records = chain(NUM_SLOTS)
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put(records)
        for lost in (1, 2):
            os.kill(pool.pids()[-1], signal.SIGKILL)  # the next one that is used
            for number, record in enumerate(records):
                assert read(store, record.info, warm, pool, slot=number) is None
                assert np.array_equal(warm.slots[number], block_of(number))
            assert (pool.stats().failed, pool.stats().processes) == (lost, 2 - lost)


def test_a_process_that_hangs_has_ended_before_its_place_is_free(tmp_path: Path) -> None:
    """Stopped before it writes, it would write over the next block in its slot once it goes on."""
    record = chain(1)[0]
    with open_large(tmp_path) as store, open_pool(processes=1, answer_s=0.3) as (pool, warm):
        store.put([record])
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        assert read(store, record.info, warm, pool) is None
        is_gone = not is_alive(pid)
        warm.slots[0] = 0x5A
        if not is_gone:  # show what it does
            os.kill(pid, signal.SIGCONT)
            time.sleep(1)
        assert (warm.slots[0] == 0x5A).all()
        assert is_gone
        assert pool.stats().failed == 1


def test_a_process_stopped_and_killed_in_the_middle_of_a_read_costs_no_block(tmp_path: Path) -> None:
    records = chain(NUM_SLOTS)
    with open_large(tmp_path) as store, open_pool(answer_s=0.5) as (pool, warm):
        store.put(records)
        pids = pool.pids()

        def disturb() -> None:
            time.sleep(0.004)
            os.kill(pids[0], signal.SIGSTOP)
            os.kill(pids[1], signal.SIGKILL)

        with ThreadPoolExecutor(4) as threads:
            reads = [
                threads.submit(read, store, record.info, warm, pool, slot=number)
                for number, record in enumerate(records)
            ]
            disturb()
            assert [each.result() for each in reads] == [None] * NUM_SLOTS
        for number in range(NUM_SLOTS):
            assert np.array_equal(warm.slots[number], block_of(number))
        for number, record in enumerate(records):  # and again: whatever was lost is found out by now
            assert read(store, record.info, warm, pool, slot=number) is None
            assert np.array_equal(warm.slots[number], block_of(number))
        for number, record in enumerate(records):
            assert read(store, record.info, warm, pool, slot=number) is None
        assert not any(map(is_alive, pids))


def test_an_interrupted_request_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = chain(1)[0]
    with open_large(tmp_path) as store, open_pool(processes=1) as (pool, warm):
        store.put([record])
        (pid,) = pool.pids()

        def interrupted(self: Reader, request: bytes, data_fd: int, *, timeout_s: float) -> bytes:
            raise KeyboardInterrupt

        monkeypatch.setattr(Reader, "ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            read(store, record.info, warm, pool)
        assert not is_alive(pid)


@pytest.mark.parametrize(
    "answer",
    [b"", b"\xc1", b"\x92\x07\x90", b"\x92\x01\x90"],
    ids=["empty", "no message", "another request", "no outcomes"],
)
def test_a_wrong_answer_ends_the_process_and_is_no_block(
    answer: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = chain(1)[0]
    with open_large(tmp_path) as store, open_pool(processes=1) as (pool, warm):
        store.put([record])
        monkeypatch.setattr(Reader, "ask", lambda self, request, data_fd, *, timeout_s: answer)
        assert read(store, record.info, warm, pool) is None
        assert np.array_equal(warm.slots[0], block_of(0))
        assert pool.stats().failed == 1


def test_blocks_are_read_while_processes_start(tmp_path: Path) -> None:
    record = chain(1)[0]
    with open_large(tmp_path) as store:
        store.put([record])
        with open_pool(wait=False) as (pool, warm):
            assert read(store, record.info, warm, pool) is None
            assert np.array_equal(warm.slots[0], block_of(0))
            assert pool.stats().ready < 2


def test_processes_that_cannot_start_cost_no_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    record = chain(1)[0]
    with open_large(tmp_path) as store, open_pool(wait=False) as (pool, warm):
        (thread,) = pool._threads
        thread.join()
        store.put([record])
        assert read(store, record.info, warm, pool) is None
        assert pool.stats().processes == 0


def test_a_compacted_store_is_read_from_its_new_file(tmp_path: Path) -> None:
    records = chain(NUM_SLOTS)
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put(records)
        assert read(store, records[0].info, warm, pool) is None
        store.delete(records[3].info.block_hash)
        before = offset_in_file(store, records[2])
        store.compact()
        store.put(records[3:])
        assert before != offset_in_file(store, records[2])
        for number, record in enumerate(records):
            assert read(store, record.info, warm, pool, slot=number) is None
            assert np.array_equal(warm.slots[number], block_of(number))
        assert pool.stats().blocks == 1 + NUM_SLOTS
        for pid in pool.pids():
            assert not [fd for fd in os.listdir(f"/proc/{pid}/fd") if "data.mdb" in os.readlink(f"/proc/{pid}/fd/{fd}")]


def test_closing_leaves_no_process_and_no_descriptor(tmp_path: Path) -> None:
    record = chain(1)[0]
    with open_large(tmp_path) as store:
        store.put([record])
        before = descriptors()
        for wait in (True, False):
            with open_pool(wait=wait) as (pool, warm):
                assert read(store, record.info, warm, pool) is None
                pids = [each.pid for each in (*pool._idle, *pool._busy, *pool._starting)]
                pool.close()
                pool.close()
                assert not any(map(is_alive, pids))
                assert read(store, record.info, warm, pool) is None
                assert np.array_equal(warm.slots[0], block_of(0))
        assert descriptors() == before
    assert threading.active_count() == 1 or "tierkv-readers" not in {each.name for each in threading.enumerate()}


def test_closing_while_blocks_are_read_costs_no_block_and_does_not_wait_for_a_stopped_process(tmp_path: Path) -> None:
    records = chain(NUM_SLOTS)
    with open_large(tmp_path) as store, open_pool() as (pool, warm), ThreadPoolExecutor(NUM_SLOTS) as threads:
        store.put(records)
        pids = pool.pids()
        os.kill(pids[0], signal.SIGSTOP)
        reads = [
            threads.submit(read, store, record.info, warm, pool, slot=number) for number, record in enumerate(records)
        ]
        eventually(lambda: any(each.pid == pids[0] for each in pool._busy))
        begun = time.monotonic()
        pool.close()
        assert [each.result() for each in reads] == [None] * NUM_SLOTS
        assert time.monotonic() - begun < pool_module._ANSWER_S / 2
        for number in range(NUM_SLOTS):
            assert np.array_equal(warm.slots[number], block_of(number))
        assert not any(map(is_alive, pids))
        assert pool.stats().failed == 0


def test_an_answer_that_comes_while_the_pool_is_closed_is_used_and_its_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = chain(1)[0]
    closing: list[threading.Thread] = []
    real = Reader.ask

    def ask(self: Reader, request: bytes, data_fd: int, *, timeout_s: float) -> bytes:
        answer = real(self, request, data_fd, timeout_s=timeout_s)
        closing.append(threading.Thread(target=pool.close))
        closing[0].start()
        eventually(lambda: pool._is_closed)
        return answer

    with open_large(tmp_path) as store, open_pool(processes=1) as (pool, warm):
        store.put([record])
        (pid,) = pool.pids()
        monkeypatch.setattr(Reader, "ask", ask)
        assert read(store, record.info, warm, pool) is None
        assert np.array_equal(warm.slots[0], block_of(0))
        closing[0].join()
        assert not is_alive(pid)
        assert (pool.stats().processes, pool.stats().blocks) == (0, 1)


def test_the_child_of_a_fork_has_no_processes(tmp_path: Path) -> None:
    record = chain(1)[0]
    with open_large(tmp_path) as store, open_pool() as (pool, warm):
        store.put([record])
        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert pool._take() is None
                pool.start()
                pool.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert read(store, record.info, warm, pool) is None
        assert pool.stats().blocks == 1


PARENT = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from reading import open_pool
with open_pool() as (pool, warm):
    if os.fork() == 0:  # it keeps the connections open
        os.close(1)
        time.sleep(30)
        os._exit(0)
    print(*pool.pids(), flush=True)
    time.sleep(60)
"""


def test_the_end_of_the_parent_ends_its_processes() -> None:
    """Killed, with a forked child of its own that has copies of the connections."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        pids = list(map(int, parent.stdout.readline().split()))
        assert len(pids) == 2
        parent.kill()
        parent.wait()
        try:
            eventually(lambda: not any(map(_runs, pids)), timeout_s=10)
        finally:
            os.killpg(parent.pid, signal.SIGKILL)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_an_interrupt_of_the_terminal_does_not_end_a_process() -> None:
    with open_pool() as (pool, _):
        for pid in pool.pids():
            assert os.getsid(pid) != os.getsid(0)
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(pid, number)
        time.sleep(0.2)
        assert pool.stats().ready == 2
        assert all(map(_runs, pool.pids()))


def test_few_threads_decode_in_process_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = chain(NUM_SLOTS)
    most = running = 0
    lock = threading.Lock()

    def counted(*arguments: object, **options: object) -> None:
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1

    monkeypatch.setattr("tierkv.storage.cold_reader.decode_record", counted)
    with open_large(tmp_path) as store, open_pool(wait=False) as (pool, warm), ThreadPoolExecutor(4) as threads:
        pool.close()
        store.put(records)
        list(threads.map(lambda number: read(store, records[number].info, warm, pool, slot=number), range(4)))
    assert most == 2  # as open_pool says


def test_a_process_loads_neither_torch_nor_lmdb() -> None:
    code = "import sys, tierkv.readers.process; print(*sorted({'torch', 'lmdb', 'typer'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_the_number_of_processes_follows_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    large = 4 << 20
    for cores, ranks, expected in ((2, 1, 0), (4, 1, 4), (16, 1, 16), (64, 1, 16), (64, 8, 8), (16, 8, 0)):
        monkeypatch.setattr("tierkv.readers.choice.available_cores", lambda cores=cores: cores)
        assert choose_num_readers(None, block_bytes=large, ranks=ranks) == expected
    assert choose_num_readers(3, block_bytes=large) == 3
    assert choose_num_readers(0, block_bytes=large) == 0
    assert choose_num_readers(3, block_bytes=4096) == 0
