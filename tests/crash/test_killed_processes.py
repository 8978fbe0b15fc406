"""Real processes are killed while they write, evict, compact, save and read: nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from child_process import ENVIRONMENT, command
from cold_blocks import NAMESPACE, block_bytes, chain_of, open_store, read, record_of

from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import EncodedRecord
from tierkv.storage.state_file import StateFile

WORKER = Path(__file__).with_name("store_worker.py")
TIMEOUT_S = 60
PAGE_BYTES = 4096
OVERFLOW_PAGE = 4


@contextlib.contextmanager
def worker(action: str, path: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    line = command(WORKER, action, path, *arguments)
    pipe = subprocess.PIPE
    with subprocess.Popen(line, env=ENVIRONMENT, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def acknowledged_before_kill(action: str, path: Path, count: int) -> list[int]:
    """Kill a worker when it has written `count` lines; return all that it wrote."""
    with worker(action, path) as process:
        assert process.stdout is not None
        numbers = [int(process.stdout.readline()) for _ in range(count)]
        process.kill()
        numbers += [int(line) for line in process.stdout.read().splitlines()]
        assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    return numbers


def assert_all_there(store: ColdStore, records: list[EncodedRecord], first_seed: int) -> None:
    """Each record's block must be readable; its content is that of its seed."""
    for seed, record in enumerate(records, first_seed):
        assert np.array_equal(read(store, record.info), block_bytes(seed))


def assert_usable(store: ColdStore) -> None:
    assert store.damaged is None
    store.check()
    assert store.verify().is_sound
    assert store.put([record_of(999_999)]) == [PutOutcome.STORED]


@pytest.mark.parametrize("count", [1, 7, 30, 90])
def test_a_killed_writer_leaves_every_acknowledged_block_readable(tmp_path: Path, count: int) -> None:
    numbers = acknowledged_before_kill("put_forever", tmp_path, count)
    with open_store(tmp_path, quota_bytes=64 << 20) as store:
        for number in numbers:
            assert_all_there(store, chain_of(2, first=2 * number), 2 * number)
        assert_usable(store)


@pytest.mark.parametrize("count", [3, 40, 100])
def test_a_writer_killed_while_it_evicts_leaves_whole_chains_and_all_pinned_blocks(tmp_path: Path, count: int) -> None:
    acknowledged_before_kill("evict_forever", tmp_path, count)
    with open_store(tmp_path) as store:
        assert_all_there(store, [record_of(number, seed=number) for number in range(8)], 0)
        assert_usable(store)


@pytest.mark.parametrize("count", [1, 4, 9])
def test_a_process_killed_while_it_compacts_loses_nothing(tmp_path: Path, count: int) -> None:
    acknowledged_before_kill("compact_forever", tmp_path, count)
    with open_store(tmp_path, quota_bytes=64 << 20) as store:
        for number in range(60):
            assert_all_there(store, chain_of(2, first=2 * number), 2 * number)
        assert_usable(store)
    assert not list((tmp_path / "cold").glob("*.tmp"))


@pytest.mark.parametrize("count", [1, 5])
def test_a_process_killed_while_it_saves_leaves_a_whole_state_file(tmp_path: Path, count: int) -> None:
    acknowledged_before_kill("save_forever", tmp_path, count)
    with StateFile(tmp_path / "state") as state:
        assert [len(record) for record in state.iter_records()] == [r.stored_bytes for r in chain_of(60)]
        assert state.namespace == NAMESPACE.digest


def test_the_remains_of_a_killed_save_go_with_the_next_one(tmp_path: Path) -> None:
    acknowledged_before_kill("save_forever", tmp_path, 2)
    with worker("save_forever", tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
    assert len(list(tmp_path.iterdir())) <= 2  # the state, and what this one was about to write


def test_a_killed_reader_gives_its_snapshot_back(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(1)])
        with worker("read_forever", tmp_path) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert store._env.clear_dead_readers() == 0
            process.kill()
            process.wait(TIMEOUT_S)
        assert store._env.clear_dead_readers() == 1
        assert_usable(store)


@pytest.mark.parametrize("seed", range(6))
def test_a_reader_survives_that_its_data_file_is_cut_or_bits_in_it_flip(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    data = tmp_path / "cold" / "data.mdb"
    with open_store(tmp_path, quota_bytes=64 << 20) as store:
        for number in range(40):
            store.put(chain_of(2, first=2 * number))
    with worker("read_until_damaged", tmp_path) as process:
        assert process.stdout is not None
        for _ in range(rng.randrange(1, 4)):
            assert process.stdout.readline() == "0\n"
        if seed % 2:
            os.truncate(data, rng.randrange(2 * PAGE_BYTES, data.stat().st_size // 2))
        else:
            flip_value_bits(data, rng)
        process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
    with open_store(tmp_path, quota_bytes=64 << 20) as store:
        for number in range(80):
            block = read(store, chain_of(2, first=number // 2 * 2)[number % 2].info)
            assert isinstance(block, MissReason) or np.array_equal(block, block_bytes(number))
        assert store.verify(repair=True).problem is None
        assert store.put([record_of(999_999)]) == [PutOutcome.STORED]


def flip_value_bits(path: Path, rng: random.Random) -> None:
    """Flip a bit in the middle of three pages of values."""
    with open(path, "r+b", buffering=0) as file:
        pages = file.read()
        values = [page for page in range(len(pages) // PAGE_BYTES) if pages[page * PAGE_BYTES + 10] == OVERFLOW_PAGE]
        for page in rng.sample(values, 3):
            at = page * PAGE_BYTES + 2000
            file.seek(at)
            file.write(bytes([pages[at] ^ 1]))


def test_two_writers_take_turns_and_lose_nothing(tmp_path: Path) -> None:
    with worker("put_some", tmp_path, 0) as one, worker("put_some", tmp_path, 1000) as two:
        for process in (one, two):
            process.communicate(timeout=TIMEOUT_S)
            assert process.returncode == 0
    with open_store(tmp_path, quota_bytes=64 << 20) as store:
        for number in [*range(40), *range(1000, 1040)]:
            assert_all_there(store, chain_of(2, first=2 * number), 2 * number)
        assert_usable(store)


@pytest.mark.parametrize("first", [0, 5000, 16000])
def test_a_full_disk_is_an_outcome_and_what_went_in_stays(tmp_path: Path, first: int) -> None:
    with worker("fill_a_small_disk", tmp_path, first) as process:
        out, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
    numbers = [int(line) for line in out.splitlines()]
    assert len(numbers) > 20
    with open_store(tmp_path, quota_bytes=64 << 20) as store:
        found = [read(store, record_of(number, seed=number).info) for number in numbers]
        for number, block in zip(numbers, found, strict=True):
            assert block is MissReason.ABSENT or np.array_equal(block, block_bytes(number))
        assert sum(block is not MissReason.ABSENT for block in found) > len(numbers) // 3  # the others were evicted
        assert_usable(store)
