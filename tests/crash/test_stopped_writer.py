"""Another process holds the store's write lock and is stopped: requests go on, and closing ends."""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from child_process import ENVIRONMENT, command
from cold_blocks import OTHER, FakeClock, block_bytes, chain_of, open_store, read, record_of
from pattern_engine import PatternEngine, tiny_layout

from tierkv.cache import TierCache
from tierkv.config import CacheConfig
from tierkv.errors import StoreBusyError
from tierkv.namespace import Namespace
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome

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
    monkeypatch.setattr("tierkv.demotion._STALL_S", WAIT_S)
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
            in_time(cache._demoter.flush)
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
            for database, block_hash in ((batch.databases.index, first), (batch.databases.blocks, third)):
                value = bytearray(batch.txn.get(block_hash, db=database))
                value[50] ^= 1
                batch.txn.put(block_hash, bytes(value), db=database)
        with stopped_writer("hold_lmdb_lock", tmp_path):
            assert in_time(lambda: read(store, chain[2].info)) is MissReason.CORRUPT
            found = in_time(lambda: store.lookup_many([first, second, third]))
            assert [entry is not None for entry in found] == [False, True, False]
            in_time(lambda: store.touch(number.to_bytes(16, "big") for number in range(10_000)))
            assert store.is_due
        store.tend()
        assert [store.contains(block_hash) for block_hash in (first, second, third)] == [True, True, False]
        assert np.array_equal(read(store, chain[0].info), block_bytes(0))
        assert not store.is_due
        store.check()


def test_whoever_writes_waits_for_a_bounded_time(tmp_path: Path) -> None:
    with store_in(tmp_path) as store:
        store.put([record_of(1)])
        with stopped_writer("hold_write_lock", tmp_path):
            assert in_time(lambda: store.put([record_of(2), record_of(3)])) == [PutOutcome.BUSY] * 2
            with pytest.raises(StoreBusyError, match="another process"):
                store.set_pinned([record_of(1).info.block_hash], True)
            store.open_namespace(NAMESPACE)
            store.open_namespace(OTHER)
        store.tend()
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
        except StoreBusyError as exc:
            failures.append(exc)

    in_time(run)
    if failures:
        raise failures[0]
