"""The block store: what is saved comes back, byte for byte, and what cannot be had is a miss."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from cold_blocks import damage_record

from tierkv import (
    BlockKey,
    BlockLayout,
    BlockStore,
    BlockStoreConfig,
    Buffers,
    CapacityError,
    ClosedError,
    ColdStore,
    ConfigError,
    Namespace,
    ShapeError,
    Tier,
    digest_namespace,
)
from tierkv.storage.outcomes import MissReason

LAYOUT = BlockLayout.uniform(num_layers=2, block_size=4, kv_heads=1, head_dim=8, dtype="float32")
SIZE = LAYOUT.block_bytes
NAMESPACE = Namespace(weights="weights", layout=LAYOUT)
NUM_WARM = 64
TOKENS = list(range(100, 100 + 40 * 4))


def config_of(path: Path | None, *, blocks: int = NUM_WARM, **changes: object) -> BlockStoreConfig:
    return BlockStoreConfig(cold_path=path, warm_bytes=blocks * SIZE, **changes)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlockStore]:
    with BlockStore(config_of(tmp_path / "store"), namespace=NAMESPACE) as store:
        yield store


def payload(key: BlockKey) -> bytes:
    """Return bytes that are those of this key alone."""
    seed = int.from_bytes(key.content_digest, "little")
    return np.random.default_rng(seed).integers(0, 256, SIZE, dtype=np.uint8).tobytes()


def save(store: BlockStore, keys: list[BlockKey], start: int = 0) -> int:
    saved = store.save(keys, Buffers([payload(key) for key in keys[start:]]), start=start)
    assert saved.is_done()
    return saved.num_saved


def load(store: BlockStore, keys: list[BlockKey], start: int = 0) -> tuple[int, list[BlockKey]]:
    """Load what there is and compare it. Return how many blocks came, and what failed."""
    reservation = store.reserve(keys, start)
    out = [bytearray(SIZE) for _ in reservation.keys]
    found = store.load(reservation, Buffers(out))
    found.synchronize()
    for key, got in zip(found.keys[: found.num_loaded], out, strict=False):
        assert bytes(got) == payload(key), "another block's bytes"
    for got in out[found.num_loaded :]:
        assert not any(got), "a block that did not come was written to"
    return found.num_loaded, found.failed_keys


def test_saved_blocks_come_back_from_memory_and_after_a_restart(tmp_path: Path) -> None:
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)
        assert store.contains(keys) == 0 and load(store, keys[:]) == (0, [])
        assert save(store, keys[:10]) == 10
        assert save(store, keys[:10]) == 0, "known blocks are not copied again"
        assert store.contains(keys) == 10 and load(store, keys[:]) == (10, [])
        assert store.stats().of(Tier.WARM).hits == 10
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        assert store.contains(keys) == 10 and load(store, keys[:]) == (10, [])
        assert store.stats().of(Tier.COLD).hits == 10
        assert load(store, keys[:]) == (10, []), "now from the warm memory"
        assert store.stats().of(Tier.WARM).hits == 10


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
        monkeypatch.setattr(ColdStore, "read_into", counted(ColdStore.read_into, reads))
        assert save(again, keys[:31], start=30) == 1
        again.flush()
        assert reads == [] and again.contains(keys) == 31
        assert load(again, keys[:31], start=29) == (2, [])
        assert reads == [keys[29].block_hash], "the engine has those before it"


def counted(method: Callable[..., object], reads: list[bytes]) -> Callable[..., object]:
    def read_into(self: ColdStore, expected: object, *args: object, **kwargs: object) -> object:
        reads.append(expected.block_hash)  # type: ignore[attr-defined]
        return method(self, expected, *args, **kwargs)

    return read_into


def test_a_prompt_longer_than_the_warm_memory_is_saved_and_loaded(tmp_path: Path) -> None:
    with BlockStore(config_of(tmp_path, blocks=16), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)[:]
        for start in range(0, 40, 4):
            assert save(store, keys[: start + 4], start=start) == 4
            store.flush()
        assert store.contains(keys) == 40
        reservation = store.reserve(keys)
        reservation.wait()
        assert reservation.num_blocks == 40 and 0 < reservation.num_ready <= 8 and not reservation.is_ready
        reservation.release()
        assert load(store, keys) == (40, [])


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_damaged_block_ends_the_load_and_is_replaced(tmp_path: Path, at: int) -> None:
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)[:10]
        save(store, keys)
    damage(tmp_path, keys[at])
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        reservation = store.reserve(keys)
        assert reservation.wait(10) and reservation.num_ready == reservation.num_blocks == at and reservation.is_ready
        reservation.release()
        assert load(store, keys) == (at, [])
        assert store.stats().miss_reasons[MissReason.CORRUPT.value] >= 1
        assert save(store, keys, start=0) >= 1
        store.flush()
        assert load(store, keys) == (10, [])
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        assert load(store, keys) == (10, []), "the disk has it again"


def damage(path: Path, key: BlockKey) -> None:
    """Flip bits of a block's payload in the data file."""
    with ColdStore(path) as cold:
        damage_record(cold, key.block_hash, offset=300)


