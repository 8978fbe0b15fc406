"""The block store: what is saved comes back, byte for byte, and what cannot be had is a miss."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from stored_blocks import NAMESPACE, SIZE, TOKENS, config_of, eventually, load, payload, save

from tierkv import (
    BlockKey,
    BlockStore,
    BlockStoreConfig,
    Buffers,
    CapacityError,
    ClosedError,
    ColdStore,
    ConfigError,
    ShapeError,
    Tier,
)
from tierkv.block_store import loading
from tierkv.block_store.load_or_compute import Origin
from tierkv.readers import record_encoder
from tierkv.storage.outcomes import MissReason
from tierkv.storage.record import BlockInfo


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with BlockStore(config_of(tmp_path / "store"), namespace=NAMESPACE) as store:
        yield store


def test_keys_are_extended_and_equal_those_of_all_tokens_at_once(store: BlockStore) -> None:
    keys = store.keys()
    for start in range(0, len(TOKENS), 7):
        keys.extend(TOKENS[start : start + 7])
    assert keys[:] == store.keys(TOKENS)[:] and keys.num_tokens == len(TOKENS)
    assert len(store.keys(TOKENS[:3])) == 0 and len(store.keys(TOKENS[:7])) == 1
    assert store.keys([*TOKENS[:4], 1, 2, 3, 4])[1] != keys[1]


def test_one_new_block_behind_many_known_ones_reads_none_of_them(
    store: BlockStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = store.keys(TOKENS)
    save(store, keys[:30])
    store.flush()
    store.close()
    with BlockStore(config_of(tmp_path / "store"), namespace=NAMESPACE) as again:
        reads: list[bytes] = []
        monkeypatch.setattr(ColdStore, "read_many_into", counted(ColdStore.read_many_into, reads))
        assert save(again, keys[:31], start=30) == 1
        again.flush()
        assert reads == [] and again.contains(keys) == 31
        assert load(again, keys[:31], start=29) == (2, [])
        assert reads == [keys[29].block_hash], "the engine has those before it"


def counted(method: Callable[..., object], reads: list[bytes]) -> Callable[..., object]:
    def read_many_into(self: ColdStore, expected: Sequence[BlockInfo], *args: object, **kwargs: object) -> object:
        reads.extend(info.block_hash for info in expected)
        return method(self, expected, *args, **kwargs)

    return read_many_into


def test_a_reservation_finds_warm_blocks_behind_those_that_it_can_hold() -> None:
    with BlockStore(config_of(None, blocks=16), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)[:12]
        save(store, keys)
        assert store.reserve(keys).num_blocks == store.contains(keys) == 12
        assert load(store, keys) == (12, [])


def test_memory_alone_keeps_the_most_recently_used_chain_from_its_beginning() -> None:
    with BlockStore(config_of(None, blocks=12), namespace=NAMESPACE) as store:
        first, second = store.keys(TOKENS)[:8], store.keys(TOKENS[1:])[:8]
        assert save(store, first) == 8
        store.touch(first)
        assert save(store, second) == 8, "there is room for eleven: one slot is spare"
        assert store.contains(second) == 8 and store.contains(first) == 3
        assert load(store, first) == (3, [])
        assert store.stats().of(Tier.WARM).evictions == 5


def test_a_reservation_holds_its_blocks_against_eviction() -> None:
    with BlockStore(config_of(None, blocks=12), namespace=NAMESPACE) as store:
        first, second = store.keys(TOKENS)[:5], store.keys(TOKENS[1:])[:]
        save(store, first)
        with store.reserve(first) as reservation:
            assert reservation.is_ready and reservation.num_blocks == 5
            assert save(store, second) == 6, "what is reserved stays"
            assert store.stats().skip_reasons["no_room"] == len(second) - 6
            assert store.contains(first) == 5
            out = [bytearray(SIZE) for _ in first]
            assert store.load(reservation, Buffers(out)).num_loaded == 5
            assert [bytes(each) for each in out] == [payload(key) for key in first]
        assert save(store, store.keys(TOKENS[2:])[:11]) == 11, "nothing is held any more"
        assert store.contains(first) == 0


def test_pinned_blocks_stay_until_their_time_is_over() -> None:
    now = [0.0]
    with BlockStore(config_of(None, blocks=12), namespace=NAMESPACE, clock=lambda: now[0]) as store:
        first, second = store.keys(TOKENS)[:5], store.keys(TOKENS[1:])[:11]
        save(store, first)
        assert store.pin(first, ttl_s=10) == 5
        assert save(store, second) == 6 and store.contains(first) == 5
        now[0] = 11
        assert save(store, second, start=6) == 5 and store.contains(first) == 0


def test_places_that_do_not_fit_are_refused_and_hold_no_slot(store: BlockStore) -> None:
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    for bad in ([bytes(SIZE)], [memoryview(bytearray(2 * SIZE))[::2]], [3]):
        with pytest.raises(ShapeError):
            store.load(store.reserve(keys[:1]), Buffers(bad))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="4 blocks are to be saved, there are 1"):
        store.save(keys, Buffers([bytes(SIZE)]))
    store.flush()
    with store._changed:
        assert store._tiers.memory.index.slots.referenced_count == len(store._tiers.memory.spare), (
            "a slot is still held"
        )


def test_a_full_disk_and_a_closed_store_are_misses(tmp_path: Path) -> None:
    cold = ColdStore(tmp_path)
    store = BlockStore(config_of(None), namespace=NAMESPACE, cold=cold)
    keys = store.keys(TOKENS)[:]
    save(store, keys[:4])
    store.flush()
    cold.close()
    assert save(store, keys[:8], start=4) == 4, "they stay in memory"
    assert store.contains(keys) == 8 and load(store, keys) == (8, [])
    store.close()
    for call in (store.flush, store.stats, lambda: store.contains(keys)):
        with pytest.raises(ClosedError):
            call()


def test_a_store_that_cannot_hold_four_blocks_is_refused() -> None:
    with pytest.raises(CapacityError, match="holds 3 blocks"):
        BlockStore(config_of(None, blocks=3), namespace=NAMESPACE)
    with pytest.raises(ConfigError, match="cold_path"):
        BlockStoreConfig(warm_bytes=0)


@pytest.mark.parametrize("is_awaited", [True, False])
def test_beside_an_engine_one_thread_encodes_and_all_of_them_when_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_awaited: bool
) -> None:
    names: set[str] = set()
    encode = record_encoder.encode_record

    def noted(*args: object, **kwargs: object) -> object:
        names.add(threading.current_thread().name)
        return encode(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(record_encoder, "encode_record", noted)
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        store._tiers._saver._is_awaited = is_awaited
        save(store, store.keys(TOKENS)[:16])
        store._tiers._saver._queue.flush()
    assert all(name.startswith("tierkv-io" if is_awaited else "tierkv-write") for name in names), names


def test_blocks_that_are_read_are_copied_while_others_are_being_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = saved_keys(tmp_path / "store", 24)
    monkeypatch.setattr(loading, "_COPY_BYTES", 8 * SIZE)
    monkeypatch.setattr(loading, "_GROUP_BLOCKS", 1)
    with BlockStore(config_of(tmp_path / "store", num_io_threads=1), namespace=NAMESPACE) as store:
        copies: list[int] = []
        out = [bytearray(SIZE) for _ in keys]

        def read(cold: ColdStore, expected: Sequence[BlockInfo], *args: object, **kwargs: object) -> object:
            if expected[0].block_hash == keys[16].block_hash:
                eventually(lambda: len(copies) > 0)
            return read_many(cold, expected, *args, **kwargs)  # type: ignore[arg-type]

        def load_places(self: Buffers, first: int, slots: Sequence[int], *args: object, **kwargs: object) -> object:
            copies.append(len(slots))
            return load_buffers(self, first, slots, *args, **kwargs)  # type: ignore[arg-type]

        read_many, load_buffers = ColdStore.read_many_into, Buffers.load
        monkeypatch.setattr(ColdStore, "read_many_into", read)
        monkeypatch.setattr(Buffers, "load", load_places)
        found = store.load(store.reserve(keys), Buffers(out))
        found.synchronize()
        assert found.num_loaded == 24 and [bytes(each) for each in out] == [payload(key) for key in keys]
        assert sum(copies) == 24 and copies[0] < 24


def test_a_block_that_cannot_be_read_ends_a_load_of_which_a_part_was_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = saved_keys(tmp_path / "store", 24)
    monkeypatch.setattr(loading, "_COPY_BYTES", 4 * SIZE)
    monkeypatch.setattr(loading, "_GROUP_BLOCKS", 3)
    with BlockStore(config_of(tmp_path / "store"), namespace=NAMESPACE) as store:

        def read(cold: ColdStore, expected: Sequence[BlockInfo], *args: object, **kwargs: object) -> object:
            reasons = read_many(cold, expected, *args, **kwargs)  # type: ignore[arg-type]
            is_bad = [info.block_hash == keys[13].block_hash for info in expected]
            if any(is_bad):
                assert is_loading.wait(30.0)  # a block that fails before is in no reservation that is loaded
            return [MissReason.CORRUPT if bad else reason for bad, reason in zip(is_bad, reasons, strict=True)]

        def load_slowly(*args: object) -> None:
            is_loading.set()
            go_on(*args)  # type: ignore[arg-type]

        is_loading = threading.Event()
        go_on, read_many = loading.BlockLoader.load_slowly, ColdStore.read_many_into
        monkeypatch.setattr(loading.BlockLoader, "load_slowly", load_slowly)
        monkeypatch.setattr(ColdStore, "read_many_into", read)
        assert load(store, keys) == (13, keys[13:])
        assert store.stats().miss_reasons[MissReason.CORRUPT.value] == 1


def test_a_store_that_closes_does_not_wait_for_all_reads_of_a_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = saved_keys(tmp_path / "store", 24)
    monkeypatch.setattr(loading, "_GROUP_BLOCKS", 1)
    store = BlockStore(config_of(tmp_path / "store", num_io_threads=1), namespace=NAMESPACE)
    reads: list[bytes] = []
    is_closing = threading.Event()

    def read(cold: ColdStore, expected: Sequence[BlockInfo], *args: object, **kwargs: object) -> object:
        reads.append(expected[0].block_hash)
        assert is_closing.wait(30.0)
        eventually(lambda: store._tiers._loader.is_closing)  # type: ignore[attr-defined]
        time.sleep(0.05)  # as long as a disk takes: the others can be cancelled meanwhile
        return read_many(cold, expected, *args, **kwargs)  # type: ignore[arg-type]

    read_many = ColdStore.read_many_into
    monkeypatch.setattr(ColdStore, "read_many_into", read)
    reservation = store.reserve(keys)
    eventually(lambda: len(reads) > 0)
    is_closing.set()
    store.close()
    assert len(reads) < 24 and not reservation.is_reading


def test_a_reservation_says_how_many_blocks_are_read_side_by_side(tmp_path: Path) -> None:
    keys = saved_keys(tmp_path, 12)
    for num_threads, num_at_once in ((1, 12), (4, 12), (5, 10), (8, 8)):  # blocks so small are read in groups
        config = replace(config_of(tmp_path), num_io_threads=num_threads)
        with BlockStore(config, namespace=NAMESPACE) as store, store.reserve(keys) as reservation:
            assert reservation.num_at_once == num_at_once
            reservation.wait()


@pytest.mark.parametrize("missing", [range(5), range(3, 9), range(11, 16), [15]])
def test_a_prompt_that_has_partly_left_the_page_cache_comes_from_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: Sequence[int]
) -> None:
    keys = saved_keys(tmp_path, 16)
    lost = {keys[at].block_hash for at in missing}
    monkeypatch.setattr(ColdStore, "is_in_memory", lambda _, block_hash: block_hash not in lost)
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        assert store.origin(keys) is Origin.DISK
        assert store.origin([key for key in keys if key.block_hash not in lost]) is Origin.PAGE_CACHE


def saved_keys(path: Path, count: int) -> list[BlockKey]:
    """Return the keys of blocks that lie on disk alone."""
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)[:count]
        save(store, keys)
    return keys
