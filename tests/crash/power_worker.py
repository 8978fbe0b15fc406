"""Makes the data files that a power failure may leave, and uses them: `python power_worker.py DIRECTORY FROM TO`.

Commits are not synced one by one. So after a power failure each page of the file may be as any commit since the last
sync left it, or as that left it, whatever the other pages are, and sectors of one page may differ in that too; the
file may be as long as it was at any of these commits. Everything is seeded; the seed is the last line.
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cold_blocks import FakeClock, block_bytes, chain_of, open_store, read, record_of

from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import EncodedRecord

PAGE_BYTES = 4096
SECTOR_BYTES = 512
NUM_COMMITS = 8
QUOTA = 2 << 20  # so small that commits evict, and use freed pages again


@dataclass(slots=True)
class History:
    """A store's data file after a sync and after each commit behind it.

    certain: what was stored at the sync and has not been removed since. seeds: of every block ever stored.
    """

    states: list[bytes]
    certain: list[EncodedRecord]
    records: dict[bytes, EncodedRecord]
    seeds: dict[bytes, int]


def make_history(directory: Path, rng: random.Random) -> History:
    shutil.rmtree(directory, ignore_errors=True)
    history = History([], [], {}, {})
    data = directory / "cold" / "data.mdb"
    clock = FakeClock()
    with open_store(directory, clock, quota_bytes=QUOTA) as store:
        for number in range(rng.randrange(20, 60)):
            put_chain(store, history, number, rng)
        store.flush(sync=True)
        history.states.append(data.read_bytes())
        synced = set(hashes_of(store))
        for number in range(100, 100 + NUM_COMMITS):
            clock.now += 1.0
            change(store, history, number, rng)
            store.flush(sync=False)
            history.states.append(data.read_bytes())
            synced &= set(hashes_of(store))
        history.certain = [history.records[block_hash] for block_hash in synced]
    return history


def change(store: ColdStore, history: History, number: int, rng: random.Random) -> None:
    stored = hashes_of(store)
    kind = rng.randrange(5)
    if kind == 0:
        store.delete(rng.choice(stored))
    elif kind == 1:
        store.evict(to_bytes=rng.randrange(QUOTA // 2, QUOTA))
    elif kind == 2:
        store.notes.touch(rng.sample(stored, min(len(stored), 10)))
    put_chain(store, history, number, rng)


def put_chain(store: ColdStore, history: History, number: int, rng: random.Random) -> None:
    chain = chain_of(rng.randrange(1, 6), first=10 * number)
    for seed, record in enumerate(chain, 10 * number):
        history.records[record.info.block_hash] = record
        history.seeds[record.info.block_hash] = seed
    store.put(chain)


def hashes_of(store: ColdStore) -> list[bytes]:
    return [block_hash for block_hash, _ in store.iter_entries()]


def after_power_failure(states: list[bytes], rng: random.Random) -> bytes:
    """Return one of the files that may be found: see above. `kept` is how likely a write has reached the disk."""
    size = len(rng.choice(states))
    kept = rng.choice((0.05, 0.5, 0.95, 0.999))
    is_torn = rng.random() < 0.3
    found = bytearray(size)
    for start in range(0, size, PAGE_BYTES):
        for at in range(start, start + PAGE_BYTES, SECTOR_BYTES) if is_torn and rng.random() < 0.1 else (start,):
            step = SECTOR_BYTES if at != start else PAGE_BYTES
            piece = states[0][at : at + step]
            for state in states[1:]:
                later = state[at : at + step]
                if later != piece and rng.random() < kept:
                    piece = later
            found[at : at + step] = piece.ljust(step, b"\0")[: size - at]
    return bytes(found)


def use(directory: Path, history: History, rng: random.Random, *, has_lock_file: bool) -> None:
    """What is read must be right; what is certain must be there; and the store goes on as a sound one."""
    cold = directory / "cold"
    lock = (cold / "lock.mdb").read_bytes()
    shutil.rmtree(cold)
    cold.mkdir()
    (cold / "data.mdb").write_bytes(after_power_failure(history.states, rng))
    if has_lock_file:  # of a later state than the data file
        (cold / "lock.mdb").write_bytes(lock)
    with open_store(directory, quota_bytes=2 * QUOTA) as store:
        for block_hash, record in history.records.items():
            block = read(store, record.info)
            assert isinstance(block, MissReason) or np.array_equal(block, block_bytes(history.seeds[block_hash]))
        lost = [record for record in history.certain if isinstance(read(store, record.info), MissReason)]
        assert not lost, f"{len(lost)} of {len(history.certain)} synced blocks are lost"
        store.check()
        assert store.put([record_of(999_999)]) == [PutOutcome.STORED]
        assert store.verify(repair=True).problem is None
    with open_store(directory, quota_bytes=2 * QUOTA) as store:
        assert store.damaged is None
        store.check()
        assert store.verify().is_sound


def main(directory: Path, first: int, last: int) -> None:
    logging.disable(logging.CRITICAL)
    for seed in range(first, last):
        print("seed", seed, flush=True)
        rng = random.Random(seed)
        history = make_history(directory, rng)
        for _ in range(5):
            use(directory, history, rng, has_lock_file=rng.random() < 0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
