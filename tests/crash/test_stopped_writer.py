"""Another process holds the store's write lock and is stopped: requests go on, and closing ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from child_process import ENVIRONMENT, command
from cold_blocks import OTHER, FakeClock, block_bytes, chain_of, damage_record, open_store, read, record_of
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import StoreBusyError, StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_batch import WriteBatch
from tierkv.storage.lmdb_lock import UserLock
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.values.namespace import Namespace

WORKER = Path(__file__).with_name("store_worker.py")
NAMESPACE = Namespace(weights="w", layout=tiny_layout())
BLOCK_BYTES = tiny_layout().block_bytes
HANG_S = 30.0
WAIT_S = 0.2
HOLDERS = ["hold_write_lock", "hold_lmdb_lock"]
Result = TypeVar("Result")


@contextlib.contextmanager
def stopped_writer(action: str, path: Path) -> Iterator[Callable[[], None]]:
    """A process that is stopped while it has the write lock; yields what ends it."""
    line = command(WORKER, action, path)
    with subprocess.Popen(line, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def end() -> None:
            process.kill()
            process.wait(HANG_S)

        try:
            assert process.stdout is not None and process.stdout.readline() == "0\n"
            process.send_signal(signal.SIGSTOP)
            yield end
        finally:
            end()


def in_time(work: Callable[[], Result]) -> Result:
    """Return what `work` does; fail, rather than hang, where it does not come back."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(HANG_S)
    assert not thread.is_alive(), "it hangs"
    return results[0]


def store_in(path: Path, clock: FakeClock | None = None) -> ColdStore:
    return open_store(path, clock, write_wait_s=WAIT_S)


def open_cache(store: ColdStore) -> TierCache:
    config = CacheConfig(block_size=4, hot_bytes=8 * BLOCK_BYTES, warm_bytes=4 * BLOCK_BYTES, write_wait_s=WAIT_S)
    return TierCache(config, namespace=NAMESPACE, cold=store)


def run_prompts(cache: TierCache, count: int) -> None:
    """Run requests for prompts of four blocks each, none of which is like another."""
    engine = PatternEngine(cache)
    for number in range(count):
        cache.release(engine.start([1000 * number + token for token in range(16)]))


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.transfer.offload._STALL_S", WAIT_S)
    monkeypatch.setattr("tierkv.storage.lmdb_env._CLOSE_WAIT_S", WAIT_S)


@pytest.mark.parametrize("holder", HOLDERS)
def test_requests_go_on_and_what_could_not_be_written_is_counted(tmp_path: Path, holder: str) -> None:
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(store_in(tmp_path))
        cache = stack.enter_context(open_cache(store))
        with stopped_writer(holder, tmp_path):
            in_time(lambda: run_prompts(cache, 20))
            stats = cache.stats()
            assert stats.requests == 20
            assert stats.skipped_writes == sum(stats.skip_reasons.values()) > 0
            assert set(stats.skip_reasons) <= {"busy", "stalled"}
        in_time(cache.flush)
        cache.check()


def test_what_is_computed_after_the_stopped_process_has_ended_is_written(tmp_path: Path) -> None:
    clock = FakeClock()
    with store_in(tmp_path, clock) as store, open_cache(store) as cache:
        with stopped_writer("hold_write_lock", tmp_path) as end:
            in_time(lambda: run_prompts(cache, 5))
            in_time(cache._offloader.flush)
            end()
        clock.now += 60.0
        prompt = list(range(5000, 5016))
        cache.release(PatternEngine(cache).start(prompt))
        cache.flush()
        assert [store.contains(block_hash) for block_hash in cache.match(prompt).block_hashes] == [True] * 4
        cache.check()


@pytest.mark.parametrize("holder", HOLDERS)
def test_closing_ends_and_says_what_was_not_written(tmp_path: Path, holder: str, caplog) -> None:
    store = store_in(tmp_path)
    cache = open_cache(store)
    with stopped_writer(holder, tmp_path), caplog.at_level(logging.WARNING):
        PatternEngine(cache).start(list(range(16)))
        in_time(cache.close)
        in_time(store.close)
        assert "not written to lower tiers before the cache was closed" in caplog.text
    assert not store._env.is_open


