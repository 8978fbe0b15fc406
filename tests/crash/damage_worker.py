"""Damages copies of a store or a state file and uses them. Run as `python damage_worker.py KIND DIRECTORY FROM TO`.

Everything is seeded. An assertion that fails, or a signal, shows in the exit code; the seed is the last line.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from cold_blocks import LAYOUT, NAMESPACE, block_bytes, chain_of, open_store, read, record_of

from tierkv.errors import StoreError
from tierkv.storage.cold import ColdStore
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import EncodedRecord
from tierkv.storage.state_file import StateFile, write_state_file

PAGE_BYTES = 4096
RECORD_BYTES = 8192
TREE_PAGES = (1, 2, 8)  # page flags of branches, leaves and meta pages
MAX_ROOTS_PER_FLIP = 1
REFUSED = {PutOutcome.IO_ERROR, PutOutcome.FULL}  # for the moment: the first that fails lets the next ones wait


def make_store(directory: Path) -> tuple[bytes, list[EncodedRecord]]:
    """Return a store's data file, and its records; some more were stored and deleted."""
    records: list[EncodedRecord] = []
    with open_store(directory) as store:
        store.open_namespace(NAMESPACE)
        for number in range(12):
            chain = chain_of(8, first=100 * number)
            store.put(chain)
            records += chain
        for number in range(12, 20):
            store.put([record_of(100 * number)])
            store.delete(record_of(100 * number).info.block_hash)
    return (directory / "cold" / "data.mdb").read_bytes(), records


def seed_of(record: EncodedRecord) -> int:
    return int(np.frombuffer(record.info.token_bytes, "<u4")[0])


