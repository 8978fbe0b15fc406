"""Mutated records, state files, entries, rows, links and data files: an error of ours or a miss, never more.

"Never more" is no other exception, no hang (hypothesis would report it) and no memory out of proportion.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import xxhash
from cold_blocks import LAYOUT, NAMESPACE, chain_of, open_store, record_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.errors import CorruptBlockError, StoreError
from tierkv.storage.cold_rows import NamespaceRow, entry_of, pack_entry, pack_row, unpack_entry, unpack_row
from tierkv.storage.lmdb_search import find_leaf
from tierkv.storage.lmdb_tree import check_trees
from tierkv.storage.record import decode_record, parse_record
from tierkv.storage.state_file import StateFile, write_state_file
from tierkv.storage.state_format import ALIGN_BYTES, ROW, StateHeader

MAX_BYTES = 8 << 20
edits = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6)
sizes = st.none() | st.integers(0, 1 << 20)
fuzzed = settings(max_examples=200, deadline=None)


def mutated(data: bytes, changes: list[tuple[int, int]], size: int | None) -> bytes:
    """Change single bytes, half of them within the first 256, and cut or leave the length."""
    changed = bytearray(data)
    for number, (at, value) in enumerate(changes):
        changed[at % (256 if number % 2 else len(data)) % len(data)] = value
    return bytes(changed[: len(data) if size is None else size % (len(data) + 1)])


def assert_frugal(work: Callable[[], object]) -> None:
    tracemalloc.start()
    try:
        work()
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


@fuzzed
@given(changes=edits, size=sizes)
def test_a_mutated_record_is_refused_or_what_it_was(changes, size) -> None:
    record = record_of(1)
    data = mutated(record.data.tobytes(), changes, size)
    out = np.empty(LAYOUT.block_bytes, dtype=np.uint8)

    def use() -> None:
        with contextlib.suppress(StoreError):
            assert decode_record(data, out, expected=record.info, layout=LAYOUT) is None
        with contextlib.suppress(StoreError):
            assert parse_record(data).data.tobytes() == record.data.tobytes()

    assert_frugal(use)


@cache
def state_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state"
        records = [record.data.tobytes() for record in chain_of(3)]
        write_state_file(path, namespace=NAMESPACE.digest, description=NAMESPACE.describe(), records=records)
        return path.read_bytes()


@fuzzed
@given(changes=edits, size=sizes)
def test_a_mutated_state_file_is_refused_or_misses(changes, size) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state"
        path.write_bytes(mutated(state_bytes(), changes, size))

        def use() -> None:
            with contextlib.suppress(StoreError), StateFile(path) as state:
                out = np.empty(LAYOUT.block_bytes, dtype=np.uint8)
                for record in chain_of(3):
                    state.read_into(record.info, out, layout=LAYOUT)
                    state.find_longest_run(record.info.parent, record.info.token_bytes)
                list(state.iter_records())

        assert_frugal(use)


@pytest.mark.parametrize("field", ["offset", "size"])
@pytest.mark.parametrize("value", [1 << 20, 1 << 63, (1 << 64) - 1])
def test_an_index_that_points_past_its_records_is_refused_although_its_checksums_are_right(
    tmp_path: Path, field: str, value: int
) -> None:
    data = bytearray(state_bytes())
    header = StateHeader.unpack(bytes(data[: StateHeader.size]), actual_bytes=len(data))
    rows = np.frombuffer(data, dtype=ROW, offset=header.index_offset)
    rows[field][1] = value
    checked = bytes(data[ALIGN_BYTES : ALIGN_BYTES + header.description_bytes] + data[header.index_offset :])
    del rows
    data[: StateHeader.size] = replace(header, checksum=xxhash.xxh3_64_intdigest(checked)).pack()
    (tmp_path / "state").write_bytes(data)
    with pytest.raises(StoreError, match="points past"):
        StateFile(tmp_path / "state")


@fuzzed
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_are_no_state_file(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "state"
        path.write_bytes(b"TKVSTATE" + data)
        with pytest.raises(StoreError):
            StateFile(path)


@fuzzed
@given(changes=edits, size=sizes)
def test_a_mutated_index_entry_is_refused(changes, size) -> None:
    record = record_of(1)
    packed = pack_entry(record.info.block_hash, entry_of(record, depth=0, now=1.0))
    data = mutated(packed, changes, size)
    if data != packed:
        with pytest.raises(CorruptBlockError):
            unpack_entry(record.info.block_hash, data)


@fuzzed
@given(changes=edits, size=sizes)
def test_a_mutated_row_of_a_namespace_is_refused(changes, size) -> None:
    packed = pack_row(NamespaceRow(description=NAMESPACE.describe(), blocks=3))
    data = mutated(packed, changes, size)
    if data != packed:
        with pytest.raises(CorruptBlockError):
            unpack_row(data)


@cache
def store_bytes() -> tuple[bytes, bytes]:
    """Return a data file and the hash of a block in it."""
    with tempfile.TemporaryDirectory() as directory:
        with open_store(Path(directory)) as store:
            chain = chain_of(60)
            store.put(chain)
            for record in chain[30:]:
                store.delete(record.info.block_hash)
        return (Path(directory) / "cold" / "data.mdb").read_bytes(), chain[0].info.block_hash


@fuzzed
@given(
    places=st.lists(st.tuples(st.integers(0, 255), st.integers(0, 4095), st.integers(0, 255)), max_size=6),
    size=sizes,
)
def test_the_trees_of_a_mutated_data_file_are_sound_or_refused(places, size) -> None:
    data, block_hash = store_bytes()
    trees = [page for page in range(len(data) // 4096) if data[page * 4096 + 10] in (1, 2, 8)]
    changed = bytearray(data)
    for page, offset, value in places:
        changed[trees[page % len(trees)] * 4096 + offset] = value
    with tempfile.TemporaryFile() as file:
        file.write(changed[: len(data) if size is None else size])
        file.flush()
        for use in (
            lambda: check_trees(file.fileno()),
            lambda: find_leaf(file.fileno(), b"blocks", block_hash),
            lambda: find_leaf(file.fileno(), b"meta", b"format"),
        ):

            def suppressed(use: Callable[[], object] = use) -> None:
                with contextlib.suppress(CorruptBlockError, KeyError):
                    use()

            assert_frugal(suppressed)


@settings(max_examples=60, deadline=None)
@given(pages=st.lists(st.integers(0, 255), min_size=1, max_size=6), seed=st.integers(0, 1 << 30))
def test_a_store_with_pages_of_noise_opens_and_works(pages, seed) -> None:
    data, _ = store_bytes()
    changed = bytearray(data)
    random = np.random.default_rng(seed)
    for page in pages:
        at = page % (len(data) // 4096) * 4096
        changed[at : at + 4096] = random.bytes(4096)
    with tempfile.TemporaryDirectory() as directory:
        os.mkdir(f"{directory}/cold")
        Path(directory, "cold", "data.mdb").write_bytes(changed)
        with open_store(Path(directory)) as store:
            store.put(chain_of(3))
            store.verify(repair=True)
            store.check()
