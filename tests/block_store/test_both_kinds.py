"""What every block store does, whether its tiers are its own or the daemon's."""

from __future__ import annotations

import logging
import threading
from itertools import product

import numpy as np
import pytest
import torch
from stored_blocks import LAYOUT, NAMESPACE, SIZE, TOKENS, Stores, eventually, load, save

from tierkv import Buffers, ConfigError, Namespace, ShapeError, Strided, Tier, digest_namespace
from tierkv.storage.outcomes import MissReason


def test_saved_blocks_come_back_from_memory_and_after_a_restart(stores: Stores) -> None:
    store = stores.open()
    keys = store.keys(TOKENS)
    assert store.contains(keys) == 0 and load(store, keys[:]) == (0, [])
    assert save(store, keys[:10]) == 10
    assert save(store, keys[:10]) == 0, "known blocks are not copied again"
    assert store.contains(keys) == 10 and load(store, keys[:]) == (10, [])
    assert store.stats().of(Tier.WARM).hits == 10
    stores.close()
    store = stores.open()
    assert store.contains(keys) == 10 and load(store, keys[:]) == (10, [])
    assert store.stats().of(Tier.COLD).hits == 10
    assert load(store, keys[:]) == (10, []), "now from the warm memory"
    assert store.stats().of(Tier.WARM).hits == 10
    assert store.stats().miss_reasons == {MissReason.ABSENT.value: 2}


def test_the_engine_has_the_first_blocks(stores: Stores) -> None:
    store = stores.open()
    keys = store.keys(TOKENS)
    assert save(store, keys[:8]) == 8
    assert save(store, keys[:12], start=8) == 4
    stores.close()
    store = stores.open()
    assert load(store, keys[:12], start=7) == (5, [])
    assert load(store, keys[:12], start=12) == (0, [])
    assert load(store, keys[:6]) == (6, [])
    with pytest.raises(ConfigError, match="negative"):
        store.reserve(keys, start=-1)
    with pytest.raises(ConfigError, match="start is 41"):
        store.save(keys, Buffers([]), start=41)


def test_a_prompt_longer_than_the_warm_memory_is_saved_and_loaded(stores: Stores) -> None:
    stores.blocks = 16
    store = stores.open()
    keys = store.keys(TOKENS)[:]
    for start in range(0, 40, 4):
        assert save(store, keys[: start + 4], start=start) == 4
        store.flush()
    assert store.contains(keys) == 40
    reservation = store.reserve(keys)
    assert reservation.wait(10)
    assert reservation.num_blocks == 40 and 0 < reservation.num_ready <= 8 and not reservation.is_ready
    reservation.release()
    assert load(store, keys) == (40, [])
    assert load(store, keys, start=13) == (27, [])


def test_several_long_loads_share_the_room(stores: Stores) -> None:
    stores.blocks = 16
    store = stores.open()
    keys = store.keys(TOKENS)[:]
    for start in range(0, 40, 4):
        save(store, keys[: start + 4], start=start)
        store.flush()
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(load(store, keys))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [(40, [])] * 3


@pytest.mark.parametrize("at", [0, 3, 9])
def test_a_damaged_block_ends_the_load_and_is_replaced(stores: Stores, at: int) -> None:
    store = stores.open()
    keys = store.keys(TOKENS)[:10]
    save(store, keys)
    stores.close()
    stores.damage(keys[at])
    store = stores.open()
    reservation = store.reserve(keys)
    assert reservation.wait(10) and reservation.num_ready == reservation.num_blocks == at and reservation.is_ready
    reservation.release()
    assert store.stats().miss_reasons[MissReason.CORRUPT.value] == 1
    assert load(store, keys) == (at, [])
    assert save(store, keys, start=0) >= 1
    store.flush()
    assert load(store, keys) == (10, [])
    stores.close()
    assert load(stores.open(), keys) == (10, []), "the disk has it again"


