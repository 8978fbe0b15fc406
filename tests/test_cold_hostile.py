"""Stores that another program has prepared: odd files, children in cycles, impossible numbers, odd descriptions."""

from __future__ import annotations

import json
import os
import socket
import stat
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest
from cold_blocks import LAYOUT, NAMESPACE, OTHER, QUOTA, chain_of, damage_record, open_store, record_of

from tierkv.errors import ConfigError, CorruptBlockError, StoreError
from tierkv.storage import cold_rows, lmdb_directory
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_batch import WriteBatch, descriptions_limit
from tierkv.storage.cold_children import CHILD_ROW_BYTES, ChildRow
from tierkv.storage.cold_rows import (
    NAMESPACE_PREFIX,
    NamespaceRow,
    pack_entry,
    pack_row,
    unpack_entry,
    unpack_row,
)
from tierkv.storage.outcomes import PutOutcome
from tierkv.values.namespace import DESCRIPTION_LIMIT_BYTES, Namespace

FILES = ["data.mdb", "lock.mdb", "users.lock", "write.lock"]


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))


def make_dangling_link(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


def make_link(path: Path) -> None:
    path.with_name("elsewhere").write_bytes(b"")
    path.symlink_to(path.with_name("elsewhere"))


# -- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("make", [make_fifo, make_socket, Path.mkdir, make_dangling_link, make_link])
def test_a_file_of_the_store_that_is_no_regular_file_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    store = Path("cold")
    store.mkdir()
    make(store / name)
    with pytest.raises(StoreError, match=rf"{name}.* is a .*, not a regular file"):
        ColdStore(store, quota_bytes=QUOTA, write_wait_s=0.1)
    assert not (store / "nothing").exists()


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "users.lock"])
def test_a_fifo_is_refused_by_a_read_only_store_too(tmp_path: Path, name: str) -> None:
    open_store(tmp_path).close()
    (tmp_path / "cold" / name).unlink()
    os.mkfifo(tmp_path / "cold" / name)
    with pytest.raises(StoreError, match="FIFO"):
        open_store(tmp_path, read_only=True)


def test_a_file_where_a_compaction_writes_is_removed_and_no_symbolic_link_is_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("the user's")
    with open_store(tmp_path) as store:
        store.put(chain_of(2))
        for make in (make_fifo, lambda path: path.symlink_to(kept)):
            make(tmp_path / "cold" / "compact.tmp")
            store.compact()
        store.check()
    assert (kept / "file").read_text() == "the user's"


def test_a_path_that_no_system_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a path"):
        ColdStore(tmp_path / "a\0b", quota_bytes=QUOTA)


@pytest.mark.parametrize("mode", [0o777, 0o707])
def test_a_store_that_others_can_write_to_is_logged(tmp_path: Path, caplog, mode: int) -> None:
    open_store(tmp_path).close()
    assert not caplog.records
    (tmp_path / "cold").chmod(mode)
    open_store(tmp_path).close()
    assert "other users can write to it" in caplog.text


def test_the_store_of_another_user_is_read_and_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(tmp_path) as store:
        store.put(chain_of(2))
    me = (tmp_path / "cold").stat().st_uid
    monkeypatch.setattr(lmdb_directory.os, "geteuid", lambda: me + 1000 if me == 0 else me)
    if me == 0:
        os.chown(tmp_path / "cold", 4242, -1)
    else:
        pytest.skip("giving a directory to another user takes root")
    with pytest.raises(StoreError, match="belongs to another user"):
        open_store(tmp_path)
    with open_store(tmp_path, read_only=True) as store:
        assert store.stats().blocks == 2