def test_a_reader_never_waits_for_the_lock_and_damage_is_seen_to_later(tmp_path: Path) -> None:
    chain = chain_of(3)
    first, second, third = (record.info.block_hash for record in chain)
    with store_in(tmp_path) as store:
        store.put(chain)
        with store._writer.batch() as batch:
            for database, block_hash in ((batch.databases.entries, first), (batch.databases.blocks, third)):
                value = bytearray(batch.txn.get(block_hash, db=database))
                value[50] ^= 1
                batch.txn.put(block_hash, bytes(value), db=database)
        with stopped_writer("hold_lmdb_lock", tmp_path):
            assert in_time(lambda: read(store, chain[2].info)) is MissReason.CORRUPT
            found = in_time(lambda: store.lookup_many([first, second, third]))
            assert [entry is not None for entry in found] == [False, True, False]
            in_time(lambda: store.notes.touch(number.to_bytes(16, "big") for number in range(10_000)))
            assert store.notes.are_due
        store.maintain()
        assert [store.contains(block_hash) for block_hash in (first, second, third)] == [True, True, False]
        assert np.array_equal(read(store, chain[0].info), block_bytes(0))
        assert not store.notes.are_due
        store.check()


def test_every_writer_waits_for_a_bounded_time(tmp_path: Path) -> None:
    with store_in(tmp_path) as store:
        store.put([record_of(1)])
        with stopped_writer("hold_write_lock", tmp_path):
            assert in_time(lambda: store.put([record_of(2), record_of(3)])) == [PutOutcome.BUSY] * 2
            with pytest.raises(StoreBusyError, match="another process"):
                store.set_pinned([record_of(1).info.block_hash], True)
            store.open_namespace(NAMESPACE)
            store.open_namespace(OTHER)
        store.maintain()
        assert {NAMESPACE.digest, OTHER.digest} <= {each.digest for each in store.namespaces()}


def test_a_store_is_not_opened_for_writing_while_a_stopped_process_writes(tmp_path: Path) -> None:
    store_in(tmp_path).close()
    with stopped_writer("hold_write_lock", tmp_path), pytest.raises(StoreBusyError):
        in_time_or_raise(lambda: store_in(tmp_path))
    store_in(tmp_path).close()


