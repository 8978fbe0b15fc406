"""How fast cold blocks come is measured before the first request wants any."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from stored_blocks import LAYOUT, NAMESPACE, TOKENS, config_of, eventually, save

from tierkv import BlockStore, LoadOrCompute, Origin
from tierkv.block_store import calibration
from tierkv.block_store.keys import BlockKey
from tierkv.storage.cold import ColdStore

NUM_BLOCKS = 40
SIZES = [1, 2, 4, 8]  # there are 8 spare slots of 64
ROOT = NAMESPACE.digest


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    """Return the path of a store with blocks, all of them written and none measured."""
    path = tmp_path / "store"
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        assert save(store, store.keys(TOKENS)) == NUM_BLOCKS
        store.flush()
    return path


def calibrated(path: Path, costs: LoadOrCompute) -> dict[str, list[tuple[int, float]]]:
    """Open a store, wait until it has measured, and return what."""
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        store.keep_costs(costs)
        loader = store._tiers._loader  # type: ignore[attr-defined]
        eventually(lambda: not loader._num_working)
        assert store.stats().requests == 0, "it counts as no request"
        assert not any(tier.blocks for name, tier in store.stats().tiers.items() if name.value == "warm")
    return costs.measured()


class FakePages:
    """Stands in for the page cache: records as small as these lie in the tree itself."""

    def __init__(self, patch: pytest.MonkeyPatch, *, can_forget: bool = True, num_deaf: int = 0) -> None:
        """num_deaf: how often the system is asked in vain to forget, since it writes pages first."""
        self.forgotten: set[bytes] = set()
        self.num_deaf = num_deaf
        read = ColdStore.read_many_into

        def read_many_into(store: ColdStore, infos: Sequence[object], *args: object, **options: object) -> object:
            self.forgotten -= {info.block_hash for info in infos}  # type: ignore[attr-defined]
            return read(store, infos, *args, **options)  # type: ignore[arg-type]

        def forget(_: ColdStore, hashes: Sequence[bytes]) -> None:
            self.num_deaf -= 1
            if can_forget and self.num_deaf < 0:
                self.forgotten |= set(hashes)

        patch.setattr(ColdStore, "read_many_into", read_many_into)
        patch.setattr(ColdStore, "forget_pages", forget)
        patch.setattr(ColdStore, "is_in_memory", lambda _, each: each not in self.forgotten)


def test_a_store_measures_page_cache_and_disk_when_it_opens(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = FakePages(monkeypatch)
    found = calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size))
    for origin in (Origin.PAGE_CACHE, Origin.DISK):
        assert [size for size, _ in found[origin.name]] == SIZES
        assert all(seconds > 0 for _, seconds in found[origin.name])
    assert not pages.forgotten, "what was read last is in the page cache again"


def test_a_system_that_writes_blocks_before_it_forgets_them_is_asked_again(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakePages(monkeypatch, num_deaf=3)
    found = calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size))
    assert [size for size, _ in found["DISK"]] == SIZES


def test_what_is_known_is_not_measured_again(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakePages(monkeypatch)
    costs = LoadOrCompute(block_size=LAYOUT.block_size)
    costs.record_load(5, origin=Origin.DISK, seconds=7.0)
    found = calibrated(filled, costs)
    assert found["DISK"] == [(5, 7.0)]
    assert found["PAGE_CACHE"]
    monkeypatch.setattr(calibration, "_some_keys", lambda *_: pytest.fail("the costs beside the store have all"))
    assert calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size)) == found


def test_a_disk_that_cannot_be_told_from_the_page_cache_is_not_measured(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakePages(monkeypatch, can_forget=False)
    monkeypatch.setattr(calibration, "_MOST_S", 0.05)
    found = calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size))
    assert "PAGE_CACHE" in found and "DISK" not in found


def test_blocks_on_disk_alone_are_read_once_before_the_page_cache_is_measured(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages, asked = FakePages(monkeypatch), list[int]()
    with ColdStore(filled, min_free_bytes=0) as cold:
        keys = calibration._some_keys(cold, ROOT)
        pages.forgotten |= {key.block_hash for key in keys}

        def time_reading(some: Sequence[BlockKey]) -> float:
            asked.append(len(some))
            pages.forgotten -= {key.block_hash for key in some}
            return 0.001

        costs = LoadOrCompute(block_size=LAYOUT.block_size)
        calibration.calibrate(costs, cold, ROOT, time_reading)
    assert asked == [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 1, 2, 4, 8, 16]


def test_a_slow_disk_is_read_for_a_second_and_a_read_that_was_begun(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, asked = [0.0], list[int]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(calibration, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))

    def time_reading(some: Sequence[BlockKey]) -> float:
        asked.append(len(some))
        now[0] += 0.3 * len(some)
        return 0.3 * len(some)

    with ColdStore(filled, min_free_bytes=0) as cold:
        monkeypatch.setattr(ColdStore, "is_in_memory", lambda *_: True)
        costs = LoadOrCompute(block_size=LAYOUT.block_size)
        calibration.calibrate(costs, cold, ROOT, time_reading)
    assert asked == [1, 2, 4]
    assert costs.load_s(32, origin=Origin.PAGE_CACHE) == pytest.approx(9.6)


def test_the_blocks_of_one_sequence_are_chosen_in_its_order(filled: Path) -> None:
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        keys = store.keys(TOKENS)
        assert store.cold is not None
        some = calibration._some_keys(store.cold, store.namespace.digest)
        first = list(keys).index(some[0])
        assert some == list(keys[first : first + 16])


def test_a_block_that_cannot_be_read_ends_the_measurement(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ColdStore, "read_many_into", lambda *_, **__: [None, "corrupt"])
    assert calibrated(filled, LoadOrCompute(block_size=LAYOUT.block_size)).get("PAGE_CACHE", []) == []


def test_a_store_of_few_blocks_is_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with BlockStore(config_of(path), namespace=NAMESPACE) as store:
        save(store, store.keys(TOKENS[: 3 * LAYOUT.block_size]))
        store.flush()
    assert calibrated(path, LoadOrCompute(block_size=LAYOUT.block_size)) == {"compute": []}


def test_a_store_that_closes_waits_for_no_further_measurement(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, read = threading.Event(), ColdStore.read_many_into

    def read_slowly(*args: object, **options: object) -> object:
        begun.set()
        time.sleep(0.05)
        return read(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(ColdStore, "read_many_into", read_slowly)
    costs = LoadOrCompute(block_size=LAYOUT.block_size)
    with BlockStore(config_of(filled), namespace=NAMESPACE) as store:
        store.keep_costs(costs)
        assert begun.wait(10)
        started = time.monotonic()
    assert time.monotonic() - started < 5
    assert len(costs.measured().get("PAGE_CACHE", [])) < len(SIZES)