def test_a_new_store_is_its_users_alone(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    assert stat.S_IMODE((tmp_path / "cold").stat().st_mode) == 0o700


# -- children ----------------------------------------------------------------------------------------------


def edit(store: ColdStore, change: Callable[[WriteBatch], None]) -> None:
    with store._writer.batch() as batch:
        change(batch)


def put_link(batch: WriteBatch, parent: bytes, child: bytes, tokens: bytes = b"") -> None:
    key = ChildRow(parent, tokens, 0, child).key
    batch.txn.put(key, b"", db=batch.databases.children)


def hashes_of(length: int, **options: object) -> tuple[list, list[bytes]]:
    chain = chain_of(length, **options)
    return chain, [record.info.block_hash for record in chain]


def test_a_block_that_is_its_own_child_is_removed_once_and_evicted(tmp_path: Path) -> None:
    chain, hashes = hashes_of(3)
    with open_store(tmp_path) as store:
        store.put(chain)
        edit(store, lambda batch: put_link(batch, hashes[2], hashes[2]))
        with pytest.raises(StoreError):
            store.check()
        assert store.evict(to_bytes=0).blocks == 3
        assert store.stats().live_bytes == 0
        store.check()
        store.put(chain)
        edit(store, lambda batch: put_link(batch, hashes[1], hashes[1]))
        assert store.delete(hashes[1]) == 2
        store.check()


def test_a_longer_cycle_and_rows_across_namespaces_remove_no_other_blocks(tmp_path: Path) -> None:
    chain, hashes = hashes_of(3)
    others, other_hashes = hashes_of(2, first=50, namespace=OTHER)
    with open_store(tmp_path) as store:
        store.put([*chain, *others])
        for parent, child in (
            (hashes[2], hashes[0]),  # a cycle of three
            (hashes[1], other_hashes[0]),  # into another namespace
            (hashes[2], b"missing block 16"),
        ):
            edit(store, lambda batch, p=parent, c=child: put_link(batch, p, c))
        assert store.delete(hashes[1]) == 2
        assert [store.contains(each) for each in [*hashes, *other_hashes]] == [True, False, False, True, True]
        store.verify(repair=True)
        store.check()
        assert store.verify().is_sound
        assert store.evict(to_bytes=0).blocks == 3


def test_a_repair_corrects_the_children_table_and_depths(tmp_path: Path) -> None:
    chain, hashes = hashes_of(3)
    with open_store(tmp_path) as store:
        store.put(chain)

        def confuse(batch: WriteBatch) -> None:
            put_link(batch, hashes[2], hashes[0])
            batch.txn.put(hashes[0], b"", db=batch.databases.children)  # a row as short as its parent
            batch.txn.put(hashes[1] + b"\xff" * 200, b"", db=batch.databases.children)
            entry = batch.entry(hashes[1])
            assert entry is not None
            batch.write_entry(hashes[1], replace(entry, depth=7))

        edit(store, confuse)
        assert store.children(hashes[2]) == [hashes[0]] and store.children(hashes[0]) == [hashes[1]]
        assert store.find_longest_run(hashes[1], chain[2].info.token_bytes) is not None
        assert store.verify(repair=True).removed == 0
        store.check()
        assert store.verify().is_sound
        assert [store.contains(each) for each in hashes] == [True] * 3


def test_a_child_row_with_another_number_of_tokens_ends_no_search_and_no_removal(tmp_path: Path) -> None:
    """Such a key cannot be made anew from what it says, so to delete what it says left it where it was."""
    chain, hashes = hashes_of(2)
    node = ChildRow(hashes[0], b"", 0, hashes[1]).key[:16]
    odd = node + b"\x01" * 64 + b"\0" + b"\0" + hashes[1]
    assert len(odd) == CHILD_ROW_BYTES
    with pytest.raises(CorruptBlockError):
        ChildRow.unpack(odd)
    with open_store(tmp_path) as store:
        store.put(chain)
        edit(store, lambda batch: batch.txn.put(odd, b"", db=batch.databases.children) or None)
        damage_record(store, hashes[1], offset=2)  # its tokens cannot be read, so its rows are searched for
        assert store.delete(hashes[1]) == 1
        assert store.children(hashes[0]) == []
        store.check()


# -- numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers",
    [
        {"last_access": float("nan")},
        {"created": float("inf")},
        {"raw_bytes": (1 << 64) - 1},
        {"num_tokens": 0},
        {"stored_bytes": 1 << 30, "value_bytes": 1 << 20},
    ],
)
def test_an_entry_with_impossible_numbers_is_made_anew_from_its_block(tmp_path: Path, numbers: dict) -> None:
    record = record_of(1)
    block_hash = record.info.block_hash
    with open_store(tmp_path) as store:
        store.put([record])
        entry = store.lookup(block_hash)
        assert entry is not None
        packed = pack_entry(block_hash, replace(entry, **numbers))
        with pytest.raises(CorruptBlockError):
            unpack_entry(block_hash, packed)
        edit(store, lambda batch: batch.txn.put(block_hash, packed, db=batch.databases.entries) or None)
        assert store.lookup(block_hash) is None
        store.maintain()
        assert store.lookup(block_hash) is not None
        store.check()
        assert store.evict(to_bytes=0).blocks == 1