def in_time_or_raise(work: Callable[[], object]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except StoreError as exc:
            failures.append(exc)

    in_time(run)
    if failures:
        raise failures[0]


WRITING = {
    "maintain": lambda store: store.maintain(),
    "flush": lambda store: store.flush(),
    "evict": lambda store: store.evict(to_bytes=0),
    "evict of a namespace": lambda store: store.evict(namespace=OTHER.digest),
    "set_pinned": lambda store: store.set_pinned([record_of(1).info.block_hash], True),
    "set_quota": lambda store: store.set_quota(1 << 30),
    "delete": lambda store: store.delete(record_of(1).info.block_hash),
    "repair": lambda store: store.verify(repair=True),
}


def test_every_call_on_a_store_whose_lock_is_held_ends_in_time(tmp_path: Path) -> None:
    """Those that write say that it is busy, those that read do not notice, and no block is taken for a damaged one."""
    records = [record_of(number) for number in range(3)]
    with store_in(tmp_path) as store:
        store.put(records)
        damage_record(store, records[2].info.block_hash)
        with stopped_writer("hold_write_lock", tmp_path):
            for name, call in WRITING.items():
                store.notes.touch([records[0].info.block_hash])
                started = time.monotonic()
                with pytest.raises(StoreBusyError):
                    in_time_or_raise(lambda call=call: call(store))
                assert time.monotonic() - started < 2 * WAIT_S + 1.0, name
            with pytest.raises(StoreError):
                in_time_or_raise(store.compact)
            in_time(store.check)
            assert in_time(store.verify).damaged.keys() == {records[2].info.block_hash}
            assert in_time(store.stats).blocks == 3
            assert len(in_time(store.namespaces)) == 1
        assert store.verify(repair=True).removed == 1
        store.check()


def test_a_put_waits_once_for_a_busy_store_however_much_has_been_noted(tmp_path: Path) -> None:
    records = [record_of(number) for number in range(3)]
    with store_in(tmp_path) as store:
        store.put(records)
        with stopped_writer("hold_write_lock", tmp_path):
            store.note_damaged(records[0].info.block_hash)
            store.notes.touch([records[1].info.block_hash])
            started = time.monotonic()
            assert store.put([record_of(number) for number in range(10, 13)]) == [PutOutcome.BUSY] * 3
            assert store.put([record_of(20)]) == [PutOutcome.BUSY]  # for some seconds nothing is tried
            assert time.monotonic() - started < 1.9 * WAIT_S


def test_a_repair_of_a_busy_store_takes_no_sound_block_for_a_damaged_one(tmp_path: Path, monkeypatch) -> None:
    """Only its entry is damaged: that is made anew, if not now, then when the store is free."""
    record = record_of(1)
    block_hash = record.info.block_hash
    with store_in(tmp_path) as store:
        store.put([record])
        with store._writer.batch() as batch:
            batch.txn.put(block_hash, b"x" * 96, db=batch.databases.entries)
        with stopped_writer("hold_write_lock", tmp_path), monkeypatch.context() as patch:
            patch.setattr(WriteBatch, "remove_subtree", lambda *_: pytest.fail("it was to be removed"))
            with pytest.raises(StoreBusyError):
                in_time_or_raise(lambda: store.verify(repair=True))
        assert store.verify(repair=True).removed == 0
        assert store.contains(block_hash)


def test_a_process_stopped_while_it_checks_the_store_keeps_others_for_a_bounded_time(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tierkv.storage.lmdb_lock._WAIT_S", WAIT_S)
    store_in(tmp_path).close()
    fd = os.open(tmp_path / "cold" / "users.lock", os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with pytest.raises(StoreBusyError, match="being compacted or repaired"):
            store_in(tmp_path)
    finally:
        os.close(fd)
    store_in(tmp_path).close()


def test_a_compaction_that_cannot_be_alone_has_its_share_of_the_lock_again(tmp_path: Path) -> None:
    with store_in(tmp_path) as store:
        store.put([record_of(1)])
        fd = os.open(tmp_path / "cold" / "users.lock", os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH)
            with pytest.raises(StoreError, match="open in another process"):
                store.compact()
            fcntl.flock(fd, fcntl.LOCK_SH)
            with pytest.raises(BlockingIOError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(fd)
        assert store.contains(record_of(1).info.block_hash)


def test_a_data_file_that_was_replaced_while_the_lock_was_lost_is_opened_anew(tmp_path: Path, monkeypatch) -> None:
    with store_in(tmp_path) as store:
        store.put([record_of(1)])
        path = tmp_path / "cold" / "data.mdb"

        def lose(_: UserLock) -> bool:
            shutil.copy(path, path.with_name("copy"))
            os.replace(path.with_name("copy"), path)
            return False

        monkeypatch.setattr(UserLock, "try_alone", lose)
        with pytest.raises(StoreError, match="open in another process"):
            store.compact()
        assert os.path.samestat(os.fstat(store._env.data.fd), path.stat())
        assert store.put([record_of(2)]) == [PutOutcome.STORED]
    with store_in(tmp_path) as store:
        assert store.stats().blocks == 2


def test_a_compaction_whose_file_cannot_be_opened_again_lets_others_in(tmp_path: Path, monkeypatch) -> None:
    with store_in(tmp_path) as store:
        store.put([record_of(1)])
        with monkeypatch.context() as patch:
            patch.setattr("tierkv.storage.lmdb_env.DataFile", failing)
            with pytest.raises(StoreError, match="cannot be opened"):
                store.compact()
        with pytest.raises(StoreError, match="is closed"):
            store.stats()
        with pytest.raises(StoreError, match="is closed"):
            store.put([record_of(2)])
        fd = os.open(tmp_path / "cold" / "users.lock", os.O_RDWR)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(fd)
    with store_in(tmp_path) as store:
        assert store.stats().blocks == 1
        store.check()


def failing(*_: object, **__: object) -> None:
    raise OSError(5, "Input/output error")


def test_lookups_beside_compactions_miss_nothing(tmp_path: Path) -> None:
    """The handles of the databases that a compaction opens anew are taken within each transaction."""
    records = [record_of(number) for number in range(4)]
    hashes = [record.info.block_hash for record in records]
    wrong: list[object] = []
    is_done = threading.Event()
    with open_store(tmp_path) as store:
        store.put(records)

        def look() -> None:
            while not is_done.is_set():
                try:
                    found = [None if entry is None else True for entry in store.lookup_many(hashes)]
                    reason = read(store, records[1].info)
                except StoreError as exc:
                    wrong.append(exc)
                    return
                if found != [True] * 4 or isinstance(reason, MissReason):
                    wrong.append((found, reason))
                    return

        threads = [threading.Thread(target=look) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            store.compact()
        is_done.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert store.put([record_of(9)]) == [PutOutcome.STORED]
        store.check()


def test_a_reader_waits_for_a_compaction_that_hangs_for_a_bounded_time(tmp_path: Path) -> None:
    with store_in(tmp_path) as store:
        store.put([record_of(1)])
        with store._env._gate.exclusive(1.0) as is_alone:
            assert is_alone
            with pytest.raises(StoreBusyError):
                in_time_or_raise(lambda: store.lookup(record_of(1).info.block_hash))
            with store._env._gate.exclusive(WAIT_S) as is_alone_too:
                assert not is_alone_too
            with pytest.raises(StoreBusyError):  # who has not had its turn lets nobody in
                in_time_or_raise(store.stats)
        assert store.contains(record_of(1).info.block_hash)