def use_store(directory: Path, data: bytes, records: list[EncodedRecord]) -> list[EncodedRecord]:
    """Open a damaged store, read, write, verify and reopen it; return the records that it no longer has."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "cold").mkdir(parents=True)
    (directory / "cold" / "data.mdb").write_bytes(data)
    with open_store(directory) as store:
        lost = read_all(store, records)
        assert sum(store.stats().misses.values()) == len(lost)
        assert set(store.put(records)) <= {PutOutcome.STORED, PutOutcome.EXISTS}
        store.verify(repair=True)
        store.check()
        store.evict(to_bytes=0)
        store.put(records[:20])
    with open_store(directory) as store:
        assert store.damaged is None
        store.check()
        assert store.verify().is_sound
    return lost


def roots_of(lost: list[EncodedRecord]) -> list[EncodedRecord]:
    """Leave out the records that are lost because one before them is."""
    hashes = {record.info.block_hash for record in lost}
    return [record for record in lost if record.info.parent not in hashes]


def flip_store(directory: Path, seed: int, data: bytes, records: list[EncodedRecord]) -> None:
    """One to three bits: half of them in pages of trees, which are few, half of those near a page's header."""
    rng = random.Random(seed)
    damaged = bytearray(data)
    pages = range(len(data) // PAGE_BYTES)
    tree = [page for page in pages if data[page * PAGE_BYTES + 10] in TREE_PAGES]
    flips = rng.choice((1, 1, 3))
    for _ in range(flips):
        page = rng.choice(tree) if rng.random() < 0.5 else rng.choice(pages)
        offset = page * PAGE_BYTES + rng.randrange(40 if rng.random() < 0.5 else PAGE_BYTES)
        damaged[offset] ^= 1 << rng.randrange(8)
    lost = use_store(directory, bytes(damaged), records)
    assert len(roots_of(lost)) <= flips * MAX_ROOTS_PER_FLIP, "undamaged blocks are lost"


def flip_open_values(directory: Path, seed: int, data: bytes, records: list[EncodedRecord]) -> None:
    """Flip a few bits in the pages of values while the store is open: each costs a block and what follows it."""
    rng = random.Random(seed)
    pages = [page for page in range(len(data) // PAGE_BYTES) if data[page * PAGE_BYTES + 10] not in TREE_PAGES]
    flips = rng.choice((1, 1, 3))
    with opened_copy(directory, data) as (store, fd):
        for _ in range(flips):
            flip_bit(fd, rng.choice(pages) * PAGE_BYTES + rng.randrange(40 if rng.random() < 0.3 else PAGE_BYTES), rng)
        lost = read_all(store, records)
        assert len(roots_of(lost)) <= flips, "undamaged blocks are lost"
        assert set(store.put(records)) <= {PutOutcome.STORED, PutOutcome.EXISTS}
        assert not read_all(store, records)
        store.verify(repair=True)
        store.check()
        store.evict(to_bytes=0)
        store.put(records[:20])
    with open_store(directory) as store:
        assert store.damaged is None
        assert store.verify().is_sound


def flip_open_trees(directory: Path, seed: int, data: bytes, records: list[EncodedRecord]) -> None:
    """Flip a few bits in the pages of trees while the store is open, and read: no wrong bytes, and no signal."""
    rng = random.Random(seed)
    pages = [page for page in range(len(data) // PAGE_BYTES) if data[page * PAGE_BYTES + 10] in TREE_PAGES]
    flips = rng.choice((1, 3))
    with opened_copy(directory, data) as (store, fd):
        for _ in range(flips):
            flip_bit(fd, rng.choice(pages) * PAGE_BYTES + rng.randrange(40 if rng.random() < 0.5 else PAGE_BYTES), rng)
        for record in records:
            with contextlib.suppress(StoreError):
                store.lookup(record.info.block_hash)
            with contextlib.suppress(StoreError):
                store.find_longest_run(record.info.parent, record.info.token_bytes)
            block = read(store, record.info) if seed % 2 else None  # a miss removes what it takes for damaged
            if isinstance(block, np.ndarray):
                assert np.array_equal(block, block_bytes(seed_of(record)))
            if seed % 2 == 0:
                stored = store.read_record(record.info.block_hash)
                assert stored is None or stored == record.data.tobytes()
        store.verify()
        if "damaged while it was open" not in problem_of(store):
            return  # a bit in what a leaf holds, which has a checksum of its own, or one that nothing reads
        assert set(store.put(records)) <= REFUSED, "a damaged tree is written to"
    with open_store(directory) as store:
        assert store.damaged is not None
        assert len(roots_of(read_all(store, records))) <= flips, "undamaged blocks are lost"
        assert store.verify().is_sound


def cut_open(directory: Path, seed: int, data: bytes, records: list[EncodedRecord]) -> None:
    """Cut the data file while the store is open: misses until it is opened again, then what lies whole before it."""
    size = random.Random(seed).randrange(len(data)) if seed % 8 else 0
    with opened_copy(directory, data) as (store, fd):
        os.ftruncate(fd, size)
        if seed % 2:  # the first use of a cut file is a read, or what comes below
            assert {read(store, record.info) for record in records} == {MissReason.TRUNCATED}
        assert set(store.put(records)) <= REFUSED
        for use in (store.compact, store.check, store.namespaces, lambda: store.lookup(records[0].info.block_hash)):
            with contextlib.suppress(StoreError):
                use()
                raise AssertionError("a store that was cut short says nothing")
        assert store.verify().problem
    with open_store(directory) as store:
        assert (store.damaged is None) == (size == 0)
        assert_only_cut_blocks_lost(read_all(store, records), data[:size], records)
        assert store.put(records[:1])[0] in (PutOutcome.STORED, PutOutcome.EXISTS)


def problem_of(store: ColdStore) -> str:
    try:
        store.check()
    except StoreError as exc:
        return str(exc)
    return ""


@contextlib.contextmanager
def opened_copy(directory: Path, data: bytes) -> Iterator[tuple[ColdStore, int]]:
    """A store with this data file, open, and a descriptor of the file as another process would have it."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "cold").mkdir(parents=True)
    path = directory / "cold" / "data.mdb"
    path.write_bytes(data)
    fd = os.open(path, os.O_RDWR)
    try:
        with open_store(directory) as store:
            yield store, fd
    finally:
        os.close(fd)


def flip_bit(fd: int, offset: int, rng: random.Random) -> None:
    byte = os.pread(fd, 1, offset)[0]
    os.pwrite(fd, bytes([byte ^ 1 << rng.randrange(8)]), offset)


def read_all(store: ColdStore, records: list[EncodedRecord]) -> list[EncodedRecord]:
    """Read every block, which must be what it was; return the records that are misses."""
    lost: list[EncodedRecord] = []
    for record in records:
        block = read(store, record.info)
        if isinstance(block, MissReason):
            lost.append(record)
        else:
            assert np.array_equal(block, block_bytes(seed_of(record)))
    return lost


def cut_store(directory: Path, seed: int, data: bytes, records: list[EncodedRecord]) -> None:
    """Cut at any byte: what lies whole before it, and whose parents do, must be there."""
    size = random.Random(seed).randrange(len(data) + 1)
    assert_only_cut_blocks_lost(use_store(directory, data[:size], records), data[:size], records)


def assert_only_cut_blocks_lost(lost: list[EncodedRecord], data: bytes, records: list[EncodedRecord]) -> None:
    gone: set[bytes] = set()
    for record in records:  # parents first
        whole = data.find(record.data.tobytes()) >= 0
        if not whole or record.info.parent in gone:
            gone.add(record.info.block_hash)
    assert {record.info.block_hash for record in lost} <= gone, "undamaged blocks are lost"


def flip_state(directory: Path, seed: int, data: bytes, records: list[EncodedRecord]) -> None:
    rng = random.Random(seed)
    damaged = bytearray(data)
    offset = rng.randrange(RECORD_BYTES if rng.random() < 0.3 else len(data))
    damaged[offset] ^= 1 << rng.randrange(8)
    use_state(directory, bytes(damaged), records, most_lost=1)


def cut_state(directory: Path, seed: int, data: bytes, records: list[EncodedRecord]) -> None:
    size = random.Random(seed).randrange(len(data))
    use_state(directory, data[:size], records, most_lost=len(records))


def use_state(directory: Path, data: bytes, records: list[EncodedRecord], *, most_lost: int) -> None:
    path = directory / "damaged-state"
    path.write_bytes(data)
    with contextlib.suppress(StoreError), StateFile(path) as state:
        lost = 0
        for record in records:
            out = np.empty(LAYOUT.block_bytes, dtype=np.uint8)
            if state.read_into(record.info, out, layout=LAYOUT) is None:
                assert np.array_equal(out, block_bytes(seed_of(record)))
            else:
                lost += 1
        assert lost <= most_lost
        list(state.iter_records())


def make_state(directory: Path) -> tuple[bytes, list[EncodedRecord]]:
    records = [record for number in range(4) for record in chain_of(8, first=100 * number)]
    path = directory / "state"
    write_state_file(
        path,
        namespace=NAMESPACE.digest,
        description=NAMESPACE.describe(),
        records=[record.data.tobytes() for record in records],
    )
    return path.read_bytes(), records


Use = Callable[[Path, int, bytes, "list[EncodedRecord]"], None]
KINDS: dict[str, tuple[Callable[[Path], tuple[bytes, list[EncodedRecord]]], Use]] = {
    "flip_store": (make_store, flip_store),
    "cut_store": (make_store, cut_store),
    "flip_open_values": (make_store, flip_open_values),
    "flip_open_trees": (make_store, flip_open_trees),
    "cut_open": (make_store, cut_open),
    "flip_state": (make_state, flip_state),
    "cut_state": (make_state, cut_state),
}


def main(kind: str, directory: Path, first: int, last: int) -> None:
    logging.disable(logging.CRITICAL)  # every damage is said, hundreds of times
    make, use = KINDS[kind]
    data, records = make(directory if kind.endswith("state") else directory / "whole")
    for seed in range(first, last):
        print("seed", seed, flush=True)
        use(directory if kind.endswith("state") else directory / "damaged", seed, data, records)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