@pytest.mark.parametrize("damage", ["a flipped bit", "impossible numbers", "cut"])
def test_a_run_of_lookups_ends_at_a_damaged_entry_and_notes_it(tmp_path: Path, damage: str) -> None:
    record = record_of(1)
    block_hash = record.info.block_hash
    with open_store(tmp_path) as store:
        store.put([record])
        entry = store.lookup(block_hash)
        assert entry is not None
        packed = pack_entry(block_hash, entry)
        packed = {
            "a flipped bit": bytes([packed[0] ^ 1]) + packed[1:],
            "impossible numbers": pack_entry(block_hash, replace(entry, num_tokens=0)),
            "cut": packed[:-1],
        }[damage]
        edit(store, lambda batch: batch.txn.put(block_hash, packed, db=batch.databases.entries) or None)
        assert store.lookup_run([block_hash]) == [None]
        assert store.notes.is_damaged(block_hash)


def test_an_entry_that_counts_other_bytes_than_its_block_takes_is_found_by_verify(tmp_path: Path) -> None:
    record = record_of(1)
    block_hash = record.info.block_hash
    with open_store(tmp_path) as store:
        store.put([record, record_of(2)])

        def inflate(batch: WriteBatch) -> None:
            entry = batch.entry(block_hash)
            assert entry is not None
            batch.write_entry(block_hash, replace(entry, value_bytes=4_000_000_000))

        edit(store, inflate)
        assert store.verify(repair=True).damaged.keys() == {block_hash}
        store.check()
        assert store.stats().blocks == 1


def test_a_cost_that_is_no_number_is_none(tmp_path: Path) -> None:
    record = replace(record_of(1), cost_s=float("nan"))
    with open_store(tmp_path) as store:
        assert store.put([record]) == [PutOutcome.STORED]
        entry = store.lookup(record.info.block_hash)
        assert entry is not None and entry.cost_s == 0.0


def test_a_block_longer_than_an_entry_can_say_finds_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.storage.cold_batch.MAX_VALUE_BYTES", 1000)
    assert cold_rows.MAX_VALUE_BYTES == (1 << 32) - 1
    with open_store(tmp_path) as store:
        assert store.put([record_of(1)]) == [PutOutcome.FULL]
        store.check()


@pytest.mark.parametrize(
    "numbers", [{"value_bytes": -1}, {"raw_bytes": 1 << 63}, {"created": float("nan")}, {"last_used": float("inf")}]
)
def test_a_row_with_impossible_numbers_is_counted_anew(tmp_path: Path, numbers: dict) -> None:
    with open_store(tmp_path) as store:
        store.open_namespace(NAMESPACE)
        store.put(chain_of(2))
        before = store.stats().live_bytes
        row = NamespaceRow(description=NAMESPACE.describe(), blocks=2, **numbers)
        packed = lmdb_row(row)
        with pytest.raises(CorruptBlockError):
            unpack_row(packed)
        with store._env.write() as txn:
            txn.put(NAMESPACE_PREFIX + NAMESPACE.digest, packed, db=store._databases.meta)
            txn.put(NAMESPACE_PREFIX + b"short", packed, db=store._databases.meta)
        assert store.stats().live_bytes == before
        store.verify(repair=True)
        store.check()


def lmdb_row(row: NamespaceRow) -> bytes:
    """Return a row as another program would pack it, without the limits of `pack_row`."""
    import msgspec
    import xxhash

    packed = msgspec.msgpack.encode(row)
    return packed + xxhash.xxh3_64_digest(packed)


def test_a_damaged_file_full_of_headers_that_claim_all_of_it_is_salvaged_in_bounded_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_store(tmp_path) as store:
        store.put(chain_of(3))
    path = tmp_path / "cold" / "data.mdb"
    data = path.read_bytes()
    start = data.index(b"TKVB")
    header = bytearray(data[start : start + 128])
    size = 256 * 4096
    struct.pack_into("<Q", header, 96, size - 4096)
    page = (bytes(16) + bytes(header)).ljust(4096, b"\0")
    path.write_bytes(b"\0" * 8192 + data[8192:] + page * 512)
    read = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: read.append(count) or real(fd, count, at))
    with open_store(tmp_path) as store:
        assert store.damaged is not None and store.stats().blocks == 3
    assert sum(read) < 40 * path.with_name("data.mdb.damaged").stat().st_size + (64 << 20)


# -- descriptions ---------------------------------------------------------------------------------------

