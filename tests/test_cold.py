"""The cold store: what is put comes back, the tree of blocks stays whole, and damage is a counted miss."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cold_blocks import (
    LAYOUT,
    NAMESPACE,
    OTHER,
    QUOTA,
    FakeClock,
    block_bytes,
    chain_of,
    damage_record,
    open_store,
    read,
    record_of,
)
from pattern_layout import iter_packed

from tierkv.errors import FormatVersionError, StoreError
from tierkv.storage import cold_notes, cold_reader, cold_rows, cold_writer
from tierkv.storage.codec import KEPT_BYTES
from tierkv.storage.cold_rows import padded_bytes
from tierkv.storage.lmdb_env import LmdbEnv
from tierkv.storage.outcomes import MissReason, PutOutcome
from tierkv.storage.record import EncodedRecord, encode_record, parse_record

# -- put and read --------------------------------------------------------------------------------------


def test_a_block_that_was_put_comes_back_after_reopening(tmp_path: Path) -> None:
    record = record_of(7, seed=7)
    with open_store(tmp_path) as store:
        assert store.put([record]) == [PutOutcome.STORED]
    with open_store(tmp_path) as store:
        assert np.array_equal(read(store, record.info), block_bytes(7))
        assert store.stats().hits == 1
        store.check()


def test_a_partial_block_comes_back(tmp_path: Path) -> None:
    record = record_of([1, 2, 3], seed=1)
    with open_store(tmp_path) as store:
        store.put([record])
        out = read(store, record.info)
        for offset, _, length in iter_packed(LAYOUT, 3):
            assert np.array_equal(out[offset : offset + length], block_bytes(1)[offset : offset + length])
        assert store.read_tokens(record.info.block_hash) == record.info.token_bytes


def test_an_unknown_block_is_absent(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        assert read(store, record_of(1).info) is MissReason.ABSENT
        assert store.lookup(bytes(16)) is None
        assert store.read_tokens(bytes(16)) is None
        assert store.read_record(bytes(16)) is None
        assert store.stats().misses[MissReason.ABSENT] == 1


def test_the_entry_has_what_lookups_and_eviction_need(tmp_path: Path) -> None:
    root, child = chain_of(2)
    with open_store(tmp_path) as store:
        store.put([root, child])
        entry = store.lookup(child.info.block_hash)
        assert entry is not None
        assert (entry.parent, entry.namespace) == (root.info.block_hash, NAMESPACE.digest)
        assert (entry.num_tokens, entry.depth, entry.codec) == (16, 1, child.codec)
        assert (entry.raw_bytes, entry.stored_bytes) == (child.raw_bytes, child.stored_bytes)
        assert (entry.created, entry.last_access, entry.access_count) == (1000.0, 1000.0, 0)
        assert (entry.cost_s, entry.pinned) == (0.25, False)


def test_putting_a_block_again_says_that_it_exists(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(1)])
        assert store.put([record_of(1), record_of(2)]) == [PutOutcome.EXISTS, PutOutcome.STORED]
        store.check()


def test_a_block_without_its_parent_is_refused(tmp_path: Path) -> None:
    root, child = chain_of(2)
    with open_store(tmp_path) as store:
        assert store.put([child]) == [PutOutcome.NO_PARENT]
        assert store.put([root, child]) == [PutOutcome.STORED] * 2


def test_a_parent_in_another_namespace_does_not_count(tmp_path: Path) -> None:
    root = record_of(1, namespace=OTHER)
    stray = record_of(2, root.info)
    with open_store(tmp_path) as store:
        assert store.put([root, stray]) == [PutOutcome.STORED, PutOutcome.NO_PARENT]


def test_a_forged_hash_is_a_collision_for_the_writer_and_a_miss_for_the_reader(tmp_path: Path) -> None:
    honest = record_of(1)
    forged_info = replace(record_of(2).info, block_hash=honest.info.block_hash)
    forged = encode_record(forged_info, block_bytes(2), layout=LAYOUT)
    with open_store(tmp_path) as store:
        store.put([honest])
        assert store.put([forged]) == [PutOutcome.COLLISION]
        assert read(store, forged_info) is MissReason.COLLISION
        assert np.array_equal(read(store, honest.info), block_bytes(0))


def forged_pair() -> tuple[EncodedRecord, EncodedRecord]:
    """Return two blocks with one hash, as nobody should be able to make them."""
    honest, forged = record_of(1), record_of(2)
    info = replace(forged.info, block_hash=honest.info.block_hash)
    return honest, encode_record(info, block_bytes(2), layout=LAYOUT)


def test_a_block_is_not_stored_behind_another_one_with_its_parents_hash(tmp_path: Path) -> None:
    honest, forged = forged_pair()
    child = record_of(3, forged.info)
    with open_store(tmp_path) as store:
        assert store.put([honest, child]) == [PutOutcome.STORED, PutOutcome.NO_PARENT]
        assert store.put([record_of(3, honest.info)]) == [PutOutcome.STORED]
        assert read(store, child.info) is MissReason.COLLISION
        assert store.verify().is_sound
        store.check()


def test_a_first_block_with_another_content_digest_is_refused(tmp_path: Path) -> None:
    record = encode_record(replace(record_of(1).info, content_digest=bytes(16)), block_bytes(), layout=LAYOUT)
    with open_store(tmp_path) as store:
        assert store.put([record]) == [PutOutcome.NO_PARENT]


def test_verify_finds_a_block_behind_another_parent_and_a_repair_removes_it(tmp_path: Path) -> None:
    honest, forged = forged_pair()
    child, rest = record_of(3, forged.info), record_of(4, record_of(3, forged.info).info)
    with open_store(tmp_path) as store:
        store.put([forged, child, rest])
        # behind the store's back the forged block gives way to the honest one, as no version of it would
        value = record_of(1).data.tobytes()
        with store._writer.batch() as batch:
            old = batch.txn.get(honest.info.block_hash, db=batch.databases.blocks)
            batch.txn.put(honest.info.block_hash, value.ljust(len(old), b"\0"), db=batch.databases.blocks)
        assert child.info.block_hash in store.verify().damaged
        store.verify(repair=True)
        assert not store.contains(child.info.block_hash)
        assert not store.contains(rest.info.block_hash)
        assert store.verify().is_sound


def test_the_same_hash_in_another_namespace_is_a_miss_of_its_own(tmp_path: Path) -> None:
    record = record_of(1)
    with open_store(tmp_path) as store:
        store.put([record])
        assert read(store, replace(record.info, namespace=OTHER.digest)) is MissReason.NAMESPACE


def test_children_are_listed_by_parent_and_roots_by_namespace(tmp_path: Path) -> None:
    root, child = chain_of(2)
    sibling = record_of(50, root.info)
    with open_store(tmp_path) as store:
        store.put([root, child, sibling])
        assert store.children(NAMESPACE.digest) == [root.info.block_hash]
        assert set(store.children(root.info.block_hash)) == {child.info.block_hash, sibling.info.block_hash}
        assert store.children(child.info.block_hash) == []


def test_a_record_can_be_copied_to_another_store(tmp_path: Path) -> None:
    record = record_of(1, seed=9)
    with open_store(tmp_path / "a") as source, open_store(tmp_path / "b") as target:
        source.put([record])
        copy = source.read_record(record.info.block_hash)
        assert copy == record.data.tobytes()
        assert target.put([parse_record(copy, cost_s=2.0)]) == [PutOutcome.STORED]
        assert np.array_equal(read(target, record.info), block_bytes(9))
        with pytest.raises(StoreError):
            parse_record(copy[:-1])


def test_lookups_of_many_blocks_keep_their_order(tmp_path: Path) -> None:
    records = chain_of(3)
    with open_store(tmp_path) as store:
        store.put(records)
        found = store.lookup_many([records[2].info.block_hash, bytes(16), records[0].info.block_hash])
        assert [entry and entry.depth for entry in found] == [2, None, 0]
        assert {h for h, _ in store.iter_entries()} == {r.info.block_hash for r in records}
        assert list(store.iter_entries(OTHER.digest)) == []


def test_a_run_of_lookups_ends_at_the_first_block_that_is_absent_and_asks_for_no_hash_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, asked = chain_of(3), list[bytes]()
    hashes = [record.info.block_hash for record in records]

    def hashes_until_absent() -> Iterator[bytes]:
        for each in (hashes[0], hashes[1], bytes(16), hashes[2]):
            asked.append(each)
            yield each

    with open_store(tmp_path) as store:
        store.put(records)
        snapshots = 0
        begin = LmdbEnv._begin

        def count(env: LmdbEnv, *, write: bool) -> object:
            nonlocal snapshots
            snapshots += 1
            return begin(env, write=write)

        monkeypatch.setattr(LmdbEnv, "_begin", count)
        found = store.lookup_run(hashes_until_absent())
        assert snapshots == 1
        entries = store.lookup_many(hashes[:2])
        assert [each and (each.parent, each.num_tokens) for each in found] == [
            *[entry and (entry.parent, entry.num_tokens) for entry in entries],
            None,
        ]
        assert asked == [*hashes[:2], bytes(16)]
        store.note_damaged(hashes[1])
        assert [each is None for each in store.lookup_run(iter(hashes))] == [False, True]


def test_more_entries_than_one_snapshot_holds_are_all_listed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cold_reader, "_ENTRIES_PER_SNAPSHOT", 3)
    with open_store(tmp_path) as store:
        store.put([record_of(n) for n in range(10)])
        assert len({h for h, _ in store.iter_entries()}) == 10


# -- accesses, pins, namespaces ------------------------------------------------------------------------


def test_accesses_and_pins_survive_a_restart(tmp_path: Path) -> None:
    record, clock = record_of(1), FakeClock()
    with open_store(tmp_path, clock) as store:
        store.put([record])
        clock.now += 5
        store.notes.touch([record.info.block_hash, record.info.block_hash])
        store.set_pinned([record.info.block_hash], True)
    with open_store(tmp_path) as store:
        entry = store.lookup(record.info.block_hash)
        assert entry is not None
        assert (entry.access_count, entry.last_access, entry.pinned) == (2, 1005.0, True)


def test_many_accesses_are_due_and_unwritten_ones_are_bounded(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cold_notes, "MAX_PENDING_TOUCHES", 2)
    monkeypatch.setattr(cold_notes, "MAX_KEPT_TOUCHES", 2)
    records = [record_of(number) for number in range(3)]
    with open_store(tmp_path) as store:
        store.put(records)
        for number, record in enumerate(records):
            assert store.notes.are_due == (number >= 2)
            store.notes.touch([record.info.block_hash])
        store.maintain()
        found = store.lookup_many([record.info.block_hash for record in records])
        assert [entry and entry.access_count for entry in found] == [0, 1, 1]
        assert not store.notes.are_due


def test_namespaces_are_described_and_counted(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.open_namespace(NAMESPACE)
        store.put([record_of(1), record_of(2), record_of(1, namespace=OTHER)])
        found = {each.digest: each for each in store.namespaces()}
        assert found[NAMESPACE.digest].description["name"] == "model"
        assert found[NAMESPACE.digest].blocks == 2
        assert found[OTHER.digest].description == {}
        assert found[OTHER.digest].raw_bytes == LAYOUT.block_bytes
        assert store.stats().blocks == 3


def test_a_namespace_can_be_registered_by_its_digest_and_description(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.register_namespace(NAMESPACE.digest, NAMESPACE.describe())
        assert store.namespaces()[0].description["weights"] == "w"


# -- eviction ------------------------------------------------------------------------------------------


def capacity(records: int) -> int:
    return records * padded_bytes(record_of(0).stored_bytes)


def test_the_quota_is_kept_by_evicting_the_least_recently_used(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_store(tmp_path, clock, quota_bytes=capacity(4)) as store:
        for number in range(10):
            clock.now += 1
            if number == 4:
                store.notes.touch([record_of(0).info.block_hash])
            assert store.put([record_of(number)]) == [PutOutcome.STORED]
            assert store.stats().live_bytes <= capacity(4)
        kept = {h for h, _ in store.iter_entries()}
        assert kept == {record_of(n).info.block_hash for n in (6, 7, 8, 9)}
        assert read(store, record_of(5).info) is MissReason.EVICTED
        assert store.stats().evicted_blocks == 6
        store.check()


def test_a_block_touched_after_the_candidates_were_ordered_stays_and_the_next_is_evicted(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_store(tmp_path, clock) as store:
        blocks = [record_of(number) for number in range(6)]
        for record in blocks:
            clock.now += 1
            store.put([record])
        size = store.stats().live_bytes // 6
        assert store.evict(to_bytes=5 * size).blocks == 1  # all leaves are ordered now; block 0 went
        clock.now += 1
        store.notes.touch([blocks[1].info.block_hash])
        assert store.evict(to_bytes=4 * size).blocks == 1
        assert [store.contains(record.info.block_hash) for record in blocks] == [False, True, False, True, True, True]
        assert store.evict(to_bytes=size).blocks == 3
        assert store.contains(blocks[1].info.block_hash), "the one that was used last is the last to go"


def test_children_go_before_parents(tmp_path: Path) -> None:
    chain = chain_of(6)
    with open_store(tmp_path) as store:
        store.put(chain)
        report = store.evict(to_bytes=capacity(2))
        assert (report.blocks, report.freed_bytes) == (4, capacity(4))
        assert {h for h, _ in store.iter_entries()} == {r.info.block_hash for r in chain[:2]}
        store.check()


def test_a_pinned_block_keeps_itself_and_its_parents(tmp_path: Path) -> None:
    chain = chain_of(4)
    with open_store(tmp_path) as store:
        store.put(chain)
        store.set_pinned([chain[1].info.block_hash], True)
        store.evict(to_bytes=0)
        assert {h for h, _ in store.iter_entries()} == {r.info.block_hash for r in chain[:2]}
        store.set_pinned([chain[1].info.block_hash], False)
        assert store.evict(to_bytes=0).blocks == 2


def test_a_store_full_of_pinned_blocks_refuses_more(tmp_path: Path) -> None:
    with open_store(tmp_path, quota_bytes=capacity(2)) as store:
        store.put([record_of(1), record_of(2)])
        store.set_pinned([record_of(n).info.block_hash for n in (1, 2)], True)
        assert store.put([record_of(3), record_of(1)]) == [PutOutcome.FULL, PutOutcome.EXISTS]
        store.check()


def test_room_for_a_child_is_not_made_by_evicting_its_parent(tmp_path: Path) -> None:
    root, child = chain_of(2)
    with open_store(tmp_path, quota_bytes=capacity(1)) as store:
        store.put([root])
        assert store.put([child]) == [PutOutcome.FULL]
        assert store.contains(root.info.block_hash)


def test_a_namespace_or_what_is_old_can_be_evicted(tmp_path: Path) -> None:
    clock = FakeClock()
    with open_store(tmp_path, clock) as store:
        store.put([*chain_of(3), *chain_of(2, namespace=OTHER)])
        assert store.evict(namespace=OTHER.digest).blocks == 2
        clock.now += 100
        store.put([record_of(90)])
        assert store.evict(older_than_s=50).blocks == 3
        assert {h for h, _ in store.iter_entries()} == {record_of(90).info.block_hash}
        store.check()


def test_the_eviction_score_can_be_given(tmp_path: Path) -> None:
    def newest_first(entries, now):
        return -entries["created"]

    clock = FakeClock()
    with open_store(tmp_path, clock, eviction_score=newest_first) as store:
        for number in range(4):
            clock.now += 1
            store.put([record_of(number)])
        store.evict(to_bytes=capacity(1))
        assert store.contains(record_of(0).info.block_hash)


def test_a_disk_with_too_little_room_stops_growth_but_not_writing(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(n) for n in range(4)])
    with open_store(tmp_path, min_free_bytes=1 << 60) as store:
        assert store.put([record_of(9)]) == [PutOutcome.STORED]
        assert store.stats().blocks == 4


def test_a_map_that_is_full_in_spite_of_evicting_pauses_writing(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setattr(cold_rows, "_SPARE_MAP_BYTES", -QUOTA // 4 - QUOTA + (2 << 20))  # a map of 2 MiB
    clock = FakeClock()
    with open_store(tmp_path, clock) as store:
        outcomes = [store.put([record_of(n)])[0] for n in range(200)]
        assert outcomes[0] is PutOutcome.STORED
        store.set_pinned([h for h, _ in store.iter_entries()], True)
        while (outcome := store.put([record_of(1000 + len(outcomes))])[0]) is PutOutcome.STORED:
            outcomes.append(outcome)
        assert outcome is PutOutcome.FULL
        said = len(caplog.records)
        assert store.put([record_of(5000)]) == [PutOutcome.FULL]
        assert len(caplog.records) == said
        store.check()


# -- damage --------------------------------------------------------------------------------------------


def test_a_damaged_block_is_a_miss_and_leaves_with_all_that_follow_it(tmp_path: Path) -> None:
    chain = chain_of(4)
    with open_store(tmp_path) as store:
        store.put(chain)
        damage_record(store, chain[1].info.block_hash)
        assert read(store, chain[1].info) is MissReason.CORRUPT
        assert store.notes.are_due and not store.contains(chain[1].info.block_hash)
        store.maintain()
        assert {h for h, _ in store.iter_entries()} == {chain[0].info.block_hash}
        assert store.stats().damaged_blocks == 3
        assert store.put(chain[1:]) == [PutOutcome.STORED] * 3
        store.check()


def test_a_record_cut_short_is_a_miss(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(1)])
        damage_record(store, record_of(1).info.block_hash, cut=1000)
        assert read(store, record_of(1).info) is MissReason.TRUNCATED
        assert not store.contains(record_of(1).info.block_hash)


def test_a_damaged_block_is_replaced_by_a_put(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(1)])
        damage_record(store, record_of(1).info.block_hash, offset=0)
        assert store.put([record_of(1)]) == [PutOutcome.STORED]
        assert np.array_equal(read(store, record_of(1).info), block_bytes())
        store.check()


def test_verify_finds_damage_and_repairs_it(tmp_path: Path) -> None:
    chain = chain_of(4)
    with open_store(tmp_path) as store:
        store.put(chain)
        damage_record(store, chain[2].info.block_hash)
        seen: list[tuple[int, int]] = []
        report = store.verify(progress=lambda done, total: seen.append((done, total)))
        assert list(report.damaged) == [chain[2].info.block_hash]
        assert seen[-1] == (4, 4)
        assert store.contains(chain[2].info.block_hash)
        assert store.verify(repair=True).removed == 2
        assert store.verify().damaged == {}
        store.check()


def test_deleting_a_block_deletes_what_follows(tmp_path: Path) -> None:
    chain = chain_of(3)
    with open_store(tmp_path) as store:
        store.put(chain)
        assert store.delete(chain[1].info.block_hash) == 2
        assert store.delete(chain[1].info.block_hash) == 0
        store.check()


# -- opening -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100, 5000, 30_000])
def test_a_data_file_cut_short_is_set_aside_and_a_fresh_one_begun(tmp_path: Path, caplog, size: int) -> None:
    with open_store(tmp_path) as store:
        store.put([record_of(n) for n in range(20)])
    os.truncate(tmp_path / "cold" / "data.mdb", size)
    with open_store(tmp_path) as store:
        assert store.damaged is not None and store.damaged.exists()
        assert "set aside" in caplog.text
        assert store.put([record_of(1)]) == [PutOutcome.STORED]
        store.check()


def test_a_newer_store_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with open_store(tmp_path) as store, store._writer.batch() as batch:
        batch.txn.put(b"format", b"99", db=batch.databases.meta)
    with pytest.raises(FormatVersionError, match="cold_path"):
        open_store(tmp_path)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cold").write_text("x")
    with pytest.raises(StoreError, match="cold_path"):
        open_store(tmp_path)


def test_opening_a_store_twice_in_a_process_says_to_pass_it_along(tmp_path: Path) -> None:
    with open_store(tmp_path), pytest.raises(StoreError, match="pass the open one along"):
        open_store(tmp_path)


def test_a_read_only_store_reads_and_does_not_write(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no cold store"):
        open_store(tmp_path, read_only=True)
    with open_store(tmp_path) as store:
        store.put([record_of(1)])
    with open_store(tmp_path, read_only=True) as store:
        assert np.array_equal(read(store, record_of(1).info), block_bytes())
        store.notes.touch([record_of(1).info.block_hash])
        store.open_namespace(NAMESPACE)
        for write in (lambda: store.put([]), lambda: store.delete(bytes(16)), store.compact):
            with pytest.raises(StoreError, match="read-only"):
                write()


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.close()
    store.close()
    for use in (
        lambda: store.lookup(bytes(16)),
        lambda: store.put([]),
        lambda: read(store, record_of(1).info),
    ):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_a_store_must_not_be_used_in_a_forked_child(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        child = os.fork()
        if child == 0:
            try:
                store.lookup(bytes(16))
            except StoreError as exc:
                os._exit(0 if "after the fork" in str(exc) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0


# -- upkeep --------------------------------------------------------------------------------------------


def test_compaction_gives_space_back_and_keeps_every_block(tmp_path: Path) -> None:
    records = [record_of(n, seed=n) for n in range(60)]
    with open_store(tmp_path) as store:
        store.put(records)
        for record in records[5:]:
            store.delete(record.info.block_hash)
        before = store.stats().file_bytes
        store.compact()
        assert store.stats().file_bytes < before / 3
        for number in range(5):
            assert np.array_equal(read(store, records[number].info), block_bytes(number))
        assert store.put(records[5:6]) == [PutOutcome.STORED]
        store.check()


def test_readers_run_beside_writers_and_compaction(tmp_path: Path) -> None:
    records = [record_of(n, seed=n) for n in range(8)]
    stop, wrong = threading.Event(), []

    def keep_reading() -> None:
        while not stop.is_set():
            for number, record in enumerate(records):
                out = read(store, record.info)
                if not np.array_equal(out, block_bytes(number)):
                    wrong.append(out)

    with open_store(tmp_path) as store:
        store.put(records)
        threads = [threading.Thread(target=keep_reading) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(100, 130):
            store.put([record_of(number)])
            store.delete(record_of(number).info.block_hash)
        store.compact()
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        store.check()


def test_size_classes_cost_little_and_are_few() -> None:
    for size in (20_000, 700_000, 2_700_000, 22_000_000):
        sizes = {padded_bytes(int(size * (1 + change / 1000))) for change in range(-10, 11)}
        assert len(sizes) <= 2
        assert all(padded <= 1.06 * size for padded in sizes)


# -- churn ---------------------------------------------------------------------------------------------


def test_random_eviction_over_four_quotas_fails_no_put_and_keeps_the_file_small(tmp_path: Path) -> None:
    random = np.random.default_rng(0)

    def any_order(entries, now):
        return random.random(len(entries))

    quota = capacity(400)
    with open_store(tmp_path, quota_bytes=quota, eviction_score=any_order) as store:
        for number in range(0, 5 * 400, 4):
            outcomes = store.put([record_of(number + i) for i in range(4)])
            assert outcomes == [PutOutcome.STORED] * 4
        sizes = store.stats()
        assert sizes.live_bytes <= quota
        assert sizes.file_bytes <= 1.1 * sizes.live_bytes + (256 << 10)  # trees, which weigh much beside such blocks
        store.check()


def test_a_healthy_store_is_never_taken_for_a_damaged_one(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    number = 0
    for _ in range(12):
        with open_store(tmp_path, quota_bytes=int(random.choice([capacity(60), capacity(400)]))) as store:
            assert store.damaged is None
            for _ in range(int(random.integers(1, 8))):
                store.put([record_of(number + i) for i in range(30)])
                store.put(chain_of(12, first=number))
                store.evict(to_bytes=int(random.integers(0, capacity(100))))
                number += 40
            if random.random() < 0.3:
                store.compact()
            store.check()


def test_what_a_request_needs_next_can_be_fetched_ahead(tmp_path: Path) -> None:
    with open_store(tmp_path) as store:
        store.put(chain_of(3))
        store.read_ahead([record_of(0).info.block_hash, bytes(16)])
        assert np.array_equal(read(store, chain_of(3)[0].info), block_bytes(0))


def test_the_dirty_pages_of_a_put_fit_into_memory_that_is_kept() -> None:
    """Batches of 64 MiB took twice the CPU time: the C library returned their memory, which faulted in anew."""
    assert cold_writer.MAX_BATCH_BYTES <= KEPT_BYTES