def test_all_that_follows_a_damaged_block_is_replaced(stores: Stores) -> None:
    store = stores.open()
    keys = store.keys(TOKENS)[:]
    for start in range(0, 40, 10):
        assert save(store, keys[: start + 10], start=start) == 10
        store.flush()
    stores.close()
    stores.damage(keys[3])
    store = stores.open()
    assert load(store, keys)[0] == 3
    assert save(store, keys) > 1, "the disk forgets what follows a damaged block when it is replaced"
    for _ in range(2):
        store.flush()
        save(store, keys)
    stores.close()
    assert load(stores.open(), keys) == (40, [])


def test_damage_found_while_loading_fails_the_rest_by_name(stores: Stores) -> None:
    stores.blocks = 16
    store = stores.open()
    keys = store.keys(TOKENS)[:]
    for start in range(0, 40, 4):
        save(store, keys[: start + 4], start=start)
        store.flush()
    stores.close()
    stores.damage(keys[25])
    assert load(stores.open(), keys) == (25, keys[25:])


def test_another_namespace_finds_nothing(stores: Stores) -> None:
    store = stores.open()
    save(store, store.keys(TOKENS)[:])
    for changes in ({"weights": "other"}, {"salt": "a"}, {"adapter": "b"}, {"tp_size": 2}, {"architecture": {"x": 1}}):
        other = stores.open(Namespace(**{"weights": "weights", "layout": LAYOUT, **changes}))  # type: ignore[arg-type]
        keys = other.keys(TOKENS)[:]
        assert other.contains(keys) == 0 and load(other, keys) == (0, [])
        for theirs in (store.keys(TOKENS)[:], store.keys(TOKENS)[1:]):
            assert load(other, theirs) == (0, []) or not stores.is_daemons, "keys of another namespace"


def test_a_lookup_store_knows_what_another_one_has_written(stores: Stores) -> None:
    store = stores.open()
    lookup = stores.open(looks_up=True)
    keys = lookup.keys(TOKENS)
    assert lookup.contains(keys) == 0
    save(store, keys[:5])
    store.flush()
    assert lookup.contains(keys) == 5
    for call in (lambda: lookup.reserve(keys), lambda: save(lookup, keys[:1]), lambda: lookup.register([])):
        with pytest.raises(ConfigError, match="only looks up"):
            call()


def test_a_reservation_is_loaded_once_and_released_as_often_as_one_likes(stores: Stores) -> None:
    store = stores.open()
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
    with pytest.raises(ShapeError):
        store.save(store.keys(TOKENS[1:])[:1], Buffers([bytes(3)]))
    assert save(store, store.keys(TOKENS[1:])[:1]) == 1, "the slot was given back"
    with pytest.raises(ShapeError, match="4 blocks are to be saved, there are 1"):
        store.save(keys, Buffers([bytes(SIZE)]))


def test_blocks_pinned_for_good_stay(stores: Stores) -> None:
    store = stores.open()
    keys = store.keys(TOKENS)[:]
    save(store, keys[:6])
    assert store.pin(keys[:3]) == 3 and store.clear() >= 3
    assert store.contains(keys) == 3
    assert store.unpin(keys[:3]) == 3 and store.clear() == 3 and store.contains(keys) == 0


def test_many_threads_save_and_load(stores: Stores) -> None:
    stores.blocks = 24
    store = stores.open()
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
        except BaseException as exc:  # noqa: BLE001 - shown below
            failures.append(exc)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and not any(thread.is_alive() for thread in threads)
    store.flush()
    stores.check_nothing_is_held()


DIGESTS = digest_namespace(weights="weights", row_bytes=SIZE, dtype="bfloat16", architecture={"page": 4})