ODD = [
    b"[]",
    b"1",
    b"\xff",
    b"",
    b"{}",
    b'{"name": "x"}',
    b'{"salt": 1}',
    b"[" * 60_000,
    b"{" + b'"a":{' * 5000,
    b"NaN",
]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_description_that_is_none_is_refused_when_it_comes_and_shown_where_it_is(tmp_path: Path, text: bytes) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(ConfigError, match="description"):
            store.register_namespace(NAMESPACE.digest, text)
        store.open_namespace(NAMESPACE)
        store.put(chain_of(2))
        row = NamespaceRow(description=text)
        edit(store, lambda batch: batch.namespace(NAMESPACE.digest).__setattr__("description", row.description))
        (found,) = store.namespaces()
        assert found.description == {} and found.blocks == 2
        assert (found.problem is None) == (text == b"{}")
        assert store.verify().is_sound
        assert store.stats().blocks == 2


def test_a_description_of_another_namespace_is_refused_and_shown_as_that(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(ConfigError, match="another namespace"):
            store.register_namespace(NAMESPACE.digest, OTHER.describe())
        edit(store, lambda batch: batch.register(NAMESPACE.digest, OTHER.describe()))
        (found,) = store.namespaces()
        assert found.description == {} and found.problem is not None and "another" in found.problem


def test_a_name_that_cannot_be_printed_is_shown_escaped(tmp_path: Path) -> None:
    fields = json.loads(NAMESPACE.describe())
    for name, shown in (("a\ud800b", "a\\ud800b"), ("a\x1b[31mb", "a\\x1b[31mb")):
        with open_store(tmp_path) as store:
            text = json.dumps({**fields, "name": name}).encode()
            edit(store, lambda batch, text=text: batch.register(NAMESPACE.digest, text))
            (found,) = store.namespaces()
            assert found.problem is None and found.description["name"] == shown
            json.dumps(found.description).encode()


def test_nan_in_a_description_is_shown_as_a_text(tmp_path: Path) -> None:
    namespace = Namespace(weights="w", layout=LAYOUT, architecture={"factor": float("nan")})
    with open_store(tmp_path) as store:
        store.open_namespace(namespace)
        (found,) = store.namespaces()
        assert found.description["architecture"] == {"factor": "NaN"}


def test_descriptions_are_bounded_together_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    def namespace(number: int) -> Namespace:
        text = "x" * (DESCRIPTION_LIMIT_BYTES - 1000)
        return Namespace(weights=f"w{number}", layout=LAYOUT, architecture={"x": text})

    with open_store(tmp_path) as store:
        store.open_namespace(NAMESPACE)
        store.put([record_of(1)])
        for number in range(30):
            store._writer._clock.now += 1
            store.open_namespace(namespace(number))
        found = {each.digest: each for each in store.namespaces()}
        assert sum(len(each.raw_description) for each in found.values()) <= descriptions_limit(QUOTA)
        assert found[namespace(29).digest].description["weights"] == "w29"
        assert namespace(0).digest not in found
        assert NAMESPACE.digest in found, "a namespace that has blocks stays"
        assert store.stats().file_bytes < 4 << 20
        store.check()


def test_namespaces_without_a_block_are_bounded_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.storage.cold_batch.MAX_UNUSED", 3)
    with open_store(tmp_path) as store:
        for number in range(10):
            store._writer._clock.now += 1
            store.open_namespace(Namespace(weights=f"w{number}", layout=LAYOUT))
        assert {each.description["weights"] for each in store.namespaces()} == {"w6", "w7", "w8", "w9"}


def test_namespaces_whose_blocks_all_stay_lose_their_descriptions_oldest_first(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tierkv.storage.cold_batch.descriptions_limit", lambda quota_bytes: 1000)
    names = [Namespace(weights=f"w{number}", layout=LAYOUT, architecture={"x": "y" * 200}) for number in range(6)]
    with open_store(tmp_path) as store:
        for namespace in names:
            store._writer._clock.now += 1
            store.open_namespace(namespace)
            assert store.put([record_of(1, namespace=namespace)]) == [PutOutcome.STORED]
        found = {each.digest: each for each in store.namespaces()}
        assert len(found) == 6 and store.stats().blocks == 6
        assert found[names[0].digest].description == {} and found[names[5].digest].description["weights"] == "w5"
        store.check()


def test_what_waits_to_be_registered_is_bounded(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        for number in range(1000):
            store._writer.notes.note_namespace(number.to_bytes(16, "big"), b"x")
        assert len(store._writer.notes._rows.namespaces) == 64
        store._writer.notes._rows.namespaces.clear()


# -- errors ---------------------------------------------------------------------------------------------


HASH = record_of(1).info.block_hash
CALLS: dict[str, Callable[[ColdStore], object]] = {
    "lookup": lambda store: store.lookup(HASH),
    "contains": lambda store: store.contains(HASH),
    "children": lambda store: store.children(HASH),
    "find_longest_run": lambda store: store.find_longest_run(NAMESPACE.digest, record_of(1).info.token_bytes),
    "read_tokens": lambda store: store.read_tokens(HASH),
    "read_record": lambda store: store.read_record(HASH),
    "read_into": lambda store: store.read_into(record_of(1).info, bytearray(LAYOUT.block_bytes), layout=LAYOUT),
    "read_ahead": lambda store: store.read_ahead([HASH]),
    "is_in_memory": lambda store: store.is_in_memory(HASH),
    "iter_entries": lambda store: list(store.iter_entries()),
    "namespaces": lambda store: store.namespaces(),
    "stats": lambda store: store.stats(),
    "check": lambda store: store.check(),
    "verify": lambda store: store.verify(),
    "repair": lambda store: store.verify(repair=True),
    "put": lambda store: store.put([record_of(7)]),
    "touch": lambda store: store.notes.touch([HASH]),
    "maintain": lambda store: store.maintain(),
    "set_pinned": lambda store: store.set_pinned([HASH], True),
    "delete": lambda store: store.delete(HASH),
    "evict": lambda store: store.evict(to_bytes=0),
    "set_quota": lambda store: store.set_quota(1 << 30),
    "require_room": lambda store: store.require_room(),
    "open_namespace": lambda store: store.open_namespace(OTHER),
    "flush": lambda store: store.flush(),
    "compact": lambda store: store.compact(),
    "close": lambda store: store.close(),
}


def overwrite_metas(store: ColdStore) -> None:
    with open(store.path / "data.mdb", "r+b", buffering=0) as file:
        metas = bytearray(os.pread(file.fileno(), 8192, 0))
        for page in (0, 4096):
            metas[page + 32 : page + 40] = (1 << 40).to_bytes(8, "little")  # the map's size
            metas[page + 136 : page + 144] = (1 << 39).to_bytes(8, "little")  # the last page
        os.pwrite(file.fileno(), bytes(metas), 0)


def cut_file(store: ColdStore) -> None:
    os.truncate(store.path / "data.mdb", 4096)


def close_descriptor(store: ColdStore) -> None:
    """Let every plain read fail, as on a disk that has gone."""
    fd, store._env.data.fd = store._env.data.fd, 1 << 20
    os.close(fd)


@pytest.mark.parametrize("harm", [overwrite_metas, cut_file, close_descriptor])
@pytest.mark.parametrize("name", CALLS)
def test_whatever_happens_below_no_call_raises_another_error_than_the_stores_own(
    tmp_path: Path, harm: Callable[[ColdStore], None], name: str
) -> None:
    store = open_store(tmp_path, write_wait_s=1.0)
    try:
        store.put([record_of(1), record_of(2)])
        harm(store)
        try:
            CALLS[name](store)
        except StoreError:
            pass
    finally:
        store.close()


def test_a_file_that_counts_pages_which_it_does_not_have_is_not_mapped_anew(tmp_path: Path) -> None:
    """Another process's larger map is one reason to map the file anew, and overwritten meta pages look like that."""
    with open_store(tmp_path) as store:
        store.put([record_of(1)])
        overwrite_metas(store)
        for call in (store.check, store.stats, store.compact):
            with pytest.raises(CorruptBlockError, match="counts pages that it does not have"):
                call()


@pytest.mark.parametrize("error", [lmdb.Error("odd"), OSError(5, "Input/output error")])
def test_errors_of_lmdb_and_the_system_become_the_stores_own(tmp_path: Path, error: Exception) -> None:
    with open_store(tmp_path) as store:
        with pytest.raises(StoreError, match="cannot be written") as caught, store._writer.batch():
            raise error
        assert caught.value.__cause__ is error
        with pytest.raises(StoreError, match="cannot be read") as caught, store._env.read():
            raise error
        assert caught.value.__cause__ is error
        store.check()


def test_pack_row_bounds_what_damaged_entries_sum_up_to() -> None:
    assert unpack_row(pack_row(NamespaceRow(raw_bytes=1 << 70))).raw_bytes == 1 << 62
