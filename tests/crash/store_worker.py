"""What the processes do that the tests of this folder kill. Run as `python store_worker.py ACTION DIRECTORY`.

Each writes a line when something has been acknowledged; the test reads so many lines, then kills.
"""

from __future__ import annotations

import contextlib
import itertools
import resource
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
from cold_blocks import NAMESPACE, block_bytes, chain_of, open_store, read, record_of

from tierkv.errors import StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import EncodedRecord
from tierkv.storage.state_file import write_state_file

SMALL_QUOTA = 256 << 10
FULL = (PutOutcome.FULL, PutOutcome.IO_ERROR)


def acknowledge(number: int) -> None:
    print(number, flush=True)


def put_forever(path: Path, first: int = 0) -> None:
    with open_store(path, quota_bytes=64 << 20) as store:
        for number in itertools.count(first):
            outcomes = store.put(chain_of(2, first=2 * number))
            assert outcomes == [PutOutcome.STORED] * 2, outcomes
            store.flush()
            acknowledge(number)


def put_some(path: Path, first: int) -> None:
    """Finish by itself: two of these run side by side."""
    with open_store(path, quota_bytes=64 << 20) as store:
        for number in range(first, first + 40):
            assert store.put(chain_of(2, first=2 * number)) == [PutOutcome.STORED] * 2
            acknowledge(number)


def evict_forever(path: Path) -> None:
    """Pin eight blocks, then let every put evict, and evict half of all now and then."""
    with open_store(path, quota_bytes=SMALL_QUOTA) as store:
        pinned = [record_of(number, seed=number) for number in range(8)]
        store.put(pinned)
        store.set_pinned([record.info.block_hash for record in pinned], True)
        store.flush()
        for number in itertools.count(8):
            store.put(chain_of(3, first=10 * number))
            if number % 16 == 0:
                store.evict(to_bytes=SMALL_QUOTA // 2)
            acknowledge(number)


def compact_forever(path: Path) -> None:
    with open_store(path, quota_bytes=64 << 20) as store:
        for number in range(60):
            store.put(chain_of(2, first=2 * number))
        store.flush()
        for number in itertools.count():
            store.put([record_of(100_000 + number)])
            store.delete(record_of(100_000 + number).info.block_hash)
            store.compact()
            acknowledge(number)


def save_forever(path: Path) -> None:
    records = [record.data.tobytes() for record in chain_of(60)]
    for number in itertools.count():
        write_state_file(path / "state", namespace=NAMESPACE.digest, description=NAMESPACE.describe(), records=records)
        acknowledge(number)


def fill_a_small_disk(path: Path, first: int) -> None:
    """Put blocks, from number `first` on, until nothing more goes in."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    with open_store(path, quota_bytes=64 << 20) as store:
        for number in itertools.count(first):
            record = record_of(number, seed=number)
            if store.put([record])[0] in FULL:
                return
            acknowledge(number)


def fill_this_disk(path: Path) -> None:
    """Pin eight blocks, put until nothing more goes in or each put evicts, take the disk's last byte, and go on.

    The last line is how many blocks were evicted, as a negative number.
    """
    (path / "reserve").write_bytes(bytes(128 << 10))  # for the test to give back
    with open_store(path, quota_bytes=64 << 20) as store:
        stored: list[EncodedRecord] = []
        for number in itertools.count():
            record = record_of(number, seed=number)
            if store.put([record])[0] in FULL or store.stats().evicted_blocks > 100:
                break
            stored.append(record)
            acknowledge(number)
            if number == 7:
                store.set_pinned([each.info.block_hash for each in stored], True)
        fill_up(path / "ballast")
        with ThreadPoolExecutor(200) as threads:  # each takes a reader's slot, on the second page of the lock file too
            barrier = threading.Barrier(200)
            list(threads.map(lambda record: (barrier.wait(), read(store, record.info)), stored[:8] * 25))
        for attempt in (store.compact, lambda: save(path, store), store.flush):
            with contextlib.suppress(StoreError):
                attempt()
        for record in stored[::7]:
            store.put([record_of([5] * 16, record.info)])
            store.delete(record_of([5] * 16, record.info).info.block_hash)
        acknowledge(-store.stats().evicted_blocks)


def open_on_a_tiny_disk(path: Path) -> None:
    """Open a new store where there may be no room for one, and say what came of it."""
    try:
        with open_store(path) as store:
            store.put([record_of(1)])
        print("opened")
    except StoreError as exc:
        print(exc)


def fill_up(path: Path) -> None:
    """Write a file until the disk has no byte left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(512))


def save(path: Path, store: ColdStore) -> None:
    records = [record for block_hash, _ in store.iter_entries() if (record := store.read_record(block_hash))]
    write_state_file(path / "state", namespace=NAMESPACE.digest, description=NAMESPACE.describe(), records=records)


def read_until_damaged(path: Path) -> None:
    """Read all blocks over and over until one is a miss; then use the store in every other way."""
    with open_store(path, quota_bytes=64 << 20) as store, ThreadPoolExecutor(4) as threads:
        infos = [record.info for number in range(40) for record in chain_of(2, first=2 * number)]
        blocks = [block_bytes(number) for number in range(80)]
        while True:
            found = list(threads.map(lambda info: read(store, info), infos))
            missing = [block for block in found if isinstance(block, MissReason)]
            wrong = [n for n, block in enumerate(found) if not same(block, blocks[n])]
            assert not wrong, wrong
            acknowledge(len(missing))
            if missing:
                break
        store.put(chain_of(2, first=10_000))
        for use in (store.check, store.verify, lambda: store.lookup(infos[0].block_hash), store.flush):
            with contextlib.suppress(StoreError):
                use()


def same(block: np.ndarray | MissReason, wanted: np.ndarray) -> bool:
    return isinstance(block, MissReason) or np.array_equal(block, wanted)


def read_forever(path: Path) -> None:
    """Stay inside a read transaction."""
    with open_store(path) as store, store._env.read():
        acknowledge(0)
        sys.stdin.read()


def hold_write_lock(path: Path) -> None:
    """Stay inside a write transaction."""
    with open_store(path) as store, store._env.write():
        acknowledge(0)
        sys.stdin.read()


def hold_lmdb_lock(path: Path) -> None:
    """Do as another program would that writes with LMDB alone."""
    with lmdb.open(str(path / "cold"), max_dbs=8) as env, env.begin(write=True):
        acknowledge(0)
        sys.stdin.read()


ACTIONS: dict[str, Callable[..., None]] = {
    function.__name__: function
    for function in (
        put_forever,
        put_some,
        evict_forever,
        compact_forever,
        save_forever,
        fill_a_small_disk,
        fill_this_disk,
        read_until_damaged,
        open_on_a_tiny_disk,
        read_forever,
        hold_write_lock,
        hold_lmdb_lock,
    )
}


if __name__ == "__main__":
    ACTIONS[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