def test_damage_found_while_loading_fails_the_rest_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with BlockStore(config_of(tmp_path, blocks=16), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)[:]
        for start in range(0, 40, 4):
            save(store, keys[: start + 4], start=start)
            store.flush()
    damage(tmp_path, keys[25])
    with BlockStore(config_of(tmp_path, blocks=16), namespace=NAMESPACE) as store:
        assert load(store, keys) == (25, keys[25:])


def test_another_namespace_finds_nothing(tmp_path: Path) -> None:
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        save(store, store.keys(TOKENS)[:])
    for changes in ({"weights": "other"}, {"salt": "a"}, {"adapter": "b"}, {"tp_size": 2}, {"architecture": {"x": 1}}):
        other = Namespace(**{"weights": "weights", "layout": LAYOUT, **changes})  # type: ignore[arg-type]
        with BlockStore(config_of(tmp_path), namespace=other) as store:
            keys = store.keys(TOKENS)[:]
            assert store.contains(keys) == 0 and load(store, keys) == (0, [])


def test_a_lookup_store_knows_what_another_one_has_written(tmp_path: Path) -> None:
    with (
        BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store,
        BlockStore(BlockStoreConfig(cold_path=tmp_path, warm_bytes=0), namespace=NAMESPACE, cold=store.cold) as lookup,
    ):
        keys = lookup.keys(TOKENS)
        assert lookup.contains(keys) == 0
        save(store, keys[:5])
        store.flush()
        assert lookup.contains(keys) == 5
        for call in (lambda: lookup.reserve(keys), lambda: save(lookup, keys[:1])):
            with pytest.raises(ConfigError, match="only looks up"):
                call()


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


def test_blocks_pinned_for_good_stay_on_the_disk(tmp_path: Path) -> None:
    with BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)[:]
        save(store, keys[:6])
        assert store.pin(keys[:3]) == 3 and store.clear() == 6
        assert store.contains(keys) == 3
        assert store.unpin(keys[:3]) == 3 and store.clear() == 3 and store.contains(keys) == 0


def test_a_reservation_is_loaded_once_and_released_as_often_as_one_likes(store: BlockStore) -> None:
    keys = store.keys(TOKENS)[:4]
    save(store, keys)
    reservation = store.reserve(keys)
    reservation.cut(3)
    assert reservation.num_blocks == 3
    with pytest.raises(ShapeError, match="has 3 bytes"):
        store.load(reservation, Buffers([bytearray(3)]))
    with pytest.raises(ConfigError, match="released, or loaded"):
        store.load(reservation, Buffers([]))
    reservation.release()
    reservation.release()
    assert store.load(store.reserve(keys), Buffers([bytearray(SIZE)] * 2)).num_loaded == 2
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


def test_many_threads_save_and_load(tmp_path: Path) -> None:
    with BlockStore(config_of(tmp_path, blocks=24), namespace=NAMESPACE) as store:
        chains = [store.keys([seed, *TOKENS])[:20] for seed in range(4)]
        failures: list[BaseException] = []

        def work(seed: int) -> None:
            generator = np.random.default_rng(seed)
            try:
                for _ in range(30):
                    keys = chains[generator.integers(4)][: generator.integers(1, 21)]
                    start = store.contains(keys)
                    save(store, keys, start=start)
                    load(store, keys, start=int(generator.integers(len(keys))))
            except Exception as exc:  # noqa: BLE001 - shown below
                failures.append(exc)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not failures and not any(thread.is_alive() for thread in threads)
        store.flush()
        with store._changed:
            assert store._tiers.memory.index.slots.referenced_count == len(store._tiers.memory.spare)
            store._tiers.memory.index.slots.check()


def test_digests_name_opaque_rows(tmp_path: Path) -> None:
    namespace = digest_namespace(weights="weights", row_bytes=SIZE, dtype="bfloat16", architecture={"page": 4})
    assert namespace.layout.block_bytes == SIZE
    with BlockStore(config_of(tmp_path), namespace=namespace) as store:
        keys = [store.key_of_digest(bytes([at]) * 32, group) for at in range(5) for group in (0, 1)]
        assert save(store, keys) == 10 and load(store, keys) == (10, [])
        assert store.contains([store.key_of_digest(b"\1" * 32, 2)]) == 0
        for digest in (b"", b"\1" * 31, b"\1" * 61):
            with pytest.raises(ConfigError, match="32 to 60 bytes"):
                store.key_of_digest(digest)
        assert store.key_of_digest(b"\1" * 33) != store.key_of_digest(b"\1" * 32 + b"\0" * 2)
        with pytest.raises(ConfigError, match="key_of_digest"):
            store.keys(TOKENS)
    with BlockStore(config_of(tmp_path), namespace=namespace) as store:
        assert store.contains(keys) == 10 and load(store, keys[3:]) == (7, [])
    with (
        BlockStore(config_of(tmp_path), namespace=NAMESPACE) as store,
        pytest.raises(ConfigError, match="digest_namespace"),
    ):
        store.key_of_digest(b"\1" * 32)


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