def test_digests_name_opaque_rows(stores: Stores) -> None:
    assert DIGESTS.layout.block_bytes == SIZE
    store = stores.open(DIGESTS)
    keys = [store.key_of_digest(bytes([at]) * 32, group) for at, group in product(range(5), (0, 1))]
    assert save(store, keys) == 10 and load(store, keys) == (10, [])
    assert store.contains([store.key_of_digest(b"\1" * 32, 2)]) == 0
    for digest in (b"", b"\1" * 31, b"\1" * 61):
        with pytest.raises(ConfigError, match="32 to 60 bytes"):
            store.key_of_digest(digest)
    assert store.key_of_digest(b"\1" * 33) != store.key_of_digest(b"\1" * 32 + b"\0" * 2)
    with pytest.raises(ConfigError, match="key_of_digest"):
        store.keys(TOKENS)
    stores.close()
    store = stores.open(DIGESTS)
    assert load(store, [store.key_of_digest(b"\7" * 32), *keys[8:]], start=1) == (2, [])
    assert store.contains(keys) == 10 and load(store, keys[3:]) == (7, [])
    assert load(store, keys) == (10, []), "the first ones are cold, the others warm"
    assert load(store, keys[::-1]) == (10, []), "the order does not matter"
    new = store.key_of_digest(b"\7" * 32)
    assert store.contains([*keys[5:], new, *keys[:5]]) == 5
    assert save(store, [*keys[5:], new, *keys[:5]], start=2) == 1
    assert load(store, [new]) == (1, [])
    assert store.pin([new]) == 1 and store.clear() >= 10 and store.contains([new]) == 1
    with pytest.raises(ConfigError, match="digest_namespace"):
        stores.open(NAMESPACE).key_of_digest(b"\1" * 32)


def test_a_row_that_is_named_twice_is_never_another_ones_bytes(stores: Stores) -> None:
    store = stores.open(DIGESTS)
    keys = [store.key_of_digest(bytes([at]) * 32) for at in (1, 2, 1, 3)]
    assert save(store, keys) >= 2
    num_loaded, _ = load(store, keys)
    assert num_loaded >= 2
    stores.check_nothing_is_held()


def test_pages_of_an_engine_are_saved_and_loaded(stores: Stores) -> None:
    store = stores.open()
    tensors = [torch.zeros(12, 2, 4, 8) for _ in range(2)]
    memory = store.register([[tensor] for tensor in tensors])
    other = [torch.zeros(12, 2, 4, 8) for _ in range(2)]
    second = store.register([[tensor] for tensor in other])
    keys = store.keys(TOKENS)[:5]
    for at in range(5):
        for layer, tensor in enumerate(tensors):
            tensor[at] = 10 * layer + at + 1
    assert store.save(keys, Strided(memory, [[at] for at in range(5)])).num_saved == 5
    found = store.load(store.reserve(keys), Strided(second, [[11 - at] for at in range(5)]))
    found.wait(0)
    found.synchronize()
    assert found.num_loaded == 5
    for layer, tensor in enumerate(other):
        assert [float(tensor[11 - at].mean()) for at in range(5)] == [10.0 * layer + at + 1 for at in range(5)]
    stores.check_nothing_is_held()


def test_misses_are_logged_by_reason_at_debug_level_alone(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    store = stores.open()
    keys = store.keys(TOKENS)
    save(store, keys[:10])
    line = f"10 of {len(keys)} blocks found, the next one is a miss: absent"
    for level, lines in ((logging.INFO, []), (logging.DEBUG, [line, line])):
        with caplog.at_level(level, "tierkv.block_store"):
            caplog.clear()
            assert store.contains(keys) == 10
            store.reserve(keys).release()
            assert store.contains(keys[:10]) == 10
            store.reserve(keys[:10]).release()
            assert [each.getMessage() for each in caplog.records if "miss" in each.getMessage()] == lines


def test_a_damaged_block_is_logged_with_its_reason(stores: Stores, caplog: pytest.LogCaptureFixture) -> None:
    store = stores.open()
    keys = store.keys(TOKENS)
    save(store, keys[:4])
    stores.close()
    stores.damage(keys[1])
    store = stores.open()
    with caplog.at_level(logging.DEBUG, "tierkv.block_store"):
        assert load(store, keys[:4])[0] == 1
        eventually(lambda: "a block that was found is a miss: corrupt" in caplog.text)


def test_no_lock_is_held_while_misses_are_logged(stores: Stores) -> None:
    store, held = stores.open(), []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            held.append(store._changed.is_owned())

    logger, watch = logging.getLogger("tierkv.block_store.misses"), Watch()
    before = logger.level
    logger.addHandler(watch)
    logger.setLevel(logging.DEBUG)
    try:
        keys = store.keys(TOKENS)
        store.contains(keys)
        store.reserve(keys).release()
    finally:
        logger.removeHandler(watch)
        logger.setLevel(before)
    assert held == [False, False]
