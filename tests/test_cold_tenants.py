"""Tenants of the cold store: the settings survive, a limit holds, a share is kept; and pins that end."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
from cold_blocks import NAMESPACE, FakeClock, chain_of, open_store, record_of

from tierkv.errors import CapacityError, ConfigError, CorruptBlockError
from tierkv.storage.cold import ColdStore
from tierkv.storage.cold_pins import PIN_PREFIX, UNPIN_PREFIX
from tierkv.storage.cold_rows import NO_DESCRIPTION, add_checksum, padded_bytes
from tierkv.storage.cold_salvage import ColdSalvager
from tierkv.storage.cold_tenants import TenantSettings, pack_tenant, unpack_tenant
from tierkv.storage.outcomes import PutOutcome
from tierkv.storage.record import EncodedRecord
from tierkv.values.namespace import Namespace

SIZE = padded_bytes(record_of(0).stored_bytes)
A, B, C = (replace(NAMESPACE, salt=salt) for salt in ("a", "b", "c"))
A2 = replace(A, weights="another model")


def id_of(namespace: Namespace) -> str:
    return hashlib.sha256(namespace.salt.encode()).hexdigest() if namespace.salt else ""


def open_with(path: Path, clock: FakeClock, *namespaces: Namespace, blocks: int = 20) -> ColdStore:
    store = open_store(path, clock, quota_bytes=blocks * SIZE)
    for each in namespaces:
        store.open_namespace(each)
    return store


def put(store: ColdStore, clock: FakeClock, namespace: Namespace, count: int, first: int = 0) -> list[PutOutcome]:
    """Put blocks that follow no other, each a second later than the one before."""
    outcomes = []
    for number in range(first, first + count):
        clock.now += 1
        outcomes += store.put([record_of(number, namespace=namespace, seed=number)])
    return outcomes


def blocks_of(store: ColdStore, namespace: Namespace) -> int:
    return len(list(store.iter_entries(namespace.digest)))


def limit(store: ColdStore, namespace: Namespace, **changes: int | None) -> None:
    store.set_tenants({id_of(namespace): TenantSettings(name=namespace.salt or "default", **changes)})


def test_settings_of_tenants_survive_a_restart_and_readers_see_them(tmp_path: Path) -> None:
    clock = FakeClock()
    settings = TenantSettings(name="research", cold_share=SIZE, cold_limit=9 * SIZE, warm_share=1, warm_limit=2)
    with open_with(tmp_path, clock, A) as store:
        store.set_tenants({id_of(A): settings})
    with open_store(tmp_path, read_only=True) as reader:
        assert reader.tenants() == {id_of(A): settings}
    with open_store(tmp_path) as store:
        assert store.tenants() == {id_of(A): settings}
        store.set_tenants({id_of(A): None})
        assert store.tenants() == {}


def test_a_tenant_at_its_limit_replaces_its_own_blocks_only(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A, A2, B) as store:
        put(store, clock, B, 8)
        limit(store, A, cold_limit=5 * SIZE)
        outcomes = put(store, clock, A, 3) + put(store, clock, A2, 9, first=50)  # both are the tenant's
        assert outcomes == [PutOutcome.STORED] * 12
        assert blocks_of(store, A) + blocks_of(store, A2) == 5
        assert blocks_of(store, B) == 8, "another tenant's blocks stay, though they are older"
        assert store.contains(record_of(58, namespace=A2).info.block_hash), "the newest is there"
        store.check()


def test_a_limit_holds_for_a_chain_and_refuses_what_does_not_fit(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A) as store:
        limit(store, A, cold_limit=3 * SIZE)
        outcomes = store.put(chain_of(5, namespace=A))
        assert outcomes == [PutOutcome.STORED] * 3 + [PutOutcome.TENANT_LIMIT] * 2
        assert store.put(chain_of(3, namespace=A)) == [PutOutcome.EXISTS] * 3
        limit_of_none = TenantSettings(name="a", cold_limit=0)
        with pytest.raises(CapacityError, match="more than its new limit"):
            store.set_tenants({id_of(A): limit_of_none})
        assert store.set_tenants({id_of(A): limit_of_none}, evict=True).blocks == 3
        assert store.put(chain_of(1, namespace=A)) == [PutOutcome.TENANT_LIMIT]
        store.check()


def test_eviction_takes_from_tenants_above_their_share_first(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A, B, C) as store:
        limit(store, A, cold_share=6 * SIZE)
        put(store, clock, A, 6)  # the oldest of all
        put(store, clock, B, 14)
        put(store, clock, B, 10, first=100)
        assert (blocks_of(store, A), blocks_of(store, B)) == (6, 14)
        put(store, clock, A, 1, first=100)  # above its share now: the oldest of both goes, which is its own
        assert (blocks_of(store, A), blocks_of(store, B)) == (6, 14)
        store.evict(to_bytes=10 * SIZE)
        assert (blocks_of(store, A), blocks_of(store, B)) == (6, 4)
        store.evict(to_bytes=3 * SIZE)  # shares do not count where nothing else is left
        assert (blocks_of(store, A), blocks_of(store, B)) == (3, 0)
        store.check()


def test_a_tenant_does_not_grow_beyond_its_share_at_the_cost_of_anothers(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A, B) as store:
        store.set_tenants({id_of(each): TenantSettings(name=each.salt, cold_share=10 * SIZE) for each in (A, B)})
        put(store, clock, A, 10)
        put(store, clock, B, 30)
        assert (blocks_of(store, A), blocks_of(store, B)) == (10, 10)
        store.evict(namespace=A.digest)
        put(store, clock, B, 10, first=100)
        assert blocks_of(store, B) == 20, "a share that is not used is not kept free"
        put(store, clock, A, 10)
        assert (blocks_of(store, A), blocks_of(store, B)) == (10, 10)
        store.check()


def test_a_tenant_without_a_share_takes_nothing_from_the_shares_of_others(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A, B, C) as store:
        store.set_tenants({id_of(each): TenantSettings(name=each.salt, cold_share=10 * SIZE) for each in (A, B)})
        put(store, clock, A, 10)
        put(store, clock, B, 10)
        assert put(store, clock, C, 2) == [PutOutcome.FULL] * 2
        assert (blocks_of(store, A), blocks_of(store, B)) == (10, 10)
        store.check()


def test_a_tenant_within_its_share_gets_room_where_pins_and_a_smaller_quota_leave_too_little(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A, B, C) as store:
        store.set_tenants({id_of(each): TenantSettings(name=each.salt, cold_share=10 * SIZE) for each in (A, B)})
        put(store, clock, A, 10)
        put(store, clock, C, 10)
        store.set_pinned([each for each, _ in store.iter_entries(C.digest)], True)
        assert put(store, clock, B, 3) == [PutOutcome.STORED] * 3
        assert (blocks_of(store, A), blocks_of(store, B), blocks_of(store, C)) == (7, 3, 10)
        mixed = [record_of(77, namespace=C, seed=77), record_of(77, namespace=B, seed=77)]
        assert put_together(store, mixed) == [PutOutcome.FULL, PutOutcome.STORED]
        assert (blocks_of(store, A), blocks_of(store, B), blocks_of(store, C)) == (6, 4, 10)
        store.check()


def test_a_share_may_be_lowered_also_where_all_shares_exceed_a_quota_that_was_lowered(tmp_path: Path) -> None:
    with open_with(tmp_path, FakeClock(), A, B) as store:
        store.set_tenants({id_of(each): TenantSettings(name=each.salt, cold_share=10 * SIZE) for each in (A, B)})
        store.set_quota(5 * SIZE)
        store.set_tenants({id_of(A): TenantSettings(name=A.salt, cold_share=8 * SIZE)})
        store.set_tenants({id_of(A): TenantSettings(name="other", cold_share=8 * SIZE)})
        with pytest.raises(CapacityError):
            store.set_tenants({id_of(A): TenantSettings(name=A.salt, cold_share=9 * SIZE)})
        store.set_tenants({id_of(A): None})
        assert store.tenants() == {id_of(B): TenantSettings(name=B.salt, cold_share=10 * SIZE)}


def put_together(store: ColdStore, records: list[EncodedRecord]) -> list[PutOutcome]:
    """Put records in one transaction, however small the quota is."""
    with store._writer._exclusive():
        return store._writer._put_group(records)


def test_a_limit_holds_while_the_description_of_its_namespace_is_lost(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A) as store:
        limit(store, A, cold_limit=2 * SIZE)
        with store._writer.batch() as batch:
            batch.rows[A.digest].description = NO_DESCRIPTION
        put(store, clock, A, 6)
        assert blocks_of(store, A) == 2


def test_a_store_of_before_tenants_finds_the_tenant_in_the_description(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A) as store:
        with store._writer.batch() as batch:
            batch.rows[A.digest].tenant = None
        limit(store, A, cold_limit=2 * SIZE)
        put(store, clock, A, 6)
        assert blocks_of(store, A) == 2


def test_settings_that_do_not_agree_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    good = TenantSettings(name="a", cold_share=4 * SIZE)
    with open_with(tmp_path, FakeClock()) as store:
        store.set_tenants({id_of(A): good})
        for wrong in (
            {id_of(B): TenantSettings(name="a")},
            {id_of(B): TenantSettings(name="default")},
            {"": TenantSettings(name="b")},
            {"xyz": TenantSettings(name="b")},
            {id_of(B): TenantSettings(name=" b")},
            {id_of(B): TenantSettings(name="b\x1b")},
            {id_of(B): TenantSettings(name="b", cold_share=2, cold_limit=1)},
            {id_of(B): TenantSettings(name="b", warm_share=2, warm_limit=1)},
            {id_of(B): TenantSettings(name="b", warm_limit=-1)},
        ):
            with pytest.raises(ConfigError):
                store.set_tenants(wrong)
        with pytest.raises(CapacityError, match="shares of all tenants"):
            store.set_tenants({id_of(B): TenantSettings(name="b", cold_share=17 * SIZE)})
        assert store.tenants() == {id_of(A): good}


def test_damaged_settings_are_left_out(tmp_path: Path) -> None:
    packed = bytearray(pack_tenant(TenantSettings(name="a")))
    assert unpack_tenant(id_of(A), packed).name == "a"
    packed[2] ^= 1
    with pytest.raises(CorruptBlockError):
        unpack_tenant(id_of(A), packed)
    for wrong in (b"", b"\xc1", b"\x95\xa1a\x03\x02\x00\xc0", b"\x90"):
        with pytest.raises(CorruptBlockError):
            unpack_tenant(id_of(A), add_checksum(wrong))


def test_a_pin_with_a_time_to_live_ends(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A) as store:
        put(store, clock, A, 3)
        first, second, third = (record_of(number, namespace=A).info.block_hash for number in range(3))
        store.set_pinned([first, second], True, ttl_s=100)
        store.set_pinned([third], True)
        store.set_pinned([second], True, ttl_s=500)  # the later pin counts
        assert store.evict(to_bytes=0).blocks == 0
        clock.now += 101
        assert store.evict(to_bytes=0).hashes == (first,)
        clock.now += 400
        assert store.evict(to_bytes=0).hashes == (second,)
        clock.now += 1e9
        assert store.evict(to_bytes=0).blocks == 0, "a pin for good does not end"
        store.check()


def test_a_pin_for_good_and_an_unpin_replace_one_that_ends_and_survive_a_restart(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A) as store:
        put(store, clock, A, 3)
        first, second, third = (record_of(number, namespace=A).info.block_hash for number in range(3))
        store.set_pinned([first, second, third], True, ttl_s=100)
        store.set_pinned([first], True)
        store.set_pinned([second], False)
    clock.now += 50
    with open_store(tmp_path, clock) as store:
        assert store.evict(to_bytes=0).hashes == (second,)
        clock.now += 51
        assert store.evict(to_bytes=0).hashes == (third,)
        entry = store.lookup(first)
        assert entry and entry.pinned
        store.check()


def test_a_row_of_time_alone_ends_no_pin_and_a_new_pin_leaves_no_row_of_the_old_one(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_with(tmp_path, clock, A) as store:
        put(store, clock, A, 2)
        first, second = (record_of(number, namespace=A).info.block_hash for number in range(2))
        for ttl_s in (10, 20, 30):
            store.set_pinned([first], True, ttl_s=ttl_s)
        store.set_pinned([second], True)
        with store._writer.batch() as batch:
            batch.txn.put(UNPIN_PREFIX + bytes(8) + second, b"", db=batch.databases.meta)
            with batch.txn.cursor(db=batch.databases.meta) as cursor:
                keys = [bytes(key) for key, _ in cursor]
        assert sum(key.startswith((PIN_PREFIX, UNPIN_PREFIX)) for key in keys) == 3
        assert store.evict(to_bytes=0).blocks == 0
        assert dict(store.pin_ends()) == {first: pytest.approx(clock.now + 30)}


def test_settings_are_saved_from_a_damaged_file(tmp_path: Path) -> None:
    clock = FakeClock()
    settings = TenantSettings(name="a", cold_share=SIZE, cold_limit=2 * SIZE)
    with open_with(tmp_path, clock, A) as store:
        store.set_tenants({id_of(A): settings})
        put(store, clock, A, 2)
    target = tmp_path / "rebuilt" / "cold"
    target.mkdir(parents=True)
    ColdSalvager(quota_bytes=20 * SIZE, clock=clock).rebuild(tmp_path / "cold" / "data.mdb", target)
    with open_store(tmp_path / "rebuilt", clock, quota_bytes=20 * SIZE) as store:
        assert store.tenants() == {id_of(A): settings} and blocks_of(store, A) == 2
        put(store, clock, A, 5, first=10)
        assert blocks_of(store, A) == 2
        store.check()


def test_settings_are_saved_from_a_damaged_file_whose_quota_was_lowered_below_the_shares(tmp_path: Path) -> None:
    clock, settings = FakeClock(), TenantSettings(name="a", cold_share=10 * SIZE)
    with open_with(tmp_path, clock, A) as store:
        store.set_tenants({id_of(A): settings})
        put(store, clock, A, 2)
        for _ in range(8):  # until no page has the old quota
            store.set_quota(5 * SIZE)
    target = tmp_path / "rebuilt" / "cold"
    target.mkdir(parents=True)
    ColdSalvager(quota_bytes=5 * SIZE, clock=clock).rebuild(tmp_path / "cold" / "data.mdb", target)
    with open_store(tmp_path / "rebuilt", clock, quota_bytes=5 * SIZE) as store:
        assert store.tenants() == {id_of(A): settings} and blocks_of(store, A) == 2
