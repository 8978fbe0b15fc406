"""Block stores of several machines over one remote tier: blocks of tokens, and rows that an engine names by digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from remote_servers import Redis, wait_until
from stored_blocks import LAYOUT, NAMESPACE, SIZE, TOKENS, config_of, load, save

from tierkv import BlockStore, BlockStoreConfig, Buffers
from tierkv.block_store.keys import digest_namespace
from tierkv.block_store.load_or_compute import LoadOrCompute, Origin
from tierkv.block_store.own_tiers import OwnTiers
from tierkv.errors import ConfigError


@pytest.fixture
def stores(redis_server: Redis, tmp_path: Path) -> Iterator[Opener]:
    opener = Opener(tmp_path, redis_server.url)
    yield opener
    opener.close()


class Opener:
    """Opens block stores, each with a store of its own, over one remote tier."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self._folder = folder
        self._opened: list[BlockStore] = []

    def __call__(self, name: str | None, **changes: Any) -> BlockStore:
        path = None if name is None else self._folder / name
        store = BlockStore(config_of(path, remote=self.url, **changes), namespace=NAMESPACE)
        self._opened.append(store)
        flush(store)
        return store

    def close(self) -> None:
        for store in self._opened:
            store.close()


def flush(store: BlockStore) -> None:
    store.flush()
    tiers = store._tiers
    assert isinstance(tiers, OwnTiers) and tiers.remotes and tiers.remotes.flush(timeout_s=20)


@pytest.mark.parametrize("name", ["first", None])
def test_what_one_engine_saves_another_finds_and_loads(stores: Opener, name: str | None) -> None:
    first = stores(name)
    keys = list(first.keys(TOKENS))
    assert save(first, keys[:30]) == 30
    flush(first)
    assert first.stats().remotes[0].counters["written"] == 30
    first.close()
    second = stores("second" if name else None)
    assert second.contains(keys) == 30
    assert second.origin(keys[:30]) is Origin.REMOTE
    reservation = second.reserve(keys)
    assert len(reservation.keys) == 30 and reservation.origin is Origin.REMOTE
    reservation.release()
    assert load(second, keys) == (30, [])
    assert second.stats().remotes[0].counters["read_hits"] >= 30


def test_more_blocks_than_the_memory_holds_come_through_the_spare_slots(stores: Opener) -> None:
    first = stores("first")
    keys = list(first.keys(TOKENS))
    save(first, keys)
    flush(first)
    second = stores("second", blocks=24)
    assert load(second, keys) == (40, [])


def test_what_was_loaded_is_kept_on_this_machine(stores: Opener, redis_server: Redis, tmp_path: Path) -> None:
    first = stores("first")
    keys = list(first.keys(TOKENS))
    save(first, keys)
    flush(first)
    second = stores("second")
    assert load(second, keys) == (40, [])
    flush(second)
    second.close()
    redis_server.command("FLUSHALL")
    with BlockStore(config_of(tmp_path / "second"), namespace=NAMESPACE) as alone:
        assert load(alone, keys) == (40, [])


def test_a_store_that_only_looks_up_asks_the_remote_tier(stores: Opener, tmp_path: Path) -> None:
    first = stores("first")
    keys = list(first.keys(TOKENS))
    save(first, keys)
    flush(first)
    with BlockStore(BlockStoreConfig(warm_bytes=0, remote=stores.url), namespace=NAMESPACE) as scheduler:
        wait_until(lambda: scheduler.contains(keys) == 40)
        assert scheduler.origin(keys) is Origin.REMOTE


def test_blocks_that_go_between_lookup_and_load_are_failed_keys(stores: Opener, redis_server: Redis) -> None:
    first = stores("first")
    keys = list(first.keys(TOKENS))
    save(first, keys)
    flush(first)
    second = stores("second")
    assert second.contains(keys) == 40
    redis_server.command("FLUSHALL")
    num_loaded, failed = load(second, keys)
    assert num_loaded == 0 and failed
    assert second.stats().remotes[0].counters["miss_absent"] >= 1
    assert save(second, keys) == 40 and load(second, keys) == (40, [])


def test_a_server_that_is_down_costs_misses(stores: Opener) -> None:
    stores.url = "redis://127.0.0.1:1"
    store = stores("first")
    keys = list(store.keys(TOKENS))
    assert store.contains(keys) == 0
    save(store, keys)
    assert load(store, keys) == (40, [])
    assert not store.stats().remotes[0].is_up


def test_rows_that_an_engine_names_by_digests_are_shared_too(redis_server: Redis, tmp_path: Path) -> None:
    namespace = digest_namespace(weights="w", row_bytes=2048, dtype="float16")
    digests = [hashlib.sha256(bytes([number])).digest() for number in range(6)]
    rows = [bytes([number]) * namespace.layout.block_bytes for number in range(6)]
    config = {"warm_bytes": 1 << 20, "remote": redis_server.url}
    with BlockStore(BlockStoreConfig(cold_path=tmp_path / "first", **config), namespace=namespace) as first:  # type: ignore[arg-type]
        keys = [first.key_of_digest(each) for each in digests]
        first.save(keys, Buffers(rows))
        flush(first)
    with BlockStore(BlockStoreConfig(cold_path=tmp_path / "second", **config), namespace=namespace) as second:  # type: ignore[arg-type]
        wait_until(lambda: second.contains(keys) == 6)
        out = [bytearray(namespace.layout.block_bytes) for _ in keys]
        found = second.load(second.reserve(keys), Buffers(out))
        found.synchronize()
        assert found.num_loaded == 6 and [bytes(each) for each in out] == rows


def test_loads_over_the_network_have_costs_of_their_own() -> None:
    choice = LoadOrCompute(block_size=4)
    choice.record_compute(400, seconds=1.0)
    choice.record_load(100, origin=Origin.PAGE_CACHE, seconds=0.1)
    assert choice.worth_loading(100, origin=Origin.REMOTE, num_rest_tokens=4) == 100, "not measured yet"
    choice.record_load(100, origin=Origin.REMOTE, seconds=9.0)
    assert choice.worth_loading(100, origin=Origin.REMOTE, num_rest_tokens=4) == 0
    assert choice.worth_loading(100, origin=Origin.PAGE_CACHE, num_rest_tokens=4) == 100
    other = LoadOrCompute(block_size=4)
    other.restore(choice.measured())
    assert other.load_s(100, origin=Origin.REMOTE) == 9.0


def test_a_block_store_needs_some_place() -> None:
    with pytest.raises(ConfigError):
        BlockStoreConfig(warm_bytes=0)
    assert LAYOUT.block_bytes == SIZE
