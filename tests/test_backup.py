"""A whole store in one file: what is saved comes back, and what is damaged does not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
from cold_blocks import NAMESPACE, FakeClock, block_bytes, chain_of, damage_record, open_store, read
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.errors import CorruptBlockError, FormatVersionError, StoreError
from tierkv.storage import backup as module
from tierkv.storage.backup import BackupFile, is_backup, write_backup
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_tenants import TenantSettings
from tierkv.storage.move_store import move_store
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.whole_store import StoredBlock, iter_stored, put_stored, restore_settings

A = replace(NAMESPACE, salt="a")
BLOCKS = {NAMESPACE.digest: chain_of(5), A.digest: chain_of(4, first=50, namespace=A)}
TENANT = TenantSettings(name="research", cold_share=1, cold_limit=1 << 30)


def fill(store: ColdStore) -> None:
    for namespace in (NAMESPACE, A):
        store.open_namespace(namespace)
        assert set(store.put(BLOCKS[namespace.digest])) == {PutOutcome.STORED}
    store.set_tenants({A.identity()["salt"]: TENANT})


def load(path: Path, store: ColdStore) -> dict[PutOutcome, int]:
    def blocks() -> list[StoredBlock]:
        found = []
        for each in backup.read():
            if isinstance(each, StoredBlock):
                found.append(each)
            else:
                store.register_namespace(*each)
        return found

    with BackupFile(path) as backup:
        restore_settings(store, backup.settings)
        return dict(put_stored(store, blocks()))


def make(path: Path) -> Path:
    """Return a backup of a filled store."""
    with open_store(path / "source") as store:
        fill(store)
        write_backup(path / "b", store)
    return path / "b"


def test_a_backup_brings_back_every_namespace_with_ages_counts_pins_and_settings(tmp_path: Path) -> None:
    clock = FakeClock()
    first, second = BLOCKS[A.digest][0].info, BLOCKS[A.digest][1].info
    with open_store(tmp_path / "source", clock) as store:
        fill(store)
        clock.now += 100
        store.notes.touch([first.block_hash] * 7)
        store.set_pinned([first.block_hash], True)
        store.set_pinned([second.block_hash], True, ttl_s=50)
        saved = write_backup(tmp_path / "b", store)
        before = dict(store.iter_entries())
    assert (saved.namespaces, saved.blocks, saved.left_out) == (2, 9, 0)
    assert saved.file_bytes == (tmp_path / "b").stat().st_size and is_backup(tmp_path / "b")
    with open_store(tmp_path / "target", clock) as store:
        assert load(tmp_path / "b", store) == {PutOutcome.STORED: 9}
        assert dict(store.iter_entries()) == before and store.lookup(first.block_hash).access_count == 7  # type: ignore[union-attr]
        assert store.tenants() == {A.identity()["salt"]: TENANT}
        assert {each.description["name"] for each in store.namespaces()} == {"model"}
        for records in BLOCKS.values():
            for number, record in enumerate(records):
                seed = number if records is BLOCKS[NAMESPACE.digest] else 50 + number
                assert bytes(read(store, record.info)) == bytes(block_bytes(seed))
        assert store.verify().is_sound
        store.check()
        clock.now += 51
        assert second.block_hash in store.evict(to_bytes=0).hashes
        assert store.contains(first.block_hash)


def test_a_load_into_a_store_that_has_some_keeps_its_own_ages_and_settings(tmp_path: Path) -> None:
    clock = FakeClock()
    path = make(tmp_path)
    with open_store(tmp_path / "target", clock) as store:
        clock.now = 5e5
        store.open_namespace(NAMESPACE)
        store.put(BLOCKS[NAMESPACE.digest][:2])
        store.set_tenants({"": TenantSettings(name="default"), "f" * 64: TENANT})  # the name is taken
        assert load(path, store) == {PutOutcome.EXISTS: 2, PutOutcome.STORED: 7}
        assert store.tenants().keys() == {"", "f" * 64}
        ages = [entry.created for _, entry in store.iter_entries()]
        assert ages.count(5e5) == 2 and ages.count(1000.0) == 7


def test_settings_of_a_store_whose_quota_was_lowered_below_the_shares_come_back(tmp_path: Path) -> None:
    tenants = {"": TenantSettings(name="default", cold_share=1 << 23), "a" * 64: replace_share(TENANT, 1 << 22)}
    with ColdStore(tmp_path / "source", quota_bytes=1 << 24) as store:
        store.set_tenants(tenants)
        store.set_quota(1 << 22)
        write_backup(tmp_path / "b", store)
        moved = move_store(store, tmp_path / "moved")
    assert moved == 0
    with ColdStore(tmp_path / "moved") as store:
        assert store.tenants() == tenants and store.stats().quota_bytes == 1 << 22
    with BackupFile(tmp_path / "b") as backup, ColdStore(tmp_path / "t", quota_bytes=1 << 22) as store:
        restore_settings(store, backup.settings)
        assert store.tenants() == tenants


def test_a_block_whose_parent_was_not_there_when_the_save_began_is_left_out(tmp_path: Path) -> None:
    """Another process evicts a chain while its entries are listed, and stores it again."""
    records = BLOCKS[NAMESPACE.digest]
    with open_store(tmp_path / "source") as store:
        store.open_namespace(NAMESPACE)
        store.put(records)
        unlisted = records[2].info.block_hash
        listed = [each for each in store.iter_entries() if each[0] != unlisted]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(store, "iter_entries", lambda: iter(listed))
            found = list(iter_stored(store, [NAMESPACE.digest]))
    assert [each and each.record.info.block_hash for each in found] == [
        *(record.info.block_hash for record in records[:2]),
        None,
        None,
    ]


@pytest.mark.parametrize("lowered", ["quota", "limit"])
def test_a_store_whose_pinned_blocks_exceed_what_it_may_have_is_moved(tmp_path: Path, lowered: str) -> None:
    records = BLOCKS[NAMESPACE.digest]
    with open_store(tmp_path / "source") as store:
        store.open_namespace(NAMESPACE)
        store.put(records)
        store.set_pinned([record.info.block_hash for record in records], True)
        if lowered == "quota":
            store.set_quota(8192, evict=True)
        else:
            store.set_tenants({"": TenantSettings(name="default", cold_limit=8192)}, evict=True)
        before, tenants, quota_bytes = dict(store.iter_entries()), store.tenants(), store.stats().quota_bytes
        assert len(before) == 5
        assert move_store(store, tmp_path / "moved") == 5
    with ColdStore(tmp_path / "moved") as store:
        assert (dict(store.iter_entries()), store.tenants()) == (before, tenants)
        assert store.stats().quota_bytes == quota_bytes
        store.check()


def replace_share(settings: TenantSettings, share: int) -> TenantSettings:
    return TenantSettings(name=settings.name, cold_share=share, cold_limit=settings.cold_limit)


def test_a_pin_with_an_impossible_end_ends_at_once_or_never(tmp_path: Path) -> None:
    ends = {0: 1e308, 1: float("-inf"), 2: -5.0}
    with open_store(tmp_path / "target") as store:
        store.open_namespace(NAMESPACE)
        store.put(BLOCKS[NAMESPACE.digest][:3])
        hashes = [record.info.block_hash for record in BLOCKS[NAMESPACE.digest]]
        found = {block_hash: replace(entry, pinned=True) for block_hash, entry in store.iter_entries()}
        store.set_history({hashes[at]: (found[hashes[at]], end) for at, end in ends.items()})
        assert {hashes.index(each): end > 1e9 for each, end in store.pin_ends().items()} == {
            0: True,
            1: False,
            2: False,
        }


def test_one_namespace_can_be_saved_alone(tmp_path: Path) -> None:
    with open_store(tmp_path / "source") as store:
        fill(store)
        saved = write_backup(tmp_path / "b", store, [NAMESPACE.digest])
    assert (saved.namespaces, saved.blocks) == (1, 5)
    with BackupFile(tmp_path / "b") as backup:
        assert backup.settings.tenants == {}


def test_damaged_blocks_and_what_follows_them_are_left_out_and_counted(tmp_path: Path) -> None:
    with open_store(tmp_path / "source") as store:
        fill(store)
        damage_record(store, BLOCKS[NAMESPACE.digest][2].info.block_hash)
        saved = write_backup(tmp_path / "b", store)
    assert (saved.blocks, saved.left_out) == (6, 3)
    with open_store(tmp_path / "target") as store:
        assert load(tmp_path / "b", store) == {PutOutcome.STORED: 6}


def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path)
    old = path.read_bytes()
    monkeypatch.setattr(module._Writer, "finish", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with open_store(tmp_path / "source") as store, pytest.raises(StoreError, match="cannot write"):
        write_backup(path, store)
    assert path.read_bytes() == old and set(os.listdir(tmp_path)) == {"source", "b"}


def test_a_link_and_a_directory_are_refused_as_targets(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    with open_store(tmp_path / "source") as store:
        for name in ("link", "folder"):
            with pytest.raises(StoreError):
                write_backup(tmp_path / name, store)


def test_a_backup_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = path.read_bytes()
    for cut in (0, 7, 15, 20, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(CorruptBlockError), BackupFile(path) as backup:
            list(backup.read())
    path.write_bytes(data + b"\0")
    with pytest.raises(CorruptBlockError, match="follows its end"), BackupFile(path) as backup:
        list(backup.read())


def test_a_missing_or_repeated_frame_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = path.read_bytes()
    frames, at = [], module._HEADER.size
    while at < len(data):
        size = module._FRAME.unpack_from(data, at)[2]
        frames.append(data[at : at + module._FRAME.size + size])
        at += len(frames[-1])
    head = data[: module._HEADER.size]
    for wrong in (frames[:5] + frames[6:], frames[:6] + frames[5:], [*frames[:5], frames[6], frames[5], *frames[7:]]):
        path.write_bytes(head + b"".join(wrong))
        with pytest.raises(CorruptBlockError, match="frames are missing"), BackupFile(path) as backup:
            list(backup.read())


def test_a_flipped_bit_in_a_block_costs_that_block_alone(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = bytearray(path.read_bytes())
    data[data.index(BLOCKS[A.digest][3].data.tobytes()) + 500] ^= 4
    path.write_bytes(data)
    with BackupFile(path) as backup:
        assert sum(isinstance(each, StoredBlock) for each in backup.read()) == 8
        assert backup.damaged == 1


@given(at=st.integers(0, 1 << 20), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_no_flipped_bit_changes_what_is_read(tmp_path_factory: pytest.TempPathFactory, at: int, bit: int) -> None:
    data, path = _whole(tmp_path_factory)
    at %= len(data)
    path.write_bytes(data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :])
    right = {record.info.block_hash: record.data.tobytes() for records in BLOCKS.values() for record in records}
    try:
        with BackupFile(path) as backup:
            for each in backup.read():
                if isinstance(each, StoredBlock):
                    assert right[each.record.info.block_hash] == each.record.data.tobytes()
                    assert each.entry.created == 1000.0
    except (CorruptBlockError, FormatVersionError):
        pass


_files: dict[str, tuple[bytes, Path]] = {}


def _whole(factory: pytest.TempPathFactory) -> tuple[bytes, Path]:
    if "whole" not in _files:
        path = make(factory.mktemp("backup"))
        _files["whole"] = path.read_bytes(), path
    return _files["whole"]


def test_a_backup_of_another_version_and_other_files_are_refused(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = bytearray(path.read_bytes())
    data[8] = 2
    path.write_bytes(data)
    with pytest.raises(FormatVersionError):
        BackupFile(path)
    path.write_bytes(b"something else")
    assert not is_backup(path)
    with pytest.raises(CorruptBlockError):
        BackupFile(path)
    os.mkfifo(tmp_path / "fifo")
    for wrong in (tmp_path / "fifo", tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError):
            is_backup(wrong)


def test_a_frame_that_is_longer_than_the_file_takes_no_memory(tmp_path: Path) -> None:
    path = make(tmp_path)
    data = bytearray(path.read_bytes())
    at = module._HEADER.size + 8
    data[at : at + 8] = (1 << 60).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(CorruptBlockError):
        BackupFile(path)
